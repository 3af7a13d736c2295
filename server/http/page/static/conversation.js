// A conversation is a tree of turns. To edit a turn or to ask for another reply adds a branch; nothing is lost, and the
// server computes only what follows the place where the branches part.

export const DEFAULT_SETTINGS = Object.freeze({
  model: "", // the server's first model
  system: "",
  temperature: null, // null leaves a field out of the request, so the server's default applies
  topP: null,
  maxTokens: null,
  seed: null,
  schemaOn: false,
  schema: "",
  toolsOn: false,
  tools: "",
});
const MAX_TITLE = 60;

const newId = () => crypto.getRandomValues(new Uint32Array(2)).reduce((id, part) => id + part.toString(36), "");

/** Returns an empty conversation. */
export function newConversation(settings) {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, settings: { ...settings }, turns: {}, top: branch() };
}

const branch = () => ({ ids: [], chosen: 0 });

/** Adds a turn below `parent` (null is the top) and chooses its branch. `fields` are those of the role. */
export function addTurn(conversation, parent, role, fields = {}) {
  const turn = { id: newId(), parent: parent?.id ?? null, role, content: "", next: branch(), ...fields };
  const siblings = siblingsOf(conversation, turn);
  conversation.turns[turn.id] = turn;
  siblings.chosen = siblings.ids.push(turn.id) - 1;
  conversation.updated = Date.now();
  if (!conversation.title && role === "user") conversation.title = titleOf(turn.content);
  return turn;
}

function titleOf(text) {
  const line = text.trim().split("\n")[0];
  return line.length > MAX_TITLE ? `${line.slice(0, MAX_TITLE - 1).trimEnd()}…` : line;
}

/** Returns the branches to which a turn belongs: {ids, chosen}. */
export function siblingsOf(conversation, turn) {
  return turn.parent === null ? conversation.top : conversation.turns[turn.parent].next;
}

/** Returns the turns of the chosen branches, the oldest first. */
export function pathOf(conversation) {
  const path = [];
  for (let at = conversation.top; at.ids.length; at = path.at(-1).next) {
    path.push(conversation.turns[at.ids[at.chosen]]);
  }
  return path;
}

export const parentOf = (conversation, turn) => (turn.parent === null ? null : conversation.turns[turn.parent]);

/** Returns the turns from the top to `turn`, or an empty list for null. */
function pathTo(conversation, turn) {
  const path = [];
  for (let each = turn; each; each = parentOf(conversation, each)) path.unshift(each);
  return path;
}

/** Returns the body of the request for a reply to `turn`. Raises SyntaxError, with the name of the setting, for a schema
 * or tools that are not JSON. */
export function requestBody(conversation, turn) {
  const { settings } = conversation;
  const system = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  const body = {
    messages: [...system, ...pathTo(conversation, turn).map(messageOf)],
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  const optional = {
    model: settings.model || null,
    temperature: settings.temperature,
    top_p: settings.topP,
    max_tokens: settings.maxTokens,
    seed: settings.seed,
  };
  for (const [name, value] of Object.entries(optional)) if (value !== null) body[name] = value;
  if (settings.schemaOn) {
    const schema = parseJson(settings.schema, "JSON schema");
    body.response_format = { type: "json_schema", json_schema: { name: "reply", schema, strict: true } };
  }
  if (settings.toolsOn) body.tools = parseJson(settings.tools, "Tools");
  return body;
}

/** Returns the value of a JSON text. Raises SyntaxError whose message begins with `name`. */
export function parseJson(text, name) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new SyntaxError(`${name}: ${text.trim() ? error.message : "the box is empty"}`);
  }
}

/** Returns a turn as a message of OpenAI's API. */
export function messageOf(turn) {
  if (turn.role === "tool") return { role: "tool", tool_call_id: turn.callId, content: turn.content };
  const message = { role: turn.role, content: turn.content };
  if (turn.role !== "assistant") return message;
  if (turn.reasoning) message.reasoning = turn.reasoning;
  if (turn.calls?.length) {
    message.tool_calls = turn.calls.map(({ id, name, arguments: text }) =>
      ({ id, type: "function", function: { name, arguments: text } }));
  }
  return message;
}

/** Returns the conversation for a file: the chosen branch as messages, and the whole tree. */
export function exported(conversation) {
  const { title, created, settings } = conversation;
  const system = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  return {
    title,
    created: new Date(created).toISOString(),
    settings,
    messages: [...system, ...pathOf(conversation).map(messageOf)],
    turns: conversation.turns,
    top: conversation.top,
  };
}
