// OpenAI's TypeScript SDK, whole answers and streams.
import OpenAI from "openai";
import { answerLines } from "./lines.js";

const [baseURL, apiKey, model, tokens, stream] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey });
const messages = [];

await answerLines(async (text) => {
  messages.push({ role: "user", content: text });
  const request = { model, messages, temperature: 0, max_tokens: Number(tokens) };
  let answer;
  if (stream === "stream") {
    answer = await client.chat.completions
      .stream({ ...request, stream_options: { include_usage: true } })
      .finalChatCompletion();
  } else {
    answer = await client.chat.completions.create(request);
  }
  messages.push(answer.choices[0].message);
  return { text: answer.choices[0].message.content, cached: answer.usage.prompt_tokens_details.cached_tokens };
});
