// uPlot, dressed in the page's colours.

/* global uPlot */

export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

const dark = matchMedia("(prefers-color-scheme: dark)");
const charts = new Set();
dark.addEventListener("change", () => charts.forEach((chart) => chart.rebuild()));

/**
 * A chart over time in `element`. `series`: [{key, colour, dash, width, fill}]; `axes`: false for a
 * mere line; `value` formats the scale; `log`: by powers of ten; `marks()` gives times (s) of vertical lines.
 */
export class Chart {
  constructor(element, { series, axes = true, value = String, log = false, marks = () => [], label }) {
    Object.assign(this, { element, series, axes, value, log, marks });
    element.setAttribute("role", "img");
    element.setAttribute("aria-label", label);
    this.data = null;
    this.plot = null;
    charts.add(this);
    new ResizeObserver(() => this.resize()).observe(element);
  }

  /** `past`: {at: [ms], series: {key: [value or null]}}; `range`: [ms, ms]. */
  set(past, range) {
    const seconds = past.at.map((ms) => ms / 1_000);
    const gap = past.at.map(() => null);
    this.data = [seconds, ...this.series.map(({ key }) => past.series[key] ?? gap)];
    this.range = range.map((ms) => ms / 1_000);
    if (this.plot) this.plot.setData(this.data);
    else this.rebuild();
  }

  resize() {
    const { clientWidth: width, clientHeight: height } = this.element;
    if (this.plot && width) this.plot.setSize({ width, height });
  }

  rebuild() {
    if (!this.data || !this.element.clientWidth) return;
    this.plot?.destroy();
    const axis = { stroke: colour("quiet"), grid: { stroke: colour("grid"), width: 1 }, ticks: { show: false }, font: "11px system-ui" };
    this.plot = new uPlot(
      {
        width: this.element.clientWidth,
        height: this.element.clientHeight,
        padding: this.axes ? [8, 8, 0, 0] : [3, 2, 3, 2],
        cursor: { show: this.axes, y: false, points: { size: 6 } },
        legend: { show: false },
        scales: {
          x: { time: true, range: () => this.range },
          y: this.log
            ? { distr: 3, range: (_, low, high) => [(low || 0.1) / 1.5, (high || 1) * 1.5] }
            : { range: (_, low, high) => padded(low, high, this.axes) },
        },
        axes: this.axes
          ? [{ ...axis, space: 70, values: (_, ticks) => ticks.map(hour) }, { ...axis, size: 48, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : this.value(tick))) }]
          : [{ show: false }, { show: false }],
        series: [
          {},
          ...this.series.map(({ key, colour: name, dash, width = 1.6, fill }) => ({
            label: key,
            stroke: colour(name),
            width,
            dash,
            fill: fill ? `${colour(name)}22` : undefined,
            points: { show: false },
          })),
        ],
        hooks: { draw: [(plot) => this.drawMarks(plot)] },
      },
      this.data,
      this.element,
    );
  }

  drawMarks(plot) {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.strokeStyle = colour("teacher");
    ctx.setLineDash([2, 3]);
    for (const at of this.marks()) {
      const x = plot.valToPos(at, "x", true);
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }
}

function padded(low, high, axes) {
  if (low === null || low === undefined) return [0, 1];
  if (!axes) return [Math.min(0, low), high > 0 ? high * 1.1 : 1];
  const room = (high - low || Math.abs(high) || 1) * 0.08;
  return [Math.max(0, low - room), high + room];
}

function hour(seconds) {
  const at = new Date(seconds * 1_000);
  if (at.getHours() + at.getMinutes() + at.getSeconds() === 0) return at.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
  return at.toLocaleTimeString("en-GB", at.getSeconds() ? {} : { hour: "2-digit", minute: "2-digit" });
}
