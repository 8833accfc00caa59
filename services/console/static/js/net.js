// The way to the server: requests with the key, and the stream of server-sent events.
//
// The stream is read with fetch, since EventSource can't send a key.

import { $ } from "./dom.js";

const KEY = "reflux.key"; // in sessionStorage: gone when the tab is
const SILENCE_MS = 7_000; // a look comes every two seconds

export class CutOff extends Error {}
export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

let asking = null;

function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = $("ask-key");
    const input = $("key");
    input.value = "";
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    $("key-form").addEventListener(
      "submit",
      () => {
        sessionStorage.setItem(KEY, input.value.trim());
        asking = null;
        resolve();
      },
      { once: true },
    );
    dialog.showModal();
  });
  return asking;
}

function headers(more = {}) {
  const key = sessionStorage.getItem(KEY);
  return key ? { ...more, authorization: `Bearer ${key}` } : more;
}

async function ask(path, options = {}) {
  for (;;) {
    let response;
    try {
      response = await fetch(path, { cache: "no-store", ...options, headers: headers(options.headers) });
    } catch (error) {
      if (options.signal?.aborted) throw error;
      throw new CutOff("the console doesn't answer");
    }
    if (response.status !== 401) return response;
    await askForKey();
  }
}

/** JSON from `path`; with a body, POSTed to it. Throws `CutOff` or `Refused`. */
export async function api(path, body) {
  const options = body === undefined ? {} : {
    method: "POST",
    body: JSON.stringify(body),
    headers: { "content-type": "application/json" },
  };
  const response = await ask(path, options);
  const content = await response.json().catch(() => ({}));
  if (!response.ok) {
    const detail = content.detail ?? response.statusText;
    throw new Refused(typeof detail === "string" ? detail : JSON.stringify(detail), response.status);
  }
  return content;
}

/** Calls `on(event, data)` for each event until the stream ends, fails, or falls silent. */
export async function follow(path, on, signal) {
  const end = new AbortController();
  const stop = () => end.abort();
  signal.addEventListener("abort", stop);
  let silence = setTimeout(stop, SILENCE_MS);
  try {
    const response = await ask(path, { signal: end.signal });
    if (!response.ok) throw new CutOff(`the console answered ${response.status}`);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { done, value } = await reader.read().catch(() => {
        throw new CutOff("the stream broke off");
      });
      if (done) return;
      clearTimeout(silence);
      silence = setTimeout(stop, SILENCE_MS);
      text += value;
      const blocks = text.split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const event = /^event: (.*)$/m.exec(block)?.[1];
        const data = /^data: (.*)$/m.exec(block)?.[1];
        if (event) on(event, JSON.parse(data));
      }
    }
  } finally {
    clearTimeout(silence);
    signal.removeEventListener("abort", stop);
  }
}
