// Streams a chat with one tool through the official JavaScript client, answers the tool call, and streams the reply to
// the answer. Prints the two messages that the client has put together as one JSON list.
//
//     node stream_tool_call.mjs BASE_URL
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const tools = [{ type: "function", function: { name: "get_weather", parameters } }];
const messages = [{ role: "user", content: "How is the weather in Paris?" }];

async function finalMessage() {
  const deltas = [];
  const stream = client.chat.completions.stream({ model: "jamba", messages, tools });
  for await (const chunk of stream) {
    deltas.push(...chunk.choices.map((choice) => choice.delta));
  }
  return { deltas, completion: await stream.finalChatCompletion() };
}

const first = await finalMessage();
const call = first.completion.choices[0].message;
messages.push(call, { role: "tool", tool_call_id: call.tool_calls[0].id, content: '{"sky": "blue"}' });
const second = await finalMessage();
console.log(JSON.stringify([first, second]));
