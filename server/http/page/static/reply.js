// Reads the stream of one reply into a turn of the conversation, and measures it.

import { events, request } from "./api.js";

const SHORTEST = 0.05; // seconds; the rate of a shorter stream would be that of the network

/** One reply under way. It fills `turn` and calls `onchange` after each event. */
export class Reply {
  #controller = new AbortController();
  #sent = performance.now();
  #first = 0; // when the first token came
  #last = 0;
  leaving = false; // the page is about to be left, which breaks the connection

  constructor(turn, body, onchange) {
    this.turn = turn;
    this.body = body;
    this.onchange = onchange;
  }

  /** Ends the reply early. The server notices the closed connection and stops computing. */
  stop() {
    this.#controller.abort();
  }

  /** Returns when the reply has ended. Never raises: what went wrong is in `turn.error`. */
  async run() {
    const { turn } = this;
    Object.assign(turn, { streaming: true, error: null, stats: null });
    try {
      const { signal } = this.#controller;
      const response = await request("v1/chat/completions", { body: this.body, signal });
      turn.warning = response.headers.get("X-Warning");
      for await (const event of events(response)) {
        this.#read(event);
        if (event.usage) this.#measure(event.usage);
        this.onchange();
      }
    } catch (error) {
      if (this.leaving) turn.finish = "interrupted";
      else if (error.name === "AbortError") turn.finish = "stopped";
      else turn.error = { status: error.status ?? 0, message: error.message };
    }
    turn.streaming = false;
    this.onchange();
  }

  #read(event) {
    const { turn } = this;
    const choice = event.choices?.[0];
    if (!choice) return;
    const { content, reasoning, tool_calls: calls } = choice.delta;
    if (content || reasoning || calls) {
      this.#last = performance.now();
      this.#first ||= this.#last;
    }
    if (content) turn.content += content;
    if (reasoning) turn.reasoning = (turn.reasoning ?? "") + reasoning;
    for (const call of calls ?? []) this.#addToCall(call);
    if (choice.finish_reason) turn.finish = choice.finish_reason;
  }

  #addToCall({ index, id, function: part }) {
    this.turn.calls ??= [];
    const call = (this.turn.calls[index] ??= { id, name: part.name, arguments: "" });
    call.arguments += part.arguments ?? "";
  }

  #measure(usage) {
    const seconds = (this.#last - this.#first) / 1000;
    this.turn.stats = {
      prompt: usage.prompt_tokens,
      cached: usage.prompt_tokens_details?.cached_tokens ?? 0,
      tokens: usage.completion_tokens,
      thoughts: usage.completion_tokens_details?.reasoning_tokens ?? 0,
      firstTokenMs: this.#first ? Math.round(this.#first - this.#sent) : null,
      // The first token's time is that of the prompt.
      rate: seconds >= SHORTEST && usage.completion_tokens > 1 ? (usage.completion_tokens - 1) / seconds : null,
    };
  }
}
