// Puts the page together: views, panels, keyboard, theme, API key and the state of the server.

import { key, request } from "./api.js";
import { Chat } from "./chat.js";
import { DEFAULT_SETTINGS } from "./conversation.js";
import { byId, element, notify } from "./dom.js";
import { ServerView } from "./server.js";
import { SettingsPanel, summary } from "./settings.js";
import { Store } from "./store.js";

const LOADING_POLL_MS = 1000;
const CHECK_MS = 10_000; // while the page is visible
const NARROW = window.matchMedia("(max-width: 60rem)");
const SUGGESTIONS = {
  demonstration: ["Tell me a story about a dog and a ball.", "Tell me a story about a little bird who could not fly."],
  model: ["What can you help me with?", "Explain a state space model to a programmer.", "Write a haiku about rivers."],
};

key.load();
const store = new Store((problem) => notify(problem));
let model = null; // the first model of /v1/models

const settings = new SettingsPanel(onSettings, () => chat.export());
const chat = new Chat(store, {
  settingsOf: () => ({ ...DEFAULT_SETTINGS, ...store.settings() }),
  onopen: (conversation) => showSettings(conversation),
  onkey: askForKey,
  welcome,
});
const server = new ServerView(askForKey);

// Settings -------------------------------------------------------------------------------------------------------------

function showSettings(conversation) {
  conversation.settings = { ...DEFAULT_SETTINGS, ...conversation.settings };
  settings.show(conversation.settings);
  byId("active-settings").textContent = summary(conversation.settings);
}

/** New conversations begin with the settings that were used last. */
function onSettings(values) {
  byId("active-settings").textContent = summary(values);
  store.saveSettings(values);
  chat.save();
}

// The message box ------------------------------------------------------------------------------------------------------

const input = byId("input");

function send() {
  if (!chat.send(input.value)) return;
  input.value = "";
  closePanels();
  input.focus();
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("stop").addEventListener("click", () => {
  chat.stop();
  input.focus();
});
input.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || byId("key-dialog").open) return;
  if (NARROW.matches && anyPanelOpen()) closePanels();
  else chat.stop();
});

function welcome() {
  const texts = model?.demonstration ? SUGGESTIONS.demonstration : SUGGESTIONS.model;
  const suggestion = (text) => element("button", { type: "button", onclick: () => {
    input.value = text;
    send();
  } }, text);
  const context = model && `Up to ${model.max_model_len.toLocaleString("en")} tokens per conversation. `;
  return element("div", { class: "welcome" },
    element("h2", {}, model ? model.id : "jamba-server"),
    element("p", {}, model?.description ? `This is the ${model.description}. ` : "", context ?? "",
      "The server saves its state after each turn, so a follow-up question or an edited turn costs only what is new."),
    element("div", { class: "suggestions" }, texts.map(suggestion)));
}

// Panels and views -----------------------------------------------------------------------------------------------------

const PANELS = { list: byId("list-toggle"), settings: byId("settings-toggle") };
const isOpen = (name) => !document.body.classList.contains(`no-${name}`);
const anyPanelOpen = () => Object.keys(PANELS).some(isOpen);

function openPanel(name, open) {
  document.body.classList.toggle(`no-${name}`, !open);
  PANELS[name].setAttribute("aria-expanded", String(open));
  if (open && NARROW.matches) for (const other of Object.keys(PANELS)) if (other !== name) openPanel(other, false);
}

function closePanels() {
  if (!NARROW.matches) return;
  const focused = Object.keys(PANELS).find((name) => byId(name).contains(document.activeElement));
  for (const name of Object.keys(PANELS)) openPanel(name, false);
  if (focused) PANELS[focused].focus();
}

function arrangePanels() {
  openPanel("list", !NARROW.matches);
  openPanel("settings", window.innerWidth >= 1280);
}

