// The chat: the conversation that is shown, the list of all conversations, and the replies under way.

import { address, key } from "./api.js";
import { addTurn, exported, newConversation, parentOf, pathOf, requestBody, siblingsOf } from "./conversation.js";
import { byId, download, element, iconButton, notify, say } from "./dom.js";
import { Reply } from "./reply.js";
import { TurnView } from "./turn.js";

const SAVE_MS = 1000; // while a reply streams, the conversation is saved so often
const NEAR_END = 80; // pixels; a reader who is nearer to the end than this follows the stream

export class Chat {
  #views = new Map(); // turn id -> TurnView
  #replies = new Map(); // conversation id -> Reply
  #saved = 0;
  #frame = 0;

  /** `hooks`: settingsOf() for new conversations, onopen(conversation), onkey(retry), welcome() for an empty one. */
  constructor(store, hooks) {
    this.store = store;
    this.hooks = hooks;
    this.conversations = store.load();
    for (const conversation of this.conversations) markInterrupted(conversation);
    this.current = this.conversations[0] ?? this.#blank();
    byId("scroller").addEventListener("scroll", () => this.#showLatestButton());
    byId("latest").addEventListener("click", () => this.#follow());
  }

  /** Shows a conversation, or an empty one. */
  open(conversation = this.#blank()) {
    this.current = conversation;
    this.hooks.onopen(conversation);
    this.render();
    this.#follow();
  }

  #blank() {
    return newConversation(this.hooks.settingsOf());
  }

  get busy() {
    return this.#replies.has(this.current.id);
  }

  /** Shows everything anew. */
  render() {
    this.#renderList();
    const path = pathOf(this.current);
    this.#views = new Map(path.map((turn) => [turn.id, new TurnView(turn, siblingsOf(this.current, turn), this)]));
    const turns = byId("turns");
    turns.replaceChildren(...(path.length ? [...this.#views.values()].map(({ node }) => node) : [this.hooks.welcome()]));
    this.#showBusy();
    this.#showLatestButton();
  }

  #renderList() {
    const items = this.conversations.map((conversation) => {
      const current = conversation === this.current ? "true" : null;
      return element("li", {},
        element("button", { type: "button", class: "quiet", "aria-current": current, onclick: () => this.open(conversation) },
          element("span", {}, conversation.title || "Untitled")),
        iconButton("trash", `Delete ${conversation.title || "Untitled"}`, () => this.remove(conversation)));
    });
    byId("conversations").replaceChildren(...items);
  }

  #showBusy() {
    byId("send").hidden = this.busy;
    byId("stop").hidden = !this.busy;
    byId("turns").setAttribute("aria-busy", String(this.busy));
  }

  // What a user does ----------------------------------------------------------------------------------------------------

  /** Adds a message at the end and asks for a reply. */
  send(text) {
    if (this.busy || !text.trim()) return false;
    const turn = addTurn(this.current, pathOf(this.current).at(-1) ?? null, "user", { content: text });
    return this.#reply(turn);
  }

  /** Adds another version of a user's turn and asks for a reply to it. */
  edit(turn, text) {
    if (this.busy) return;
    this.#reply(addTurn(this.current, parentOf(this.current, turn), "user", { content: text }));
  }

  /** Asks for another version of a reply. A reply that failed before its first token is replaced. */
  again(turn) {
    if (this.busy) return;
    if (turn.error && !turn.content && !turn.reasoning && !turn.calls) this.#discard(turn);
    this.#reply(parentOf(this.current, turn));
  }

  /** Shows the version before or after a turn. */
  branch(turn, step) {
    if (this.busy) return;
    const siblings = siblingsOf(this.current, turn);
    siblings.chosen = Math.min(Math.max(siblings.chosen + step, 0), siblings.ids.length - 1);
    this.save();
    this.render();
  }

  /** Adds the result of a tool call. When all calls of the reply have results, asks for the next reply. */
  result(turn, call, text) {
    if (this.busy) return;
    const last = addTurn(this.current, pathOf(this.current).at(-1), "tool", { content: text, callId: call.id, name: call.name });
    if (this.pendingCalls(turn).size === 0) {
      this.#reply(last);
    } else {
      this.save();
      this.render();
    }
  }

  /** Returns the ids of a reply's tool calls that have no result yet. */
  pendingCalls(turn) {
    const path = pathOf(this.current);
    const later = path.slice(path.indexOf(turn) + 1);
    if (turn.streaming || later.some(({ role }) => role !== "tool")) return new Set();
    const given = new Set(later.map(({ callId }) => callId));
    return new Set((turn.calls ?? []).map(({ id }) => id).filter((id) => !given.has(id)));
  }

  stop() {
    this.#replies.get(this.current.id)?.stop();
  }

  remove(conversation) {
    const place = this.conversations.indexOf(conversation);
    this.#replies.get(conversation.id)?.stop();
    this.conversations.splice(place, 1);
    this.store.remove(conversation);
    const undo = () => {
      this.conversations.splice(place, 0, conversation);
      this.save(conversation);
      this.open(conversation);
    };
    if (conversation === this.current) this.open(this.conversations[0]);
    else this.#renderList();
    notify(`“${conversation.title || "Untitled"}” was deleted.`, { action: { label: "Undo", run: undo }, seconds: 10 });
  }

  export() {
    const name = this.current.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "") || "conversation";
    download(`${name}.json`, JSON.stringify(exported(this.current), null, 2), "application/json");
  }

  /** Returns the request of a reply as a command for a shell. The key is left out. */
  curl(turn) {
    const { stream, stream_options: options, ...body } = requestBody(this.current, parentOf(this.current, turn));
    const quote = (text) => `'${text.replaceAll("'", String.raw`'\''`)}'`;
    const authorization = key.value ? " -H 'Authorization: Bearer YOUR_KEY'" : "";
    return `curl ${quote(address("v1/chat/completions"))} -H 'Content-Type: application/json'${authorization} ` +
      `-d ${quote(JSON.stringify(body))}`;
  }

  // Replies -------------------------------------------------------------------------------------------------------------

  /** Begins a reply below `turn`. Returns false if the request cannot be built. */
  #reply(turn) {
    const conversation = this.current;
    const answer = addTurn(conversation, turn, "assistant", { json: conversation.settings.schemaOn });
    let body;
    try {
      body = requestBody(conversation, turn);
    } catch (error) {
      answer.error = { status: 400, message: error.message };
      this.#keep(conversation);
      this.render();
      return true;
    }
    const reply = new Reply(answer, body, () => this.#changed(conversation, answer));
    this.#replies.set(conversation.id, reply);
    const done = reply.run();
    this.#keep(conversation);
    this.render();
    this.#follow();
    say("The model answers.");
    void done.then(() => this.#ended(conversation, answer));
    return true;
  }

  #changed(conversation, turn) {
    const now = Date.now();
    if (now - this.#saved > SAVE_MS) {
      this.#saved = now;
      this.save(conversation);
    }
    if (conversation !== this.current || this.#frame) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      this.#show(turn);
    });
  }

