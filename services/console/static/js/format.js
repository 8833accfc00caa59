// Numbers and times as people read them. A missing number is a dash.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
export const NONE = "–";

export const missing = (value) => value === null || value === undefined || Number.isNaN(value);
export const count = (value) => (missing(value) ? NONE : whole.format(value));

/** Three digits that count: 0.412, 7.31, 62.4, 518. */
export function digits(value) {
  if (missing(value)) return NONE;
  const size = Math.abs(value);
  if (size >= 100 || value === 0) return whole.format(value);
  return value.toFixed(size >= 10 ? 1 : size >= 1 ? 2 : 3);
}

/** [number, unit] of a time in milliseconds: below a second, ms; below two minutes, s; ... */
export function span(ms) {
  if (missing(ms)) return [NONE, ""];
  if (ms < 1_000) return [digits(ms), "ms"];
  if (ms < 120_000) return [digits(ms / 1_000), "s"];
  if (ms < 7_200_000) return [digits(ms / 60_000), "min"];
  if (ms < 172_800_000) return [digits(ms / 3_600_000), "h"];
  return [digits(ms / 86_400_000), "days"];
}
export const time = (ms) => span(ms).join(" ").trim();

export const percent = (value) =>
  missing(value) ? NONE : `${(100 * value).toFixed(Math.abs(value) < 0.0995 ? 2 : 1)} %`;
export const score = (value) => (missing(value) ? NONE : value.toFixed(4).replace(/^0/, ""));
export const clock = (ms) => new Date(ms).toLocaleTimeString("en-GB");
export const ago = (ms, nowMs = Date.now()) => `${time(Math.max(0, nowMs - ms))} ago`;
