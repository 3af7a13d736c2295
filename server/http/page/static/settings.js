// The panel with the settings of the conversation. An empty field is left out of requests, so the server's default applies.

import { DEFAULT_SETTINGS, parseJson } from "./conversation.js";
import { byId, element, iconButton } from "./dom.js";

const SLIDERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, middle: 1 },
  { name: "topP", label: "Top p", min: 0.01, max: 1, step: 0.01, middle: 1 },
  { name: "maxTokens", label: "Maximum tokens", min: 1, max: 4096, step: 1, middle: 1024 },
];
const BOXES = [
  {
    name: "schema",
    label: "JSON schema",
    note: "The reply follows the schema exactly.",
    example: {
      type: "object",
      properties: { name: { type: "string", maxLength: 20 }, age: { type: "integer", minimum: 0, maximum: 20 } },
      required: ["name", "age"],
      additionalProperties: false,
    },
  },
  {
    name: "tools",
    label: "Tools",
    note: "Functions that the model may call. You enter their results.",
    example: [{
      type: "function",
      function: {
        name: "get_weather",
        description: "The weather of a city",
        parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
      },
    }],
  },
];

/** The panel. `onchange(settings)` is called after each change. */
export class SettingsPanel {
  #settings = DEFAULT_SETTINGS;
  #models = [];
  #longest = SLIDERS[2].max; // of maximum tokens

  constructor(onchange, onexport) {
    this.onchange = onchange;
    this.onexport = onexport;
  }

  /** Says which models the server has, and how long a context may be. */
  setModels(models, longest) {
    if (this.#longest === longest && this.#models.join() === models.join()) return;
    this.#models = models;
    this.#longest = longest;
    // The other fields stay as they are: somebody may be typing in one.
    byId("model")?.closest(".field").remove();
    if (models.length > 1) byId("system").closest(".field").before(this.#modelField());
    for (const input of byId("maxTokens").closest(".field").querySelectorAll("input")) input.max = longest;
  }

  /** Shows the settings of a conversation. Changes are made in this object. */
  show(settings) {
    this.#settings = settings;
    byId("settings-fields").replaceChildren(...[
      element("h2", {}, "Settings", iconButton("export", "Export conversation as JSON", this.onexport, { text: "Export" })),
      this.#models.length > 1 && this.#modelField(),
      this.#systemField(),
      ...SLIDERS.map((slider) => this.#sliderField(slider)),
      this.#seedField(),
      ...BOXES.map((box) => this.#boxField(box)),
      element("button", { type: "button", onclick: () => this.#reset() }, "Reset to the server's defaults"),
    ].filter(Boolean));
  }

  #set(name, value) {
    this.#settings[name] = value;
    this.onchange(this.#settings);
  }

  #reset() {
    Object.assign(this.#settings, DEFAULT_SETTINGS);
    this.onchange(this.#settings);
    this.show(this.#settings);
  }

  #modelField() {
    const options = this.#models.map((name) => element("option", { value: name }, name));
    const select = element("select", { id: "model", onchange: () => this.#set("model", select.value) }, options);
    select.value = this.#settings.model || this.#models[0];
    return field("model", "Model", select);
  }

  #systemField() {
    const box = element("textarea", { id: "system", rows: 3, placeholder: "How the model should behave",
      oninput: () => this.#set("system", box.value) });
    box.value = this.#settings.system;
    return field("system", "System prompt", box);
  }

  #sliderField({ name, label, min, max, step, middle }) {
    const top = () => (name === "maxTokens" ? this.#longest : max);
    const value = this.#settings[name];
    const range = element("input", { type: "range", min, max: top(), step, "aria-label": `${label}, slider`, tabindex: -1 });
    const number = element("input", { type: "number", id: name, min, max: top(), step: name === "maxTokens" ? 1 : "any",
      placeholder: "default", inputmode: "decimal" });
    const problem = element("p", { class: "invalid", role: "alert" });
    range.value = value ?? Math.min(middle, top());
    range.classList.toggle("unset", value === null);
    number.value = value ?? "";
    range.addEventListener("input", () => {
      range.classList.remove("unset");
      number.value = range.value;
      problem.textContent = "";
      this.#set(name, Number(range.value));
    });
    number.addEventListener("input", () => {
      problem.textContent = number.checkValidity() ? "" : `From ${min} to ${top()}, or empty.`;
      if (problem.textContent) return;
      range.value = number.value === "" ? Math.min(middle, top()) : number.value;
      range.classList.toggle("unset", number.value === "");
      this.#set(name, number.value === "" ? null : Number(number.value));
    });
    return field(name, label, element("div", { class: "slider" }, range, number), problem);
  }

  #seedField() {
    const number = element("input", { type: "number", id: "seed", step: 1, placeholder: "random" });
    const problem = element("p", { class: "invalid", role: "alert" });
    number.value = this.#settings.seed ?? "";
    number.addEventListener("input", () => {
      problem.textContent = number.checkValidity() ? "" : "A whole number, or empty.";
      if (!problem.textContent) this.#set("seed", number.value === "" ? null : Number(number.value));
    });
    return field("seed", "Seed", number, element("p", { class: "small" }, "The same seed gives the same reply."), problem);
  }

  /** A box for JSON with a switch. The first time that it is switched on, it gets an example. */
  #boxField({ name, label, note, example }) {
    const isOn = this.#settings[`${name}On`];
    const toggle = element("input", { type: "checkbox", id: `${name}-on` });
    const box = element("textarea", { class: "code", rows: 9, id: name, spellcheck: "false", "aria-label": `${label}, as JSON` });
    const problem = element("p", { class: "invalid", role: "alert" });
    const body = element("div", { class: "field", hidden: !isOn }, box, problem, element("p", { class: "small" }, note));
    const check = () => {
      problem.textContent = "";
      try {
        parseJson(box.value, label);
      } catch (error) {
        problem.textContent = error.message;
      }
    };
    toggle.checked = isOn;
    box.value = this.#settings[name];
    toggle.addEventListener("change", () => {
      if (toggle.checked && !box.value.trim()) box.value = JSON.stringify(example, null, 2);
      body.hidden = !toggle.checked;
      this.#settings[name] = box.value;
      this.#set(`${name}On`, toggle.checked);
      check();
    });
    box.addEventListener("input", () => (check(), this.#set(name, box.value)));
    if (isOn) check();
    return element("div", { class: "field" },
      element("label", { class: "check", for: `${name}-on` }, toggle, label), body);
  }
}

function field(id, label, ...controls) {
  return element("div", { class: "field" }, element("label", { for: id }, label), ...controls);
}

/** Returns the settings that differ from the defaults, in a few words. */
export function summary(settings) {
  const named = [["temperature", "temperature"], ["topP", "top p"], ["maxTokens", "max tokens"], ["seed", "seed"]];
  const words = named.filter(([name]) => settings[name] !== null).map(([name, word]) => `${word} ${settings[name]}`);
  if (settings.system.trim()) words.unshift("system prompt");
  if (settings.schemaOn) words.push("JSON schema");
  if (settings.toolsOn) words.push("tools");
  return words.join(" · ");
}
