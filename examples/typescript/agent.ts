// An agent with a tool on the Vercel AI SDK, whose context survives its process and its engine.
//
//     npm install --prefix ../../clients/typescript && npm run build --prefix ../../clients/typescript && npm install
//     npm start -- agent-17 "What is a page?"
//     npm start -- agent-17 "And an extent?"     # any time later: its context comes from disk
//
// AGENTSTATE_URL says where the service is, AGENTSTATE_API_KEY with which key it is called. The SDK calls the gateway and
// names its session. The conversation is kept in that session: the next run reads it from there.

import { readFile } from "node:fs/promises";
import { basename, join } from "node:path";
import { Client, message } from "@agentstate/client";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, stepCountIs, tool, type ModelMessage } from "ai";

const [sessionId, question] = process.argv.slice(2);
if (sessionId === undefined || question === undefined) throw new Error("give a session's id and a question");
const url = process.env["AGENTSTATE_URL"] ?? "http://127.0.0.1:8700";
const apiKey = process.env["AGENTSTATE_API_KEY"];
const docs = process.env["DOCS"] ?? "../../docs";

const client = new Client(url, apiKey === undefined ? {} : { apiKey });
const model = (await client.engines()).data.find((engine) => engine.live)?.model;
if (model === undefined) throw new Error("no engine runs: start one with `agentstate engine`");
await client.ensureSession(sessionId, model);

const gateway = createOpenAICompatible({
  name: "agentstate",
  baseURL: client.gatewayUrl,
  apiKey: apiKey ?? "none",
  headers: client.gatewayHeaders(sessionId),
});
const read = tool({
  description: "Reads a manual",
  inputSchema: jsonSchema<{ name: string }>({
    type: "object",
    properties: { name: { type: "string" } },
    required: ["name"],
  }),
  execute: async ({ name }) => (await readFile(join(docs, basename(name)), "utf8")).slice(0, 4000),
});

const kept: ModelMessage[] = [];
for (let after: string | undefined; ; ) {
  const page = await client.entries(sessionId, after === undefined ? { limit: 1000 } : { limit: 1000, after });
  kept.push(...page.data.filter(({ kind }) => kind === "message").map(({ payload }) => payload as unknown as ModelMessage));
  if (!page.has_more || page.last_id === null) break;
  after = page.last_id;
}

const asked: ModelMessage = { role: "user", content: question };
const answer = await generateText({
  model: gateway(model),
  system: "You answer questions about this manual in one short sentence.",
  messages: [...kept, asked],
  tools: { read },
  stopWhen: stepCountIs(5),
  temperature: 0,
  maxOutputTokens: 24,
});
for (const { usage } of answer.steps) {
  console.log(`of ${usage.inputTokens} tokens ${usage.inputTokenDetails.cacheReadTokens} were not computed again`);
}
console.log(answer.text);
// The gateway's turn has ended, or is about to: this one waits for it.
await client.turn(sessionId, (turn) => turn.append(message(asked), ...answer.response.messages.map(message)), {
  on_busy: "wait",
});
