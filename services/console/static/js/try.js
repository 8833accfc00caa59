// Try it: be a user, see three answers side by side, click, see the answer change.

import { $, h, replace, write } from "./dom.js";
import { count, digits, missing, time } from "./format.js";
import { api } from "./net.js";

const LISTS = [
  { key: "student", name: "Student" },
  { key: "teacher", name: "Teacher" },
  { key: "trending", name: "Trending" },
];

let user = null; // null: an anonymous session
let session = []; // what was clicked in it, oldest first
let before = []; // the student's items before the click
let busy = false;
let asked = 0; // answers to an older question are dropped

export function start() {
  replace($("lists"), LISTS.map(({ key, name }) => h("div", { class: `of-${key}`, id: `list-${key}` },
    h("h3", {}, name, h("small", {})), h("ol", { "aria-label": `${name}'s recommendations` }))));
  $("whom").addEventListener("submit", (event) => {
    event.preventDefault();
    const id = $("user").value.trim();
    if (id) become(id);
  });
  $("somebody").addEventListener("click", somebody);
  $("anonymous").addEventListener("click", () => become(null));
  $("user").addEventListener("focus", knownUsers, { once: true });
}

async function knownUsers() {
  try {
    const { users } = await api("/api/try/users");
    replace($("users"), users.map((id) => h("option", { value: id })));
    return users;
  } catch {
    return [];
  }
}

async function somebody() {
  say("looking who was here lately …");
  const users = await knownUsers();
  const others = users.filter((id) => id !== user);
  if (!others.length) return say("nobody has been here yet: type any id, or start an anonymous session", { bad: true });
  $("user").value = others[Math.floor(Math.random() * Math.min(others.length, 12))];
  await become($("user").value);
}

async function become(id) {
  user = id;
  session = [];
  before = [];
  if (id === null) $("user").value = "";
  await answers();
}

const whom = () => ({ ...(user === null ? {} : { user_id: user }), recent_items: session });

/** Ask student and trending, then the teacher, who may have to be loaded. */
async function answers() {
  const mine = ++asked;
  say("asking …");
  try {
    const found = await api("/api/try/answers", whom());
    if (mine !== asked) return;
    show(found);
    const kind = found.student.fallback ? "nothing is known of them: trending" : `${count(found.history?.n_events ?? session.length)} events known`;
    say(user === null ? `An anonymous session, ${session.length ? `${session.length} items seen` : "nothing seen yet: click something"}.` : `${user}: ${kind}.`);
  } catch (error) {
    return say(error.message, { bad: true });
  }
  await teacher(mine);
}

async function teacher(mine) {
  const note = $("list-teacher").querySelector("small");
  write(note, "being asked (loaded at first) …");
  try {
    const found = await api("/api/try/teacher", whom());
    if (mine !== asked) return;
    list("teacher", found.items, `version ${found.version}, ${time(found.ms)}`);
    mark();
  } catch (error) {
    if (mine === asked) list("teacher", [], error.message);
  }
}

async function click(item) {
  if (busy) return;
  busy = true;
  lock(true);
  const mine = ++asked;
  before = ids("student");
  const title = item.title ?? item.item_id;
  try {
    if (user === null) {
      session = [...session, item.item_id];
      const began = performance.now();
      const found = await api("/api/try/answers", whom());
      show(found);
      news([`You saw `, h("b", {}, title), `. The answer changed in `, h("b", {}, time(performance.now() - began)), ": it travels with the request."]);
    } else {
      say(`${user} does this with ${title} …`);
      const type = $("event-type").value;
      const found = await api("/api/try/click", { user_id: user, item_id: item.item_id, type });
      show({ ...found, trending: null });
      const features = missing(found.known_ms)
        ? "; features still don't (see the feature worker's lag and log). The answer came after "
        : `, features after ${time(found.known_ms)}, and the answer that knows it came after `;
      news([`${user}: ${type} on `, h("b", {}, title), `. Kafka had it after ${time(found.accepted_ms)}${features}`, h("b", {}, time(found.answered_ms)), "."]);
    }
  } catch (error) {
    say(error.message, { bad: true });
  } finally {
    busy = false;
    lock(false);
  }
  await teacher(mine);
}

function show({ student, trending, history }) {
  const versions = missing(student.teacher_version) ? "" : ` of teacher ${student.teacher_version}`;
  list("student", student.items, `version ${student.model_version}${versions}, ${time(student.ms)}${student.degraded ? ", degraded" : ""}`);
  if (trending) list("trending", trending.items, time(trending.ms));
  recent(history);
  mark();
}

function list(key, items, note) {
  const box = $(`list-${key}`);
  write(box.querySelector("small"), note);
  const places = new Map(before.map((id, place) => [id, place]));
  replace(box.querySelector("ol"), items.map((item, place) => h("li", { "data-item": item.item_id },
    h("span", { class: "place" }, String(place + 1)),
    h("button", { class: "item", type: "button", click: () => click(item), title: `score ${digits(item.score)}` },
      h("span", {}, item.title ?? item.item_id), h("small", {}, (item.categories ?? []).join(", ") || "\u00a0")),
    key === "student" && before.length ? moved(places.get(item.item_id), place) : "")));
}

function moved(was, is) {
  if (was === undefined) return h("span", { class: "moved new" }, "new");
  if (was === is) return h("span", { class: "moved" }, "");
  return was > is
    ? h("span", { class: "moved up", "aria-label": `up ${was - is}` }, `↑ ${was - is}`)
    : h("span", { class: "moved", "aria-label": `down ${is - was}` }, `↓ ${is - was}`);
}

/** A dot beside what the teacher would recommend as well. */
function mark() {
  const theirs = new Set(ids("teacher"));
  for (const line of $("list-student").querySelectorAll("li")) {
    line.querySelector(".both")?.remove();
    if (theirs.has(line.dataset.item)) line.append(h("span", { class: "both", role: "img", "aria-label": "also the teacher's", title: "also the teacher's" }));
  }
  const shared = ids("student").filter((id) => theirs.has(id)).length;
  if (theirs.size) $("list-student").querySelector("h3").title = `${shared} of them also the teacher's`;
}

function recent(history) {
  const box = $("recent-events");
  const now = Date.now();
  const events = history?.events ?? session.map((item_id) => ({ item_id, type: "seen", timestamp: now })).reverse();
  box.hidden = !events.length;
  if (!events.length) return;
  replace(box, [h("span", {}, "latest first:"), ...events.slice(0, 20).map((event) =>
    h("span", { class: now - event.timestamp < 20_000 ? "chip fresh" : "chip" }, event.title ?? event.item_id,
      h("small", {}, missing(event.value) ? event.type : `${event.type} ${event.value}`)))]);
}

const ids = (key) => [...$(`list-${key}`).querySelectorAll("li")].map((line) => line.dataset.item);

function lock(on) {
  for (const button of $("lists").querySelectorAll("button")) button.disabled = on;
}

function say(text, { bad = false } = {}) {
  const box = $("try-news");
  box.classList.toggle("bad", bad);
  write(box, text);
}

function news(parts) {
  $("try-news").classList.remove("bad");
  replace($("try-news"), parts);
}
