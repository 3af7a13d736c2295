// The view of the server: what it loaded, how it divides its memory, and what it does now. It asks the server only while
// it is visible.

import { request } from "./api.js";
import { byId, element, svg } from "./dom.js";
import { Metrics } from "./metrics.js";

const POLL_MS = 2000;
const HISTORY = 60; // samples of the small charts: two minutes

export class ServerView {
  #timer = 0;
  #info = null;
  #last = null; // the counters of the scrape before, and when it was
  #history = { running: [], rate: [] };
  #onkey;

  /** `onkey(retry)` asks for an API key. */
  constructor(onkey) {
    this.#onkey = onkey;
    document.addEventListener("visibilitychange", () => this.#restart());
  }

  /** Begins or stops to ask the server. */
  set shown(shown) {
    byId("server").hidden = !shown;
    this.#restart();
  }

  #restart() {
    clearTimeout(this.#timer);
    this.#last = null;
    if (!byId("server").hidden && !document.hidden) void this.#poll();
  }

  async #poll() {
    try {
      this.#info ??= await Promise.all([json("server_info"), json("v1/models")]);
      const metrics = new Metrics(await (await request("metrics")).text());
      this.#show(metrics);
    } catch (error) {
      this.#info = null;
      byId("server").replaceChildren(element("h2", {}, "No numbers at the moment"),
        element("p", { class: "lead" }, error.message));
      if (error.status === 401) return this.#onkey(() => this.#restart());
    }
    clearTimeout(this.#timer);
    if (!byId("server").hidden && !document.hidden) this.#timer = setTimeout(() => this.#poll(), POLL_MS);
  }

  #show(metrics) {
    const [info, models] = this.#info;
    const rates = this.#measure(metrics);
    push(this.#history.running, metrics.sum("jamba_num_requests_running"));
    push(this.#history.rate, rates.generated);
    const names = models.data.map(({ id }) => id).join(", ");
    byId("server").replaceChildren(
      element("h2", {}, names),
      element("p", { class: "lead" }, models.data[0].description ? sentence(models.data[0].description) :
        `${info.architecture} on ${info.device}, version ${info.version} of the server.`),
      this.#activity(metrics, rates, info.memory.kv_tokens),
      memoryCard(info.memory),
      factsCard(info),
    );
  }

  /** Returns tokens per second since the last scrape. */
  #measure(metrics) {
    const now = { at: performance.now(), generated: metrics.sum("jamba_generation_tokens_total"),
      prompt: metrics.sum("jamba_prompt_tokens_total") };
    const last = this.#last ?? now;
    const seconds = Math.max((now.at - last.at) / 1000, 0.001);
    this.#last = now;
    return { generated: (now.generated - last.generated) / seconds, prompt: (now.prompt - last.prompt) / seconds };
  }

  #activity(metrics, rates, tokens) {
    const queries = metrics.sum("jamba_prefix_cache_queries_total");
    const hits = metrics.sum("jamba_prefix_cache_hits_total");
    const pages = metrics.sum("jamba_kv_cache_usage_perc");
    const firstToken = metrics.quantile("jamba_time_to_first_token_seconds", 0.5);
    return element("div", { class: "cards" },
      card("Running", count(metrics.sum("jamba_num_requests_running")),
        `${count(metrics.sum("jamba_num_requests_waiting"))} waiting`, chart(this.#history.running)),
      card("Generated now", count(Math.round(rates.generated)), "tokens/s", chart(this.#history.rate)),
      card("From the prefix cache", queries ? percent(hits / queries) : "–",
        queries ? `of ${count(queries)} prompt tokens` : "no prompts yet", meter(queries ? hits / queries : 0)),
      card("KV pages in use", percent(pages), `of ${count(tokens)} tokens`, meter(pages)),
      card("Saved states", count(metrics.sum("jamba_saved_states")),
        `${metrics.sum("jamba_state_slots_used")} of ${metrics.sum("jamba_state_slots_capacity")} slots running`),
      card("First token after", firstToken === null ? "–" : seconds(firstToken), "median"),
      card("Prompt tokens", count(metrics.sum("jamba_prompt_tokens_total")), "since the start"),
      card("Reply tokens", count(metrics.sum("jamba_generation_tokens_total")), "since the start"));
  }
}

/** Returns a description, which begins with a small letter, as a sentence. */
export const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}.`;

const json = async (path) => (await request(path)).json();

function push(samples, value) {
  samples.push(value);
  if (samples.length > HISTORY) samples.shift();
}

function card(title, value, note, figure = null) {
  return element("section", { class: "card" }, element("h3", {}, title),
    element("p", { class: "value" }, value), note && element("p", { class: "note" }, note), figure);
}

function meter(share) {
  const fill = element("span");
  fill.style.width = `${Math.min(Math.max(share, 0), 1) * 100}%`;
  return element("div", { class: "meter", "aria-hidden": "true" }, fill);
}

/** Returns a chart of samples, the newest at the right. The numbers beside it say the same to screen readers. */
function chart(samples) {
  const highest = Math.max(...samples, 1);
  const points = samples.map((value, number) => {
    const x = 100 - (samples.length - 1 - number) * (100 / (HISTORY - 1));
    return `${x.toFixed(2)},${(30 - (28 * value) / highest).toFixed(2)}`;
  });
  const left = 100 - (samples.length - 1) * (100 / (HISTORY - 1));
  return svg("svg", { viewBox: "0 0 100 30", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("polygon", { points: [`${left},30`, ...points, "100,30"].join(" ") }),
    svg("polyline", { points: points.join(" ") }));
}

function memoryCard(memory) {
  const parts = [
    ["Weights", memory.weight_bytes, ""],
    ["KV pages", memory.kv_bytes, `for ${count(memory.kv_tokens)} tokens`],
    ["States", memory.state_bytes, `${memory.running_sequences} running, ${memory.saved_states} saved`],
  ];
  const bar = element("div", { class: "plan", "aria-hidden": "true" });
  const legend = element("ul", { class: "legend" });
  for (const [number, [name, size, note]] of parts.entries()) {
    const part = element("span", { class: `part-${number + 1}` });
    part.style.flexGrow = size;
    bar.append(part);
    legend.append(element("li", {}, element("i", { class: `part-${number + 1}`, "aria-hidden": "true" }),
      `${name} ${bytes(size)}`, element("span", {}, note)));
  }
  return element("section", { class: "card wide" }, element("h3", {}, "Memory"), bar, legend);
}

function factsCard(info) {
  const weights = info.quantization ? `${info.dtype} with ${info.quantization} weights` : info.dtype;
  const kernels = [...new Set(Object.values(info.kernels))].sort().join(", ");
  const facts = [
    ["Architecture", info.architecture],
    ["Parameters", count(info.num_parameters)],
    ["Number format", weights],
    ["Device", info.device],
    ["Longest context", `${count(info.max_model_len)} tokens`],
    ["Prompt tokens per step", count(info.max_num_batched_tokens)],
    ["Kernels", kernels || "–"],
    ["Same bits in every batch", info.batch_invariant ? "yes" : "no"],
    ["Loaded in", seconds(info.load_seconds)],
    ["Version", info.version],
  ];
  const rows = facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
  return element("section", { class: "card wide" }, element("h3", {}, "Model"), element("dl", { class: "facts" }, rows));
}

const count = (number) => number.toLocaleString("en");
const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
const seconds = (value) => (value < 1 ? `${Math.round(1000 * value)} ms` : `${value.toFixed(value < 10 ? 2 : 1)} s`);

function bytes(size) {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  const power = size < 1024 ? 0 : Math.min(Math.floor(Math.log2(size) / 10), units.length - 1);
  return `${(size / 1024 ** power).toFixed(power ? 1 : 0)} ${units[power]}`;
}
