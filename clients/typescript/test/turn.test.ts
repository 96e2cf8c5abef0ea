import assert from "node:assert/strict";
import { test } from "node:test";
import {
  AgentStateError,
  EngineUnreachable,
  LeaseLost,
  message,
  SessionBusy,
  toolCall,
  ToolCallReused,
  ToolInFlight,
  toolOutput,
} from "@agentstate/client";
import { answer, broken, connect, freshId, intercepted, MODEL, problem } from "./helpers.js";

const client = connect();

async function fresh(): Promise<string> {
  const { id } = await client.createSession({ model: MODEL, id: freshId() });
  return id;
}

test("a turn ends suspended with what it appended", async () => {
  const id = await fresh();
  const turn = await client.turn(id, async (turn) => {
    assert.deepEqual([turn.entries, turn.pendingToolCalls, turn.session.status], [[], [], "running"]);
    assert.equal(turn.baseUrl, "http://127.0.0.1:30000/v1");
    assert.match(turn.extraBody["session_id"] ?? "", /.\../);
    await turn.append(message({ role: "user", content: "Hello" }), toolCall("c", "read", { path: "a" }, 2));
    await turn.append(toolOutput("c", "text"));
    turn.reason = "done";
  });
  assert.equal(turn.suspended?.kv.state, "durable");
  assert.equal((await turn.waitDurable()).tokens, 128);
  const kinds = (await client.entries(id)).data.map((entry) => entry.kind);
  assert.deepEqual(kinds, ["message", "tool_call", "tool_result"]);
  assert.equal((await client.read(id)).status, "suspended");
});

test("a turn whose work throws ends suspended too, and throws that", async () => {
  const id = await fresh();
  const work = client.turn(
    id,
    async (turn) => {
      await turn.append(toolCall("c", "read"));
      throw new RangeError("the tool broke");
    },
    { reason: "done" },
  );
  await assert.rejects(work, RangeError);
  assert.equal((await client.read(id)).status, "suspended");
  await client.turn(id, (turn) => assert.deepEqual(turn.pendingToolCalls, ["c"]));
});

test("a turn that is done while a tool call is open is suspended as waiting for it", async () => {
  const id = await fresh();
  await assert.rejects(
    client.turn(id, (turn) => turn.append(toolCall("c", "read")), { reason: "done" }),
    ToolInFlight,
  );
  assert.equal((await client.read(id)).status, "suspended");
});

test("a tool is run once", async () => {
  const id = await fresh();
  const ran: unknown[] = [];
  const run = async () => {
    ran.push("ran");
    return { text: NaN };
  };
  for (let turns = 0; turns < 2; turns++) {
    await client.turn(id, async (turn) => {
      const call = await turn.tool("c", "read", { path: "a" }, run, { expectedS: 2.5 });
      assert.deepEqual([call.state, call.expected_s, call.result], ["done", 2.5, { output: { text: "NaN" } }]);
      await assert.rejects(turn.tool("c", "write", { path: "a" }, run), ToolCallReused);
    });
  }
  assert.deepEqual(ran, ["ran"]);
});

test("what a tool throws is reported, and thrown", async () => {
  const id = await fresh();
  await client.turn(id, async (turn) => {
    const failing = () => {
      throw new RangeError("too far");
    };
    await assert.rejects(turn.tool("c", "read", null, failing), RangeError);
    const call = await turn.tool("c", "read", null, failing);
    assert.deepEqual([call.state, call.result], ["failed", { error: "RangeError: too far" }]);
  });
});

test("a turn that is begun by hand is ended once, also by a block that ends", async () => {
  const id = await fresh();
  const { fetch, sent } = intercepted(async (_, send) => send());
  {
    await using turn = await connect({ fetch }).begin(id);
    await assert.rejects(client.resume(id), SessionBusy);
    await Promise.all([turn.end("other"), turn.end()]);
  }
  assert.deepEqual(sent.map(({ path }) => path.split("/").at(-1)), ["resume", "suspend"]);
  assert.equal((sent[1]?.body as { reason: string }).reason, "other");
});

test("a turn waits for a busy session as long as it says", async () => {
  const id = await fresh();
  const first = await client.begin(id);
  const second = client.begin(id, { on_busy: "wait", busy_timeout_ms: 30_000 });
  await first.end();
  await (await second).end();
});

test("without a live engine a turn has no base URL", async () => {
  const { id } = await client.createSession({ model: "served by none" });
  await client.turn(id, (turn) => {
    assert.throws(() => turn.baseUrl, EngineUnreachable);
  });
});

test("a lease is renewed until it is lost, which the turn's signal says", async () => {
  const id = await fresh();
  let renewed = 0;
  const { fetch } = intercepted(async ({ path }, send) => {
    if (!path.endsWith("/renew")) return send();
    renewed += 1;
    if (renewed === 1) throw broken("ECONNRESET");
    return renewed < 4 ? answer({}) : problem("lease-lost", 409);
  });
  const turn = await connect({ fetch, retries: 0 }).begin(id, { lease_ttl_s: 0.03 });
  const lost = new Promise((resolve) => turn.signal.addEventListener("abort", resolve));
  assert.equal(turn.leaseLost, false);
  // The renewals alone keep no process alive.
  const awake = setInterval(() => undefined, 1000);
  await lost;
  clearInterval(awake);
  assert.equal(turn.leaseLost, true);
  assert.ok(turn.signal.reason instanceof LeaseLost);
  assert.equal(renewed, 4);
  await turn.end().catch((error: unknown) => assert.ok(error instanceof AgentStateError));
});

test("a turn whose beginning is aborted gives back the lease that it may have taken", async () => {
  const id = await fresh();
  const ending = new AbortController();
  const { fetch, sent } = intercepted(async ({ path }, send) => {
    const answered = await send();
    if (path.endsWith("/resume") && !ending.signal.aborted) ending.abort(new Error("enough"));
    return answered;
  });
  await assert.rejects(connect({ fetch }).begin(id, { signal: ending.signal }), /enough/);
  // The lease that was taken is released by and by.
  const next = await client.begin(id, { on_busy: "wait", busy_timeout_ms: 30_000 });
  await next.end();
  assert.deepEqual(sent.map(({ path }) => path.split("/").at(-1)), ["resume", "resume", "suspend"]);
  const keys = sent.slice(0, 2).map(({ headers }) => headers["Idempotency-Key"]);
  assert.equal(new Set(keys).size, 1);
});

test("who waits for the KV learns how its flush ended", async () => {
  const kv = { state: "pending", tokens: 0, pages: 0, bytes: 0, durable_on: null, reason: null };
  const states = ["running", "done"];
  let result: object | null = { state: "durable", tokens: 64, pages: 1, bytes: 9, durable_on: "node" };
  const { fetch } = intercepted(async ({ path }, send) => {
    if (path.startsWith("/v1/operations/")) return answer({ id: "op_1", state: states.shift() ?? "failed", result });
    const answered = await send();
    if (!path.endsWith("/suspend")) return answered;
    return answer({ ...((await answered.json()) as object), operation: "op_1", kv });
  });
  const { id } = await client.createSession({ model: MODEL });
  const turn = await connect({ fetch }).turn(id, () => undefined);
  assert.deepEqual(await turn.waitDurable(), { ...kv, ...result });
  result = null;
  assert.equal((await turn.waitDurable()).state, "unknown");
  states.push("running", "running");
  await assert.rejects(turn.waitDurable({ timeoutS: 0 }), /still running after 0 s/);
});
