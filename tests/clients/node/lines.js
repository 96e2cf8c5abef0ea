import { createInterface } from "node:readline";

/** Answers every line of the input, which is a text in JSON, with a line. */
export async function answerLines(answer) {
  for await (const line of createInterface({ input: process.stdin })) {
    console.log(JSON.stringify(await answer(JSON.parse(line))));
  }
}
