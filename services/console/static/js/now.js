// The claim, and what happens now.

import { Chart } from "./charts.js";
import { $, h, renew, replace, write } from "./dom.js";
import { count, digits, missing, NONE, percent, span, time } from "./format.js";

const seconds = (s) => (missing(s) ? null : 1_000 * s);

// Each: title, [number, unit] of a look, what stands beside it, the series below it, its state.
const TILES = [
  { id: "events", title: "Events in", value: (n) => [digits(n.recent.events_per_s), "/s"], also: (n) => `${count(n.events_accepted)} in all`, series: "events_per_s" },
  { id: "lag", title: "Not in features yet", value: (n) => [count(n.feature_lag_events), "events"], also: (n) => `not learned: ${count(n.learning_lag_events)}`, series: "feature_lag_events", state: (n) => (n.feature_lag_events > 20_000 ? "warn" : "") },
  { id: "features", title: "Feature freshness, p50", value: (n) => span(n.recent.feature_freshness_p50_ms ?? n.feature_freshness_p50_ms), also: (n) => `p99 ${time(n.recent.feature_freshness_p99_ms ?? n.feature_freshness_p99_ms)}`, series: "feature_freshness_p50_ms" },
  { id: "weights", title: "Weight freshness, p50", value: (n) => span(seconds(n.recent.weight_freshness_p50_s ?? n.weight_freshness_p50_s)), also: (n) => (missing(n.student_version) ? "" : `student ${n.student_version}`), series: "weight_freshness_p50_s" },
  { id: "answers", title: "Answers", value: (n) => [digits(n.recent.answers_per_s), "/s"], also: (n) => `${count(n.answers)} in all`, series: "answers_per_s" },
  { id: "answer-time", title: "Answer time, p50", value: (n) => span(n.recent.answer_p50_ms ?? n.answer_p50_ms), also: (n) => `p99 ${time(n.recent.answer_p99_ms ?? n.answer_p99_ms)}`, series: "answer_p50_ms" },
  { id: "degraded", title: "Degraded answers", value: (n) => [count(n.answers_degraded), ""], also: (n) => `${digits(n.recent.degraded_per_s)} /s now`, series: "degraded_per_s", state: (n) => (n.recent.degraded_per_s > 0 ? "bad" : "") },
  { id: "dead", title: "Dead letters", value: (n) => [count(n.events_dead), ""], also: (n) => `${digits(n.recent.dead_per_s)} /s now`, series: "dead_per_s", state: (n) => (n.recent.dead_per_s > 0 ? "warn" : "") },
];

const charts = [];

export function start() {
  replace($("tiles"), TILES.map((tile) => {
    const spark = h("div", { class: "spark" });
    charts.push(new Chart(spark, { axes: false, label: `${tile.title}, over the chosen time`, series: [{ key: tile.series, colour: "accent", fill: true, width: 1.4 }] }));
    return h("div", { class: "tile", id: `tile-${tile.id}` },
      h("h3", {}, tile.title), h("p", { class: "value" }, NONE), h("p", { class: "also" }), spark);
  }));
}

export function look(now) {
  for (const tile of TILES) {
    const box = $(`tile-${tile.id}`);
    const [number, unit] = tile.value(now);
    const value = box.querySelector(".value");
    if (value.textContent !== `${number}${unit}`) replace(value, [number, unit ? h("small", {}, unit) : null].filter(Boolean));
    write(box.querySelector(".also"), tile.also(now));
    box.className = `tile ${tile.state?.(now) ?? ""}`.trim();
  }
  headline(now);
  flow(now);
}

export function draw(past, range) {
  for (const chart of charts) chart.set(past, range);
}

function headline(now) {
  const features = now.recent.feature_freshness_p50_ms ?? now.feature_freshness_p50_ms;
  const weights = now.recent.weight_freshness_p50_s ?? now.weight_freshness_p50_s;
  const strong = (text) => h("b", {}, text);
  const parts = [];
  if (missing(now.student_version)) {
    parts.push("No student answers yet. The first teacher is trained once enough events are here, the first student is distilled from it.");
  } else if (!missing(weights)) {
    parts.push("What a user does now is in the answers ");
    if (!missing(features)) parts.push("after ", strong(time(features)), ", and in the weights that answer ");
    parts.push("after ", strong(time(seconds(weights))), ".");
  } else {
    parts.push("Student ", strong(String(now.student_version)), " answers.");
  }
  if (!missing(now.retention)) {
    parts.push(" The student keeps ", strong(percent(now.retention)), " of its teacher's quality.");
  }
  const box = $("headline");
  const text = parts.map((part) => part.textContent ?? part).join("");
  if (box.textContent !== text) replace(box, parts);
}

function flow(now) {
  const node = (strong, text, kind = "") => h("li", { class: `node ${kind}`.trim() }, h("strong", {}, strong), h("span", {}, text));
  const hop = (text, strong) => h("li", { class: "hop" }, text, " ", h("b", {}, strong));
  const features = now.recent.feature_freshness_p50_ms ?? now.feature_freshness_p50_ms;
  const weights = now.recent.weight_freshness_p50_s ?? now.weight_freshness_p50_s;
  const answer = now.recent.answer_p50_ms ?? now.answer_p50_ms;
  const teacher = missing(now.teacher_version) ? "no teacher yet" : `taught by teacher ${now.teacher_version}`;
  const version = missing(now.student_version) ? "No student yet" : `Student ${now.student_version}`;
  renew($("flow"), [
    node(`${digits(now.recent.events_per_s)} events/s`, "Kafka"),
    hop("in", time(features)),
    node("Features", "Feast, Redis"),
    hop("learned in", time(seconds(weights))),
    node(version, teacher, "model"),
    hop("asked, in", time(answer)),
    node(`${digits(now.recent.answers_per_s)} answers/s`, "Ray Serve"),
  ]);
}
