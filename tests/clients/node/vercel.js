// The Vercel AI SDK, which streams.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { streamText } from "ai";
import { answerLines } from "./lines.js";

const [baseURL, apiKey, model, tokens] = process.argv.slice(2);
const provider = createOpenAICompatible({ name: "local", baseURL, apiKey, includeUsage: true });
const messages = [];

await answerLines(async (text) => {
  messages.push({ role: "user", content: text });
  const answer = streamText({
    model: provider(model),
    messages,
    temperature: 0,
    maxOutputTokens: Number(tokens),
    onError: ({ error }) => {
      throw error;
    },
  });
  const said = await answer.text;
  messages.push(...(await answer.response).messages);
  return { text: said, cached: (await answer.usage).inputTokenDetails.cacheReadTokens };
});
