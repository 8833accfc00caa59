// The catalog, and the processes with their logs.

import { $, detail, facts, h, renew, replace, toast, write } from "./dom.js";
import { count, missing, percent } from "./format.js";
import { api } from "./net.js";

const LOG_EVERY_MS = 2_000;
const JOBS_EVERY_MS = 10_000;
const NEWEST_EVERY_MS = 60_000;

let mayOperate = false;
let logs = new Set();
let jobs = [];
let trouble = ""; // why nobody knows the jobs
let now = null;
let jobsAt = 0;
let newestAt = 0;
let grown = null; // items at the beginning of the chosen time

export async function begin(roles) {
  mayOperate = roles.includes("operate");
  jobsAt = newestAt = 0;
  logs = new Set(await api("/api/logs").catch(() => []));
}

export function look(found) {
  now = found;
  const gained = missing(now.items) || missing(grown) ? null : now.items - grown;
  facts($("catalog"), [
    ["Items that can be answered with", count(now.items), missing(gained) ? null : `${count(Math.max(0, gained))} new in the chosen time`],
    ["Coverage", percent(now.item_coverage), "of the catalog shown in ten minutes"],
    ["Cold items", percent(now.recent.cold_share), "of the places in answers, last five minutes"],
    ["Popularity concentration", percent(now.recent.popular_share), "of the places go to the most popular tenth"],
  ]);
  processes();
  const at = Date.now();
  if (at - jobsAt > JOBS_EVERY_MS) {
    jobsAt = at;
    api("/api/jobs").then(
      (list) => { [jobs, trouble] = [list, ""]; processes(); },
      (error) => { [jobs, trouble] = [[], error.message]; processes(); },
    );
  }
  if (at - newestAt > NEWEST_EVERY_MS && !missing(now.student_version)) {
    newestAt = at;
    api("/api/try/newest").then(newest, () => {});
  }
}

export function draw(past) {
  grown = (past.series.items ?? []).find((value) => !missing(value)) ?? null;
}

function newest({ items }) {
  if (!items.length) return;
  replace($("newest"), items.map((item) => h("li", {},
    h("span", {}, item.title ?? item.item_id),
    h("small", {}, item.popularity < 5 ? "cold" : `${count(item.popularity)} recent`))));
}

function processes() {
  if (!now) return;
  const lines = [];
  for (const [name, runs] of Object.entries(now.processes)) {
    const restarts = now.restarts[name] ?? 0;
    lines.push(line(name, runs, restarts ? `${restarts} restarts` : "", logs.has(name) ? `/api/logs/${encodeURIComponent(name)}` : null));
  }
  for (const job of jobs) {
    const ok = job.status === "RUNNING" || job.status === "SUCCEEDED" || job.status === "PENDING";
    lines.push(line(`job ${job.name}`, ok, job.status.toLowerCase(), `/api/jobs/${encodeURIComponent(job.id)}/log`));
  }
  if (trouble) lines.push(line("jobs", false, trouble, null));
  for (const name of ["supervisor", "deploy"]) {
    if (logs.has(name)) lines.push(line(name, null, "", `/api/logs/${name}`));
  }
  if (!Object.keys(now.processes).length) {
    for (const [url, answers] of Object.entries(now.endpoints)) lines.push(line(url, answers, "", null));
  }
  renew($("process-table").tBodies[0], lines);
}

function line(name, runs, more, log) {
  const state = runs === null ? "" : runs ? h("span", { class: "tag good" }, "● runs") : h("span", { class: "tag bad" }, "down");
  return h("tr", { "data-process": name },
    h("th", { scope: "row" }, name),
    h("td", {}, state, more ? ` ${more}` : ""),
    h("td", { class: "actions" }, log ? h("button", { type: "button", class: "small", "data-log": log, disabled: !mayOperate, click: () => showLog(name, log), "aria-label": `Log of ${name}` }, "Log") : ""));
}

function showLog(name, path) {
  const text = h("pre", { tabindex: 0, role: "log", "aria-live": "off", "aria-label": `The end of ${name}'s log` }, "…");
  const load = async () => {
    try {
      const found = await api(path);
      const follows = text.scrollTop + text.clientHeight > text.scrollHeight - 30;
      write(text, found.text || "nothing yet");
      if (follows) text.scrollTop = text.scrollHeight;
    } catch (error) {
      toast(error.message, { bad: true });
      clearInterval(timer);
    }
  };
  const timer = setInterval(load, LOG_EVERY_MS);
  detail(`Log of ${name}`, text, () => clearInterval(timer));
  load().then(() => { text.scrollTop = text.scrollHeight; });
}