  #show(turn) {
    const follows = this.#isNearEnd();
    this.#views.get(turn.id)?.update();
    if (follows) this.#follow();
    else this.#showLatestButton();
  }

  #ended(conversation, turn) {
    this.#replies.delete(conversation.id);
    this.save(conversation);
    if (conversation === this.current) {
      this.#show(turn);
      this.#showBusy();
    }
    const tokens = turn.stats?.tokens ?? 0;
    say(turn.error ? `The reply failed: ${turn.error.message}` : `The reply is complete: ${tokens} tokens.`);
    if (turn.error?.status === 401 && conversation === this.current) this.hooks.onkey(() => this.again(turn));
  }

  #discard(turn) {
    const siblings = siblingsOf(this.current, turn);
    siblings.ids.splice(siblings.ids.indexOf(turn.id), 1);
    siblings.chosen = Math.max(0, siblings.ids.length - 1);
    delete this.current.turns[turn.id];
  }

  // Storage and scrolling -----------------------------------------------------------------------------------------------

  /** Puts a conversation at the top of the list, and saves it. */
  #keep(conversation) {
    this.conversations = [conversation, ...this.conversations.filter((each) => each !== conversation)];
    this.save(conversation);
  }

  /** Saves a conversation if it is in the list, which it is from its first message on. */
  save(conversation = this.current) {
    if (this.conversations.includes(conversation)) this.store.save(conversation);
  }

  /** Saves replies under way, because the page is about to be left. */
  leave() {
    for (const conversation of this.conversations) {
      const reply = this.#replies.get(conversation.id);
      if (!reply) continue;
      reply.leaving = true;
      this.store.save(conversation);
    }
  }

  /** Reads the list again, because another tab has changed it. The conversations open here stay as they are. */
  reload() {
    const mine = new Map(this.conversations.filter((each) => each === this.current || this.#replies.has(each.id))
      .map((each) => [each.id, each]));
    const stored = this.store.load().map((each) => mine.get(each.id) ?? each);
    const ids = new Set(stored.map(({ id }) => id));
    this.conversations = [...[...mine.values()].filter(({ id }) => !ids.has(id)), ...stored];
    this.#renderList();
  }

  #isNearEnd() {
    const { scrollHeight, scrollTop, clientHeight } = byId("scroller");
    return scrollHeight - scrollTop - clientHeight < NEAR_END;
  }

  #follow() {
    byId("scroller").scrollTop = byId("scroller").scrollHeight;
    this.#showLatestButton();
  }

  #showLatestButton() {
    byId("latest").hidden = this.#isNearEnd();
  }
}

/** A reply that was under way when the page was left has ended. */
function markInterrupted(conversation) {
  for (const turn of Object.values(conversation.turns)) {
    if (turn.streaming) Object.assign(turn, { streaming: false, finish: "interrupted" });
  }
}
