// Begin, stay connected, keep the past, and let every part draw itself.

import { $, write } from "./dom.js";
import { clock } from "./format.js";
import * as health from "./health.js";
import * as learning from "./learning.js";
import { api, CutOff, follow } from "./net.js";
import * as now from "./now.js";
import * as trying from "./try.js";
import * as versions from "./versions.js";

const RETRY_MS = [500, 1_000, 2_000, 3_000];
// A tab that nobody sees lets go of its stream: a browser opens six connections to one host, for
// all its tabs together.
const HIDDEN_MS = 3_000;
const SHORTEST_MS = 120_000; // that a chart shows
const REREAD_POINTS = 1_500; // live points, after which the past is read anew, thinned

let past = { at: [], series: {} };
let latest = null;
let live = 0;
let lastMs = 0; // when the server last said anything
let connection = null;
let drawing = false;

const rangeMs = () => 1_000 * Number($("range").value);

async function readPast() {
  past = await api(`/api/history?seconds=${$("range").value}`);
  live = 0;
}

async function begin() {
  const state = await api("/api/state");
  await readPast();
  versions.begin(state.versions, state.roles);
  await health.begin(state.roles);
  learning.versions(versions.all());
}

/** One look: a point more in every series, and new numbers. */
function take(look) {
  latest = look;
  past.at.push(look.at_ms);
  for (const name of new Set([...Object.keys(past.series), ...Object.keys(look.series)])) {
    past.series[name] ??= Array(past.at.length - 1).fill(null);
    past.series[name].push(look.series[name] ?? null);
  }
  while (past.at.length && past.at[0] < look.at_ms - rangeMs()) {
    past.at.shift();
    for (const column of Object.values(past.series)) column.shift();
  }
  live += 1;
  if (live > REREAD_POINTS) readPast().catch(() => {});
  draw();
}

/** Where charts begin: no earlier than what there is to show. */
function from() {
  const begin = Math.max(latest.at_ms - rangeMs(), past.at[0] ?? 0);
  return Math.min(begin, latest.at_ms - SHORTEST_MS);
}

function draw() {
  if (drawing || !latest || document.hidden) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    const range = [from(), latest.at_ms];
    now.look(latest);
    now.draw(past, range);
    learning.look(latest);
    learning.draw(past, range);
    versions.draw(range);
    health.draw(past);
    health.look(latest);
    document.body.dataset.at = latest.at_ms;
  });
}

function hear(event, data) {
  connected();
  if (event === "look") take(data);
  else if (event === "versions") {
    versions.more(data);
    learning.versions(versions.all());
  } else if (event === "missed") begin().catch(() => {});
}

function connected() {
  lastMs = Date.now();
  const link = $("link");
  if (link.className !== "link live") link.className = "link live";
  write($("link-text"), "live");
  $("cut").hidden = true;
  document.body.classList.remove("stale");
}

function cutOff() {
  $("link").className = "link lost";
  write($("link-text"), "cut off");
  const since = lastMs ? ` since ${clock(lastMs)}` : "";
  write($("cut"), `Cut off from Reflux's console${since}. What you see is old; trying again …`);
  $("cut").hidden = false;
  document.body.classList.add("stale");
}

async function stayConnected() {
  for (let failures = 0; ; failures += 1) {
    if (document.hidden && connection?.signal.aborted) await visible();
    connection = new AbortController();
    try {
      await begin();
      failures = 0;
      await follow("/api/stream", hear, connection.signal);
    } catch (error) {
      const expected = error instanceof CutOff || error.name === "AbortError";
      if (!expected) console.error(error);
    }
    if (connection.signal.aborted) continue; // let go of on purpose
    cutOff();
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS[Math.min(failures, RETRY_MS.length - 1)]));
  }
}

const visible = () => new Promise((resolve) => {
  document.addEventListener("visibilitychange", resolve, { once: true });
});

let hiding = null;
document.addEventListener("visibilitychange", () => {
  clearTimeout(hiding);
  if (document.hidden) hiding = setTimeout(() => connection?.abort(), HIDDEN_MS);
  else draw();
});
$("range").addEventListener("change", () => readPast().then(draw, () => {}));

now.start();
learning.start();
versions.start();
trying.start();
stayConnected();
