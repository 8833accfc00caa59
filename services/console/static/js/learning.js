// How good the models are over the stream, and what the student's loss is made of.

import { Chart } from "./charts.js";
import { $, facts, h, renew } from "./dom.js";
import { ago, count, digits, missing, percent, score } from "./format.js";

const MODELS = [
  { key: "student", name: "student, distilled and serving", width: 2.4 },
  { key: "teacher", name: "teacher, refreshed", width: 1.8 },
  { key: "stale_teacher", name: "teacher, stale first one", dash: [6, 4] },
  { key: "frozen_student", name: "student, frozen at the start", dash: [3, 3] },
  { key: "popularity", name: "popularity" },
];
const LOSSES = [
  { key: "hard", name: "what happened", colour: "student" },
  { key: "soft", name: "teacher's soft labels", colour: "teacher" },
  { key: "hidden", name: "teacher's hidden state", colour: "hidden" },
];

let quality, losses;
let teachers = [];

export function start() {
  quality = new Chart($("quality-chart"), {
    label: "NDCG@10 of each model over the chosen time; the table below has the numbers",
    value: (v) => score(v).slice(0, 4),
    marks: () => teachers,
    series: MODELS.map(({ key, ...look }) => ({ key: `quality.${key}`, colour: key, ...look })),
  });
  losses = new Chart($("loss-chart"), {
    label: "Terms of the student's loss over the chosen time",
    value: digits,
    log: true,
    series: LOSSES.map(({ key, colour: name }) => ({ key: `loss.${key}`, colour: name })),
  });
}

export function versions(rows) {
  teachers = rows.filter((row) => row.kind === "teacher" && row.promoted).map((row) => row.created_ms / 1_000);
}

export function look(now) {
  const shown = MODELS.filter(({ key }) => !missing(now.metrics[`stream.${key}.ndcg@10`]) || !missing(now.quality[key]));
  const rows = shown.map(({ key, name }) => h("tr", { class: key === "student" ? "main" : null, "data-model": key },
    h("th", { scope: "row" }, swatch(key), name),
    h("td", {}, score(now.quality[key])),
    h("td", {}, score(now.metrics[`stream.${key}.ndcg@10`])),
    h("td", {}, score(now.metrics[`stream.${key}.hr@10`])),
  ));
  renew($("quality-table").tBodies[0], rows.length ? rows : [h("tr", {}, h("td", { colspan: 4, class: "quiet" }, "no live event has been predicted yet"))]);
  facts($("ratios"), [
    ["Retention", percent(now.retention), "student / teacher, whole stream"],
    ["Teacher's age", missing(now.teacher_age_events) ? "–" : `${count(now.teacher_age_events)} events`, now.teacher_created_ms ? ago(now.teacher_created_ms, now.at_ms) : null],
    ["Trust in its labels", percent(now.teacher_trust), null],
    ["Learning rate", missing(now.learning_rate) ? "–" : String(now.learning_rate), null],
    ["Events of the stream", count(now.metrics["stream.events"]), null],
  ]);
  const present = LOSSES.filter(({ key }) => !missing(now.loss[key]));
  renew($("loss-legend"), present.map(({ key, name, colour: c }) => h("span", {}, swatch(c), `${name} ${digits(now.loss[key])}`)));
}

export function draw(past, range) {
  quality.set(past, range);
  losses.set(past, range);
}

function swatch(name) {
  const mark = h("i", { class: "swatch", "aria-hidden": "true" });
  mark.style.background = `var(--${name})`;
  return mark;
}
