// The few things that every part of the page does with the document.

export const $ = (id) => document.getElementById(id);

/** An element with attributes (functions are listeners) and children. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Write only what differs: nothing is laid out anew, and no screen reader is told, for nothing. */
export function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Make `parent` hold exactly these children. */
export function replace(parent, children) {
  parent.replaceChildren(...children);
}

const last = new WeakMap();

/** The same, unless they are what is there already: a selection, or a button with the focus, stays. */
export function renew(parent, children) {
  const now = children.map((child) => child.outerHTML).join("");
  if (last.get(parent) === now) return;
  last.set(parent, now);
  replace(parent, children);
}

/** Fill a definition list: [name, value, a word more]. */
export function facts(list, rows) {
  renew(list, rows.flatMap(([name, value, more]) => [
    h("dt", {}, name), h("dd", {}, value, more ? h("small", {}, more) : null)]));
}

export function toast(text, { bad = false } = {}) {
  const box = h("p", { class: bad ? "toast bad" : "toast" }, text);
  $("toasts").append(box);
  setTimeout(() => box.remove(), bad ? 9_000 : 5_000);
}

/** Ask before something happens; resolves to whether it may. */
export function confirm({ title, text, yes }) {
  const dialog = $("confirm");
  write($("confirm-title"), title);
  write($("confirm-text"), text);
  write($("confirm-yes"), yes);
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

/** Show something large; `onClose` ends what keeps it up to date. */
export function detail(title, body, onClose = () => {}) {
  const dialog = $("detail");
  write($("detail-title"), title);
  replace($("detail-body"), [body]);
  if (!dialog.open) dialog.showModal();
  dialog.addEventListener("close", onClose, { once: true });
}
