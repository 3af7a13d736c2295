// Sends requests to the server that this page came from, with the API key of the user.

const ROOT = new URL("..", import.meta.url); // this file is at ROOT/page/api.js
const KEY = "jamba.key";

/** An error reply of the server, or an error event of a stream. Status 0 means that there was no reply. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The API key. It is kept until the tab is closed or, if the user says so, in the browser's storage. */
export const key = {
  value: "",
  remembered: false,

  load() {
    try {
      const kept = localStorage.getItem(KEY);
      this.remembered = kept !== null;
      this.value = kept ?? sessionStorage.getItem(KEY) ?? "";
    } catch {
      this.value = ""; // the browser denies storage
    }
  },

  set(value, remember) {
    this.value = value.trim();
    this.remembered = remember;
    try {
      localStorage.removeItem(KEY);
      sessionStorage.removeItem(KEY);
      if (this.value) (remember ? localStorage : sessionStorage).setItem(KEY, this.value);
    } catch {
      this.remembered = false; // the key lasts until the page is left
    }
  },
};

/** Returns the address of a path of the server, such as "v1/models". */
export const address = (path) => new URL(path, ROOT).href;

/** Returns the server's reply. With `body`, the request is a POST with this object as JSON. Raises ApiError. */
export async function request(path, { body = null, signal = null } = {}) {
  const headers = key.value ? { Authorization: `Bearer ${key.value}` } : {};
  const options = { headers, signal, cache: "no-store" };
  if (body !== null) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  let response;
  try {
    response = await fetch(address(path), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server does not answer. Is it still running?");
  }
  if (!response.ok) throw new ApiError(response.status, await messageOf(response));
  return response;
}

async function messageOf(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

/** Yields the objects of a stream of server-sent events, until its event "[DONE]". Raises ApiError for an error event,
 * and for a stream that breaks off. */
export async function* events(response) {
  for await (const line of lines(response.body.getReader())) {
    if (!line.startsWith("data:")) continue; // comments keep the connection open
    const data = line.slice(5).trim();
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(500, event.error.message);
    yield event;
  }
  throw new ApiError(0, "The connection broke before the reply was complete.");
}

async function* lines(reader) {
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const parts = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = parts.pop();
      yield* parts;
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The connection broke before the reply was complete.");
  } finally {
    reader.releaseLock();
  }
  if (rest) yield rest;
}
