// The timeline of versions, their table, and what an operator may do with them.

import { $, confirm, detail, facts, h, replace, toast, write } from "./dom.js";
import { ago, clock, count, missing, score } from "./format.js";
import { api } from "./net.js";

const PAGE = 8;
const SVG = "http://www.w3.org/2000/svg";
const KEPT = 1_000;

const rows = { student: [], teacher: [] };
let serving = {};
let mayOperate = false;
let shown = PAGE;
let kind = "student";

export function start() {
  for (const input of document.querySelectorAll('input[name="kind"]')) {
    input.addEventListener("change", () => {
      kind = input.value;
      shown = PAGE;
      table();
    });
  }
  $("only-rejected").addEventListener("change", table);
  $("more-versions").addEventListener("click", () => {
    shown += 3 * PAGE;
    table();
  });
  $("roll-back").addEventListener("click", rollBack);
  $("release").addEventListener("click", release);
}

/** Everything anew. */
export function begin(versions, roles) {
  rows.student = versions.rows.student;
  rows.teacher = versions.rows.teacher;
  serving = versions.serving;
  mayOperate = roles.includes("operate");
  table();
}

/** What has come since. */
export function more(fresh) {
  for (const row of fresh.rows) {
    const known = rows[row.kind];
    if (known.some((one) => one.version === row.version && one.created_ms === row.created_ms)) continue;
    if (known.length && row.version <= known.at(-1).version) known.length = 0; // begun anew
    known.push(row);
    if (known.length > KEPT) known.shift();
  }
  serving = fresh.serving;
  table();
}

export const all = () => [...rows.teacher, ...rows.student];

function table() {
  const onlyRejected = $("only-rejected").checked;
  const now = serving[kind];
  const wanted = rows[kind].filter((row) => !onlyRejected || !row.promoted).reverse();
  const body = $("version-table").tBodies[0];
  replace(body, wanted.slice(0, shown).map((row) => line(row, now)));
  if (!wanted.length) body.append(h("tr", {}, h("td", { colspan: 9, class: "quiet" }, onlyRejected ? "the gate has kept none back" : "none published yet")));
  $("more-versions").hidden = wanted.length <= shown;
  const say = $("serves");
  if (now) {
    replace(say, [h("b", {}, `${kind} ${now.version}`), kind === "student" ? " answers" : " teaches", now.held ? h("span", { class: "tag warn" }, "held by hand") : ""]);
  } else write(say, `no ${kind} serves yet`);
  const earlier = now?.history.some((one) => one.version !== now.version);
  $("roll-back").disabled = !mayOperate || !earlier;
  $("release").hidden = !now?.held;
  $("release").disabled = !mayOperate;
  $("roll-back").title = mayOperate ? "" : "needs a key with the role operate";
}

function line(row, now) {
  const serves = now?.version === row.version;
  const quality = row["window.student.ndcg@10"] ?? row["slice.teacher.ndcg@10"];
  const against = row["window.teacher.ndcg@10"] ?? row["slice.parent.ndcg@10"];
  const promote = h("button", { type: "button", class: "small", disabled: !mayOperate || serves, click: () => promoteIt(row), "aria-label": `Promote ${row.kind} ${row.version}` }, "Promote …");
  return h("tr", { class: serves ? "serving" : null, "data-version": row.version },
    h("td", {}, h("button", { type: "button", class: "linklike", click: () => show(row), "aria-label": `${row.kind} ${row.version}, details` }, String(row.version)),
      serves ? h("span", { class: "tag" }, row.kind === "student" ? "answers" : "teaches") : ""),
    h("td", {}, clock(row.created_ms)),
    h("td", {}, missing(row.parent) ? "–" : String(row.parent)),
    h("td", {}, missing(row.teacher) ? "–" : String(row.teacher)),
    h("td", { class: "n" }, count(row.events)),
    h("td", { class: "n" }, score(quality)),
    h("td", { class: "n" }, score(against)),
    h("td", { class: "word" }, row.promoted ? h("span", { class: "tag good" }, "✓ ") : h("span", { class: "tag bad" }, "kept back"), " ", row.reason),
    h("td", { class: "actions" }, promote));
}

