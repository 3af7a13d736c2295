// Shows one turn of a conversation, and changes what is shown while the turn grows.

import { copy, element, icon, iconButton, notify } from "./dom.js";
import { codeBlock, MarkdownView } from "./markdown.js";

const FINISHES = {
  length: "reached the maximum of tokens",
  stopped: "stopped",
  interrupted: "interrupted when the page was left",
};
const WHO = { user: "You", assistant: "Reply", tool: "Result of a tool" };

/** The view of one turn. `actions` are the functions of the chat that its buttons call: edit(turn, text), again(turn),
 * branch(turn, step), result(turn, call, text), pendingCalls(turn), curl(turn). `siblings` says which of the branches is shown. */
export class TurnView {
  #parts = {};

  constructor(turn, siblings, actions) {
    this.turn = turn;
    this.siblings = siblings;
    this.actions = actions;
    this.node = element("article", { class: `turn ${turn.role}`, "aria-label": WHO[turn.role] });
    this.#build();
  }

  #build() {
    const { turn } = this;
    this.#parts = { content: element("div", { class: "content" }), footer: element("footer") };
    if (turn.role === "assistant") {
      this.#parts.content.classList.add("markdown");
      this.#parts.markdown = new MarkdownView(this.#parts.content);
      this.#parts.thoughts = element("div", { class: "text" });
      this.#parts.summary = element("summary");
      this.#parts.details = element("details", { class: "thoughts", hidden: true }, this.#parts.summary, this.#parts.thoughts);
      this.#parts.calls = element("div");
      this.#parts.failure = element("div");
    } else {
      this.#parts.content.textContent = turn.content;
    }
    const { details, content, calls, failure, footer } = this.#parts;
    const who = turn.role === "tool" && element("p", { class: "who" }, `Result of ${turn.name}`);
    this.node.replaceChildren(...[who, details, content, calls, failure, footer].filter(Boolean));
    this.update();
  }

  /** Shows the turn as it is now. */
  update() {
    if (this.turn.role === "assistant") this.#updateReply();
    if (!this.turn.streaming || !this.#parts.footer.childElementCount || this.turn.role !== "assistant") this.#updateFooter();
    else this.#parts.receipt?.replaceChildren(...receipt(this.turn));
  }

  #updateReply() {
    const { turn } = this;
    const { content, details, thoughts, summary, markdown } = this.#parts;
    if (turn.reasoning) {
      details.hidden = false;
      const thinking = turn.streaming && !turn.content && !turn.calls;
      const tokens = turn.stats?.thoughts ? ` · ${plural(turn.stats.thoughts, "token")}` : "";
      summary.textContent = (thinking ? "Thinking…" : "Thoughts") + tokens;
      thoughts.textContent = turn.reasoning;
    }
    content.classList.toggle("waiting", Boolean(turn.streaming && !turn.content && !turn.reasoning && !turn.calls));
    content.classList.toggle("streaming", Boolean(turn.streaming && turn.content));
    content.hidden = !turn.content && !turn.streaming;
    const json = turn.json && !turn.streaming && prettyJson(turn.content);
    if (json) content.replaceChildren(codeBlock(json, "json"));
    else markdown.update(turn.json ? `\`\`\`json\n${turn.content}` : turn.content);
    this.#updateCalls();
    this.#updateFailure();
  }

  #updateCalls() {
    const { turn } = this;
    const { calls } = this.#parts;
    if (!turn.calls) return;
    const pending = this.actions.pendingCalls(turn);
    const state = JSON.stringify([turn.calls, ...pending]);
    if (this.#parts.callsState === state) return;
    this.#parts.callsState = state;
    calls.replaceChildren(...turn.calls.map((call) => this.#callCard(call, pending.has(call.id))));
  }

  #callCard(call, pending) {
    const text = prettyJson(call.arguments) ?? call.arguments;
    const box = element("textarea", { class: "code", rows: 2, "aria-label": `Result of ${call.name}`,
      placeholder: "What the function returns" });
    const submit = (event) => (event.preventDefault(), this.actions.result(this.turn, call, box.value));
    return element("section", { class: "call", "aria-label": `Tool call: ${call.name}` },
      element("h3", {}, icon("terminal"), call.name),
      element("pre", { tabindex: 0 }, text),
      pending && element("form", { onsubmit: submit }, box,
        element("div", { class: "row" }, element("button", {}, "Send this result"))));
  }

  #updateFailure() {
    const { turn } = this;
    const { failure } = this.#parts;
    failure.className = turn.error ? "failure" : "";
    if (!turn.error) return failure.replaceChildren();
    const again = element("button", { type: "button", onclick: () => this.actions.again(turn) }, "Try again");
    return failure.replaceChildren(element("p", {}, turn.error.message), again);
  }

  #updateFooter() {
    const { turn } = this;
    const actions = element("div", { class: "actions" }, this.#branches(), this.#buttons());
    this.#parts.receipt = element("div", { class: "receipt" }, receipt(turn));
    const isReply = turn.role === "assistant";
    this.#parts.footer.replaceChildren(...(isReply ? [this.#parts.receipt, actions] : [actions]));
    actions.hidden = Boolean(turn.streaming);
  }

  #branches() {
    const { ids, chosen } = this.siblings;
    if (ids.length < 2) return null;
    const step = (by) => () => this.actions.branch(this.turn, by);
    return element("span", { class: "branches", role: "group", "aria-label": "Versions" },
      iconButton("left", "Version before", step(-1), chosen === 0 ? { disabled: true } : {}),
      element("span", {}, `${chosen + 1} / ${ids.length}`),
      iconButton("right", "Version after", step(1), chosen === ids.length - 1 ? { disabled: true } : {}));
  }

  #buttons() {
    const { turn, actions } = this;
    const copying = iconButton("copy", "Copy", () => copy(turn.content, copying));
    if (turn.role !== "assistant") {
      const edit = turn.role === "user" && iconButton("edit", "Edit", () => this.#edit());
      return [edit, copying];
    }
    return [
      copying,
      iconButton("again", "Regenerate", () => actions.again(turn)),
      iconButton("terminal", "Copy the request as a curl command", async () => {
        try {
          await copy(actions.curl(turn), copying);
          notify("The request was copied as a curl command.", { seconds: 3 });
        } catch (error) {
          notify(error.message); // the schema or the tools are not JSON at the moment
        }
      }),
    ];
  }

  /** Replaces the turn by a box for its text. */
  #edit() {
    const box = element("textarea", { "aria-label": "Edited message", rows: 2 });
    box.value = this.turn.content;
    const cancel = () => (this.#build(), this.node.querySelector(".actions button[aria-label=Edit]")?.focus());
    const save = () => box.value.trim() && this.actions.edit(this.turn, box.value);
    box.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        save();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        cancel();
      }
    });
    this.node.replaceChildren(element("div", { class: "editor" }, box,
      element("div", { class: "row" },
        element("button", { type: "button", onclick: cancel }, "Cancel"),
        element("button", { type: "button", class: "primary", onclick: save }, "Send"))));
    box.focus();
    box.setSelectionRange(box.value.length, box.value.length);
  }
}