for (const [name, button] of Object.entries(PANELS)) {
  button.addEventListener("click", () => {
    openPanel(name, !isOpen(name));
    if (isOpen(name) && NARROW.matches) byId(name).querySelector("button, input, textarea")?.focus();
  });
}
byId("chat").addEventListener("pointerdown", () => closePanels());
byId("conversations").addEventListener("click", () => closePanels());
NARROW.addEventListener("change", arrangePanels);

byId("new").addEventListener("click", () => {
  chat.open();
  closePanels();
  input.focus();
});

function showView() {
  const onServer = location.hash === "#server";
  document.body.classList.toggle("on-server", onServer);
  byId("chat").hidden = onServer;
  byId("composer").hidden = onServer;
  for (const name of ["chat", "server"]) {
    const current = (name === "server") === onServer;
    if (current) byId(`to-${name}`).setAttribute("aria-current", "page");
    else byId(`to-${name}`).removeAttribute("aria-current");
  }
  server.shown = onServer;
}
window.addEventListener("hashchange", showView);

// Theme ----------------------------------------------------------------------------------------------------------------

byId("theme-button").addEventListener("click", () => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)").matches;
  const shown = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
  const theme = shown === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  store.saveTheme(theme);
});

// The API key ----------------------------------------------------------------------------------------------------------

let retry = () => {};

/** Asks for a key and then calls `again`. */
function askForKey(again = null) {
  const dialog = byId("key-dialog");
  if (dialog.open) return;
  retry = again ?? (() => {});
  byId("key-reason").textContent = again
    ? key.value ? "The server refused this key." : "This server asks for a key."
    : "The page sends it with every request, to this server only.";
  byId("key-input").value = key.value;
  byId("key-remember").checked = key.remembered;
  dialog.showModal();
}

byId("key-button").addEventListener("click", () => askForKey());
byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());
byId("key-form").addEventListener("submit", () => {
  key.set(byId("key-input").value, byId("key-remember").checked);
  setTimeout(() => { // after the dialog has closed, because the retry may open it again
    void readModels();
    retry();
  });
});

// The state of the server ----------------------------------------------------------------------------------------------

function showState(state, text) {
  byId("state").dataset.state = state;
  byId("state-text").textContent = text;
}

/** Asks for the server's state again and again while the page is visible, more often while the model loads. */
async function watchState() {
  let delay = CHECK_MS;
  if (!document.hidden) {
    try {
      const response = await fetch(new URL("../health", import.meta.url), { cache: "no-store" });
      const health = await response.json();
      if (health.status === "loading") {
        delay = LOADING_POLL_MS;
        showState("loading", `loading: ${health.phase}, ${Math.round(100 * health.fraction)} %`);
      } else if (response.ok) {
        if (!model) await readModels();
        showState(health.reason ? "loading" : "ready", health.reason ?? model?.id ?? "ready");
      } else {
        showState("dead", health.reason ?? "the engine has stopped");
      }
    } catch {
      showState("dead", "no connection");
      delay = LOADING_POLL_MS;
    }
  }
  setTimeout(watchState, delay);
}

/** Reads the names of the models. Without a valid key they stay unknown until a request needs them. */
async function readModels() {
  try {
    const { data } = await (await request("v1/models")).json();
    [model] = data;
    settings.setModels(data.map(({ id }) => id), model.max_model_len);
    showState("ready", model.id);
    if (!document.querySelector(".turn")) chat.render();
  } catch (error) {
    if (error.status === 401) showState("ready", "needs a key");
  }
}

// Start ----------------------------------------------------------------------------------------------------------------

// Browsers break off replies before the event "pagehide".
window.addEventListener("beforeunload", () => chat.leave());
window.addEventListener("pagehide", () => chat.leave());
window.addEventListener("storage", (event) => Store.concerns(event) && chat.reload());
arrangePanels();
chat.open(chat.current);
showView();
void watchState();
if (!NARROW.matches && location.hash !== "#server") input.focus();