async function show(row) {
  const body = h("div", {}, "…");
  detail(`${row.kind} ${row.version}`, body);
  try {
    const manifest = await api(`/api/versions/${row.kind}/${row.version}`);
    const lineage = h("dl", { class: "facts" });
    facts(lineage, [
      ["Published", `${clock(manifest.created_ms)}`, ago(manifest.created_ms)],
      ["Gate", manifest.gate?.promoted ? "promoted" : "kept back", manifest.gate?.reason],
      ["Came after", missing(manifest.parent) ? "–" : `${row.kind} ${manifest.parent}`, null],
      ["Learned from", missing(manifest.teacher_version) ? "–" : `teacher ${manifest.teacher_version}`, null],
      ["Code", manifest.code_version, null],
    ]);
    const metrics = Object.entries(manifest.metrics).map(([name, value]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", { class: "n" }, Number.isInteger(value) ? count(value) : score(value))));
    const raw = h("details", {}, h("summary", {}, "The whole manifest"), h("pre", { tabindex: 0 }, JSON.stringify(manifest, null, 1)));
    replace(body, [lineage, h("table", { class: "figures" }, h("tbody", {}, ...metrics)), raw]);
  } catch (error) {
    write(body, error.status === 404 ? "This version has been pruned: the registry keeps the newest." : error.message);
  }
}

/** `now`: what served when it was decided. */
async function change(action, now, done, version = null) {
  try {
    const { version: serves } = await api("/api/versions", { action, kind, version, held: now?.held ? now.version : null });
    toast(done(serves));
  } catch (error) {
    toast(error.message, { bad: true });
  }
}

async function promoteIt(row) {
  const now = serving[kind];
  const yes = await confirm({
    title: `Promote ${kind} ${row.version}?`,
    text: `It takes over from ${kind} ${now?.version ?? "none"} at once and is held: newer ones are published, but wait until you release it.${row.promoted ? "" : ` The gate kept it back: ${row.reason}`}`,
    yes: `Promote ${row.version}`,
  });
  if (yes) await change("promote", now, (version) => `${kind} ${version} serves and is held`, row.version);
}

async function rollBack() {
  const now = serving[kind];
  const earlier = now.history.filter((one) => one.version !== now.version).at(-1);
  const yes = await confirm({
    title: `Roll back ${kind} ${now.version}?`,
    text: `${kind} ${earlier.version}, which served before, takes over at once and is held: newer ones wait until you release it.`,
    yes: `Roll back to ${earlier.version}`,
  });
  if (yes) await change("roll_back", now, (version) => `${kind} ${version} serves again and is held`, earlier.version);
}

async function release() {
  const now = serving[kind];
  const yes = await confirm({
    title: `Release ${kind} ${now.version}?`,
    text: "Newer versions that pass the gate will serve again.",
    yes: "Release",
  });
  if (yes) await change("release", now, () => `newer ${kind}s that pass the gate will serve`);
}

/** Two lanes over the chosen time. */
export function draw([from, to]) {
  const box = $("timeline");
  const width = box.clientWidth;
  if (!width) return;
  const left = 62;
  const at = (ms) => left + ((width - left - 10) * (ms - from)) / (to - from);
  const picture = document.createElementNS(SVG, "svg");
  const add = (tag, attributes, text) => {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text) element.textContent = text;
    picture.append(element);
    return element;
  };
  for (const [lane, y] of [["teacher", 24], ["student", 66]]) {
    add("text", { x: 0, y: y + 4 }, `${lane}s`);
    add("line", { class: "lane", x1: left, x2: width, y1: y, y2: y });
    for (const row of rows[lane]) {
      if (row.created_ms < from) continue;
      const x = at(row.created_ms).toFixed(1);
      const size = lane === "teacher" ? 6 : 4.5;
      const serves = serving[lane]?.version === row.version;
      const mark = row.promoted && lane === "student"
        ? add("rect", { class: "student promoted", x: x - 0.8, y: y - 7, width: 1.6, height: 14 })
        : row.promoted
        ? add("circle", { class: "teacher promoted", cx: x, cy: y, r: size })
        : add("path", { class: "rejected", d: `M${x - size} ${y - size}l${2 * size} ${2 * size}m0 ${-2 * size}l${-2 * size} ${2 * size}` });
      const tip = document.createElementNS(SVG, "title");
      tip.textContent = `${lane} ${row.version}, ${clock(row.created_ms)}: ${row.reason}`;
      mark.append(tip);
      if (serves) add("circle", { class: "serving", cx: x, cy: y, r: size + 5 });
      if (lane === "teacher") add("text", { x: Number(x) - 4, y: y - 12 }, String(row.version));
    }
  }
  replace(box, [picture]);
}