/** Returns the nodes that say what a reply cost. */
function receipt(turn) {
  const { stats } = turn;
  const notes = [turn.warning, FINISHES[turn.finish]].filter(Boolean).map((text) => element("span", { class: "chip" }, text));
  if (!stats) return notes;
  const cached = `${stats.cached} of ${plural(stats.prompt, "prompt token")} cached`;
  const bar = element("span", { class: "bar", "aria-hidden": "true" });
  const shares = [["cached", stats.cached], ["computed", stats.prompt - stats.cached]];
  for (const [name, share] of shares.filter(([, share]) => share > 0)) {
    const part = element("span", { class: name });
    part.style.flexGrow = share;
    bar.append(part);
  }
  const saved = element("span", { title: "The rest of the prompt was computed for this reply." });
  saved.append(element("strong", {}, String(stats.cached)), cached.slice(String(stats.cached).length));
  return [
    bar,
    saved,
    stats.firstTokenMs !== null && element("span", {}, "first token ", element("strong", {}, duration(stats.firstTokenMs))),
    element("span", {}, element("strong", {}, String(stats.tokens)), ` token${stats.tokens === 1 ? "" : "s"}`,
      ...(stats.rate ? [" at ", element("strong", {}, rounded(stats.rate)), "/s"] : [])),
    ...notes,
  ].filter(Boolean);
}

const plural = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
const rounded = (number) => (number < 10 ? number.toFixed(1) : String(Math.round(number)));
const duration = (ms) => (ms < 1000 ? `${ms} ms` : `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`);

function prettyJson(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return null;
  }
}
