import assert from "node:assert/strict";
import { test } from "node:test";
import { message, SessionNotFound, type SessionEvent } from "@agentstate/client";
import { EventParser } from "../dist/events.js";
import { answer, broken, connect, freshId, intercepted, MODEL } from "./helpers.js";

const client = connect();
const encoder = new TextEncoder();
const STREAM = { "Content-Type": "text/event-stream; charset=utf-8" };

for (const end of ["\n", "\r", "\r\n"]) {
  test(`events are read line by line that end with ${JSON.stringify(end)}, however they are cut`, () => {
    const text = "one\u2028two\u0085three😀";
    const entry = JSON.stringify({ seq: 4, payload: { text } });
    const lines = [": still here", "", "event: unheard-of", "data: 1", "", "event: entry", "id: 4"];
    lines.push(...entry.split(",").map((part, at) => `data:${at ? " " : ""}${at ? "," : ""}${part}`), "");
    lines.push("event: rewind", 'data: {"session_id":"s","seq":2}', "", "event: end", "data: {}", "");
    const stream = encoder.encode(lines.map((line) => line + end).join(""));
    for (let cut = 0; cut <= stream.length; cut++) {
      const parser = new EventParser();
      const found = [...parser.take(stream.subarray(0, cut)), ...parser.take(stream.subarray(cut))];
      assert.deepEqual(found, [
        { type: "entry", entry: { seq: 4, payload: { text } } },
        { type: "rewind", seq: 2 },
      ]);
      assert.ok(parser.ended);
    }
  });
}

/** What a follower is told of a session that gets two entries, is rewound to the first, goes on, and is deleted. */
async function followed(options: Parameters<typeof connect>[0]): Promise<string[]> {
  const id = freshId();
  await client.createSession({ model: MODEL, id });
  const told: string[] = [];
  const following = connect(options).events(id);
  const next = async (wanted: string) => {
    for (;;) {
      const { value, done } = await following.next();
      const said = done ? "end" : shown(value);
      if (said !== "session") told.push(said);
      if (said === wanted) return;
    }
  };
  const turn = await client.begin(id);
  const added = await turn.append(message({ n: 1 }), message({ n: 2 }));
  await next("entry 2");
  await turn.end();
  const { revision } = await client.read(id);
  await client.rewind(id, { at: added.first_id, revision });
  await next("rewind 1");
  await client.turn(id, (turn) => turn.append(message({ n: 3 })));
  await next("entry 3");
  await client.delete(id, "*");
  await next("end");
  return told;
}

function shown(event: SessionEvent): string {
  if (event.type === "session") return "session";
  return event.type === "entry" ? `entry ${event.entry.seq}` : `rewind ${event.seq}`;
}

const ALL = ["entry 1", "entry 2", "rewind 1", "entry 3", "end"];

test("a session is followed from its beginning to its end", async () => {
  assert.deepEqual(await followed({}), ALL);
});

test("a stream that breaks off is opened anew where it was left, and nothing is told twice", async () => {
  const seen: (string | undefined)[] = [];
  const { fetch } = intercepted(async ({ headers }, send) => {
    seen.push(headers["Last-Event-ID"]);
    if (seen.length === 2) throw broken("ECONNREFUSED");
    if (seen.length === 3) return new Response("", { status: 503 });
    const { body } = await send();
    return new Response(seen.length > 5 ? body : body?.pipeThrough(cutAfterOne()), { headers: STREAM });
  });
  assert.deepEqual(await followed({ fetch, retries: 0 }), ALL);
  assert.deepEqual(seen, ["0", "1", "1", "1", "2", "1"]);
});

test("a stream that is silent is opened anew", async () => {
  const id = freshId();
  await client.createSession({ model: MODEL, id });
  const { fetch, sent } = intercepted(async (_, send) => (sent.length === 1 ? new Response(new ReadableStream(), { headers: STREAM }) : send()));
  const following = connect({ fetch, stallS: 1 }).events(id);
  assert.equal((await following.next()).value?.type, "session");
  await following.return();
});

/** Ends a stream after the first event that has an id. */
function cutAfterOne(): TransformStream<Uint8Array, Uint8Array> {
  let text = "";
  const decoder = new TextDecoder();
  return new TransformStream({
    transform(chunk, controller) {
      text += decoder.decode(chunk, { stream: true });
      const found = /[^]*?\nid: \d+\n[^]*?\n\n/.exec(text);
      if (found) {
        controller.enqueue(encoder.encode(found[0]));
        controller.terminate();
      }
    },
  });
}

test("a session that is not there cannot be followed", async () => {
  await assert.rejects(client.events(freshId()).next(), SessionNotFound);
  const { fetch, sent } = intercepted(async () => answer({}, 503));
  await assert.rejects(connect({ fetch, retries: 0 }).events("s").next(), { status: 503 });
  assert.equal(sent.length, 1);
});

test("who leaves the loop, or aborts, closes the stream", async () => {
  const id = freshId();
  await client.createSession({ model: MODEL, id });
  const signals: AbortSignal[] = [];
  const { fetch } = intercepted(async (_, send, { signal }) => {
    if (signal) signals.push(signal);
    return send();
  });
  for await (const event of connect({ fetch }).events(id)) {
    assert.equal(event.type, "session");
    break;
  }
  const ending = new AbortController();
  const following = connect({ fetch }).events(id, { signal: ending.signal });
  await following.next();
  const next = following.next();
  ending.abort(new Error("enough"));
  await assert.rejects(next, /enough/);
  assert.deepEqual(signals.map((signal) => signal.aborted), [true, true]);
});
