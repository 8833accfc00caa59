// Begin, stay connected, keep the past, and let every part draw itself.

import { $, write } from "./dom.js";
import { clock } from "./format.js";
import * as health from "./health.js";
import * as learning from "./learning.js";
import { api, CutOff, follow, Refused } from "./net.js";
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
let letGo = false; // of the stream, on purpose
let failures = 0; // in a row
let why = ""; // it failed, where the server said so
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
  if (look.at_ms <= (past.at.at(-1) ?? 0)) return draw(); // the past has it already
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
  if (event === "failed") {
    why = data.why;
    return cutOff();
  }
  connected();
  if (event === "look") take(data);
  else if (event === "versions") {
    versions.more(data);
    learning.versions(versions.all());
  } else if (event === "missed") begin().catch(() => {});
}

function connected() {
  lastMs = Date.now();
  failures = 0;
  why = "";
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
  write($("cut"), `Cut off from Reflux's console${since}${why && `: ${why}`}. What you see is old; trying again …`);
  $("cut").hidden = false;
  document.body.classList.add("stale");
}

/** Listen first and read everything then, so that nothing is missed in between. */
async function connect(connection) {
  let early = [];
  const listening = follow("/api/stream", (event, data) => {
    if (early) early.push([event, data]);
    else hear(event, data);
  }, connection.signal);
  const ended = listening.then(() => { throw new CutOff("the stream ended"); });
  await Promise.race([begin(), ended]);
  for (const [event, data] of early) hear(event, data);
  early = null;
  await listening;
}

async function stayConnected() {
  for (;;) {
    if (document.hidden && letGo) await visible();
    letGo = false;
    connection = new AbortController();
    try {
      await connect(connection);
    } catch (error) {
      if (error instanceof Refused) why = error.message;
      else if (!(error instanceof CutOff) && error.name !== "AbortError") console.error(error);
    }
    connection.abort(); // what is still open
    if (letGo) continue;
    cutOff();
    failures += 1;
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS[Math.min(failures, RETRY_MS.length) - 1]));
  }
}

const visible = () => new Promise((resolve) => {
  document.addEventListener("visibilitychange", resolve, { once: true });
});

function release() {
  letGo = true;
  connection?.abort();
}

let hiding = null;
document.addEventListener("visibilitychange", () => {
  clearTimeout(hiding);
  if (document.hidden) hiding = setTimeout(release, HIDDEN_MS);
  else draw();
});
$("range").addEventListener("change", () => readPast().then(draw, () => {}));

now.start();
learning.start();
versions.start();
trying.start();
stayConnected();
