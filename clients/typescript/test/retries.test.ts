import assert from "node:assert/strict";
import { test } from "node:test";
import { message } from "@agentstate/client";
import { answer, broken, connect, freshId, intercepted, MODEL, problem } from "./helpers.js";

test("a write whose answer is lost is carried out once", async () => {
  let losses = 2;
  const { fetch, sent } = intercepted(async (_, send) => {
    const answered = await send();
    if (losses-- > 0) throw broken("ECONNRESET");
    return answered;
  });
  const id = freshId();
  await connect().createSession({ model: MODEL, id });
  const { lease } = await connect().resume(id);
  const client = connect({ fetch });
  const added = await client.append(id, lease, [message({ n: 1 })]);
  assert.deepEqual((await connect().entries(id)).data, added.data);
  await client.append(id, lease, [message({ n: 2 })]);
  const keys = sent.map(({ headers }) => headers["Idempotency-Key"]);
  assert.equal(sent.length, 4);
  assert.equal(new Set(keys.slice(0, 3)).size, 1);
  assert.equal(new Set(keys).size, 2);
});

test("a write with a precondition is repeated only if it was not received", async () => {
  let code = "ECONNRESET";
  const { fetch, sent } = intercepted(async (_, send) => {
    if (sent.length === 1) throw broken(code);
    return send();
  });
  const id = freshId();
  const { revision } = await connect().createSession({ model: MODEL, id });
  await assert.rejects(connect({ fetch }).update(id, revision, {}), { name: "ServiceUnreachable", retryable: true });
  sent.length = 0;
  code = "ECONNREFUSED";
  assert.equal((await connect({ fetch }).update(id, revision, { metadata: { a: 1 } })).metadata["a"], 1);
});

test("every attempt has a deadline of its own", async () => {
  const { fetch, sent } = intercepted(async (_, __, { signal }) => {
    if (sent.length === 3) return answer({ id: "s" });
    return new Promise((_, reject) => signal?.addEventListener("abort", () => reject(signal.reason)));
  });
  assert.deepEqual(await connect({ fetch, timeoutS: 0.01 }).read("s"), { id: "s" });
  sent.length = 0;
  await assert.rejects(connect({ fetch, timeoutS: 0.01, retries: 1 }).read("s"), {
    name: "ServiceUnreachable",
    message: /did not answer GET \/v1\/sessions\/s: no answer within 0.01 s/,
  });
});

test("an answer that breaks off is none", async () => {
  const { fetch, sent } = intercepted(async () => {
    if (sent.length > 1) return answer({ id: "s" });
    const half = new ReadableStream({
      start(controller) {
        controller.enqueue(new TextEncoder().encode('{"id":'));
        controller.error(broken("ECONNRESET"));
      },
    });
    return new Response(half);
  });
  assert.deepEqual(await connect({ fetch }).read("s"), { id: "s" });
});

test("a service that is busy for a while is asked again after its Retry-After, unless that is long", async () => {
  const told = { retryable: true, retry_after_s: 0.001 };
  const { fetch, sent } = intercepted(async () =>
    sent.length === 1 ? problem("rate-limited", 429, told, { "Retry-After": "1" }) : answer({ id: "s" }),
  );
  const began = performance.now();
  assert.deepEqual(await connect({ fetch }).update("s", "*", {}), { id: "s" });
  assert.ok(performance.now() - began >= 990);
  const long = intercepted(async () => problem("rate-limited", 429, told, { "Retry-After": "60" }));
  await assert.rejects(connect({ fetch: long.fetch }).read("s"), { name: "RateLimited", retryAfterS: 0.001 });
  assert.equal(long.sent.length, 1);
});

test("a proxy without a service behind it is asked again", async () => {
  const { fetch, sent } = intercepted(async () => new Response("<html>", { status: 502 }));
  await assert.rejects(connect({ fetch, retries: 1 }).read("s"), { name: "RequestRefused", status: 502 });
  assert.equal(sent.length, 2);
});

test("whoever answers and is no service is named with the answer, at once", async () => {
  const page = { "Content-Type": "text/html; charset=utf-8" };
  const others = [
    [new Response("<html>\n</html>", { headers: page }), "200 text/html"],
    [new Response(null, { status: 302, headers: { Location: "/login" } }), "302 to /login"],
    [new Response("<html>", { status: 404, headers: page }), "404 text/html"],
    [answer({ detail: "Not Found" }, 404, { "Content-Type": "application/json" }), "404 application/json"],
  ] as const;
  for (const [response, said] of others) {
    const { fetch, sent } = intercepted(async () => response.clone());
    const client = connect({ fetch });
    const expected = { name: "NotAgentState", retryable: false, message: new RegExp(`no AgentState.* with ${said}$`) };
    await assert.rejects(client.read("s"), expected);
    await assert.rejects(client.events("s").next(), expected);
    assert.equal(sent.length, 2, said);
  }
});

test("what will not change is not asked again", async () => {
  for (const code of ["session-busy", "lease-lost", "too-many-sessions", "internal-error"]) {
    const told = { retryable: code === "session-busy" };
    const { fetch, sent } = intercepted(async () => problem(code, code === "too-many-sessions" ? 429 : 409, told));
    await assert.rejects(connect({ fetch }).resume("s"), { code });
    assert.equal(sent.length, 1, code);
  }
});

test("a call ends with its signal, also while it waits to be repeated", async () => {
  const ending = new AbortController();
  const { fetch } = intercepted(async () => {
    setImmediate(() => ending.abort(new Error("enough")));
    throw broken("ECONNREFUSED");
  });
  await assert.rejects(connect({ fetch, retries: 1000 }).read("s", { signal: ending.signal }), /enough/);
});
