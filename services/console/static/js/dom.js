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

/** Make `parent` hold exactly these children, keeping those that are there. */
export function replace(parent, children) {
  parent.replaceChildren(...children);
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
