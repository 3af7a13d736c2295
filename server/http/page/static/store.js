// Keeps conversations in the browser's localStorage, each under a key of its own. If the browser denies storage or has no
// room left, the page goes on and says so.

const PREFIX = "jamba.conversation.";
const SETTINGS = "jamba.settings";

export const DENIED = "The browser lets this page store nothing: conversations are lost when the tab is closed.";
export const FULL =
  "The browser's storage is full, so this conversation is not saved. Export it, or delete older conversations.";

export class Store {
  #storage = null;
  #onproblem;
  problem = ""; // DENIED, FULL or "", as it was at the last write

  /** `onproblem` is called with a message when writing begins to fail. */
  constructor(onproblem) {
    this.#onproblem = onproblem;
    try {
      this.#storage = window.localStorage;
      this.#storage.setItem("jamba.test", "");
      this.#storage.removeItem("jamba.test");
    } catch (error) {
      this.#report(error);
    }
  }

  /** Returns all stored conversations, the newest first. Entries that cannot be read are left alone. */
  load() {
    const found = [];
    for (let number = 0; number < (this.#storage?.length ?? 0); number++) {
      const name = this.#storage.key(number);
      if (name.startsWith(PREFIX)) {
        const conversation = this.#read(name);
        if (conversation?.turns && conversation.top) found.push(conversation);
      }
    }
    return found.sort((a, b) => b.updated - a.updated);
  }

  settings() {
    return this.#read(SETTINGS) ?? {};
  }

  save(conversation) {
    this.#write(PREFIX + conversation.id, conversation);
  }

  saveSettings(settings) {
    this.#write(SETTINGS, settings);
  }

  saveTheme(theme) {
    this.#attempt(() => this.#storage.setItem("jamba.theme", theme));
  }

  remove(conversation) {
    this.#attempt(() => this.#storage.removeItem(PREFIX + conversation.id));
  }

  /** Returns whether a storage event of another tab is about a conversation. */
  static concerns(event) {
    return event.key === null || event.key.startsWith(PREFIX);
  }

  #read(name) {
    try {
      return JSON.parse(this.#storage.getItem(name));
    } catch {
      return null;
    }
  }

  #write(name, value) {
    this.#attempt(() => this.#storage.setItem(name, JSON.stringify(value)));
  }

  #attempt(action) {
    if (this.problem === DENIED) return;
    try {
      action();
      this.problem = "";
    } catch (error) {
      this.#report(error);
    }
  }

  #report(error) {
    const problem = error.name === "QuotaExceededError" && this.#storage?.length ? FULL : DENIED;
    if (problem !== this.problem) this.#onproblem(problem);
    this.problem = problem;
  }
}
