// Builds DOM nodes. A string always becomes a text node: no function of this page reads text as HTML.

const SVG = "http://www.w3.org/2000/svg";

/**
 * Returns a new element.
 *
 * Attributes whose value is a function are event listeners, named like "onclick". The values true, false and null set
 * an empty attribute or none. Children are nodes, strings, and lists of both; null and false are left out.
 */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, String(value));
  }
  node.append(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** Returns an icon: a reference to one of the symbols in index.html. It is hidden from screen readers. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** Returns a button that shows an icon and, unless `text` is empty, a text beside it. `label` is its accessible name. */
export function iconButton(name, label, onclick, { text = "", ...attributes } = {}) {
  const named = text === label ? {} : { "aria-label": label, title: label };
  return element("button", { type: "button", class: text ? "quiet" : "quiet square", onclick, ...named, ...attributes },
    icon(name), text && element("span", {}, text));
}

/** Returns an SVG element with attributes. */
export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  node.append(...children);
  return node;
}

/** Returns the element with an id. The id is in index.html. */
export const byId = (id) => document.getElementById(id);

/** Copies a text and shows on the button for a moment that it was copied, or that the browser refused. */
export async function copy(text, button) {
  const label = button.querySelector("span");
  const before = label ? label.textContent : button.getAttribute("aria-label");
  let said = "Copied";
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    said = copyBySelection(text) ? "Copied" : "Not allowed";
  }
  say(said);
  if (button.classList.contains("done")) return; // it still says so
  button.classList.add("done");
  if (label) label.textContent = said;
  setTimeout(() => {
    button.classList.remove("done");
    if (label) label.textContent = before;
  }, 1500);
}

/** Copies a text in the way that also works on pages without HTTPS, where browsers have no clipboard API. */
function copyBySelection(text) {
  const area = element("textarea", { class: "hidden", readonly: true, "aria-hidden": "true" });
  const focused = document.activeElement;
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return copied;
}

/** Lets screen readers say a text. */
export function say(text) {
  byId("status").textContent = text;
}

let noticeTimer = 0;

/** Shows a message at the bottom of the page. With `action`, it has a button: {label, run}. `seconds` 0 means until it is
 * closed. */
export function notify(text, { action = null, seconds = 0 } = {}) {
  const box = byId("notice");
  const close = () => {
    box.replaceChildren();
    box.hidden = true;
  };
  clearTimeout(noticeTimer);
  box.replaceChildren(
    element("p", {}, text),
    action ? element("button", { type: "button", onclick: () => (close(), action.run()) }, action.label) : "",
    iconButton("close", "Close this message", close),
  );
  box.hidden = false;
  if (seconds) noticeTimer = setTimeout(close, 1000 * seconds);
}

/** Downloads a text as a file. */
export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
