import assert from "node:assert/strict";
import { test } from "node:test";
import {
  AgentStateError,
  InvalidEntry,
  InvalidId,
  message,
  RequestRefused,
  RevisionStale,
  SessionError,
  SessionExists,
  SessionNotFound,
  toolOutput,
} from "@agentstate/client";
import { answer, connect, freshId, intercepted, MODEL, problem } from "./helpers.js";

const client = connect();

test("a session is created, read, changed and deleted", async () => {
  const id = freshId();
  const made = await client.createSession({ model: MODEL, id, metadata: { user: "ann", draft: 1 } });
  assert.deepEqual([made.id, made.model, made.status], [id, MODEL, "idle"]);
  assert.deepEqual(await client.ensureSession(id, MODEL), made);
  await assert.rejects(client.createSession({ model: MODEL, id }), SessionExists);
  const changed = await client.update(id, made.revision, { metadata: { draft: null } });
  assert.deepEqual(changed.metadata, { user: "ann" });
  await assert.rejects(client.delete(id, made.revision), RevisionStale);
  await client.delete(id, changed.revision);
  await assert.rejects(client.read(id), SessionNotFound);
});

test("ids go through paths whole", async () => {
  for (const id of [`a/b c%2F?#${freshId()}`, `ü-${freshId()}`, `...${freshId()}`]) {
    await client.createSession({ model: MODEL, id });
    assert.equal((await client.read(id)).id, id);
  }
});

test("an id that a URL would lose is refused before anything is sent", async () => {
  const { fetch, sent } = intercepted(async () => answer({}));
  for (const id of ["", ".", "..", "\ud800"]) {
    assert.throws(() => connect({ fetch }).delete(id, "*"), InvalidId);
  }
  assert.deepEqual(sent, []);
});

test("lists are paged", async () => {
  const id = freshId();
  await client.createSession({ model: MODEL, id });
  const { lease } = await client.resume(id);
  await client.append(id, lease, [1, 2, 3].map((number) => message({ number })));
  const first = await client.entries(id, { limit: 2 });
  assert.deepEqual([first.data.map((entry) => entry.seq), first.has_more], [[1, 2], true]);
  const rest = await client.entries(id, { after: first.last_id ?? "" });
  assert.deepEqual([rest.data.map((entry) => entry.payload["number"]), rest.has_more], [[3], false]);
  assert.ok((await client.listSessions({ limit: 1, order: "desc" })).data.length === 1);
});

test("a fork shares the history, and a rewind takes entries back", async () => {
  const id = freshId();
  await client.createSession({ model: MODEL, id });
  const turn = await client.turn(id, (turn) => turn.append(message({ n: 1 }), message({ n: 2 })));
  const [first] = (await client.entries(id)).data;
  assert.ok(first !== undefined && turn.suspended !== undefined);
  const fork = await client.fork(id, { revision: turn.suspended.revision, at: first.id });
  assert.deepEqual((await client.entries(fork.id)).data.map((entry) => entry.id), [first.id]);
  const { revision } = await client.read(id);
  assert.equal((await client.rewind(id, { at: first.id, revision })).head_id, first.id);
});

test("a turn by hand: resume, renew, claim and finish a tool call, append, suspend, prefetch, demote", async () => {
  const { id } = await client.createSession({ model: MODEL, id: freshId() });
  const { lease } = await client.resume(id, { tail: 0, lease_ttl_s: 60 });
  assert.equal((await client.renew(id, lease, { lease_ttl_s: 600 })).epoch, lease.epoch);
  const call = await client.claimToolCall(id, "c/1", { name: "read", arguments: { path: "a" }, lease });
  assert.deepEqual([call.id, call.state], ["c/1", "claimed"]);
  assert.equal((await client.finishToolCall(id, "c/1", { error: "gone", lease })).state, "failed");
  await client.append(id, lease, [message({ n: 1 })]);
  assert.equal((await client.suspend(id, lease, { reason: "done" })).status, "suspended");
  const operation = await client.prefetch(id, { tier: "host", due_ms: 1000 });
  const ended = await client.waitOperation(operation.id, { timeoutS: 300 });
  assert.deepEqual([ended.kind, ended.session_id], ["prefetch", id]);
  assert.equal((await client.demote(id)).kind, "demote");
});

test("where its KV is, its pins, its operations and engines are told", async () => {
  const id = freshId();
  await client.createSession({ model: MODEL, id });
  assert.equal((await client.kv(id)).session_id, id);
  assert.equal((await client.pin(id, { tier: "host", ttl_s: 60 })).session_id, id);
  assert.equal(await client.unpin(id), undefined);
  assert.equal((await client.activity(id, "opened")).session_id, id);
  const [engine] = (await client.engines()).data;
  assert.ok(engine?.live);
  assert.equal((await client.decisions(engine.id)).object, "list");
  assert.ok((await client.overview()).engines.some((one) => one.id === engine.id));
  assert.equal((await client.sessionOverviews({ search: id })).data[0]?.id, id);
  await assert.rejects(client.operation("op_none"), { code: "operation-not-found", status: 404 });
});

test("a problem is an instance of the class that has its code", async () => {
  const busy = problem("session-busy", 409, { retryable: true, revision: "7", retry_after_s: 2.5 });
  const { fetch } = intercepted(async () => busy.clone());
  await assert.rejects(connect({ fetch }).resume("s"), (error: AgentStateError) => {
    assert.ok(error instanceof SessionError && error.name === "SessionBusy" && error.message === "told");
    const { code, status, retryable, revision, retryAfterS } = error;
    assert.deepEqual([code, status, retryable, revision, retryAfterS], ["session-busy", 409, true, "7", 2.5]);
    return true;
  });
});

test("a problem that is not known keeps its code, and any other answer its status", async () => {
  let told = problem("of-a-later-release", 409);
  const { fetch } = intercepted(async () => told);
  const expected = { name: "RequestRefused", code: "of-a-later-release", message: "of-a-later-release: told" };
  await assert.rejects(connect({ fetch }).read("s"), expected);
  for (const text of ["<html>no</html>", '{"type": 1}', "null"]) {
    told = new Response(text, { status: 409 });
    await assert.rejects(connect({ fetch }).read("s"), (error) => {
      assert.ok(error instanceof RequestRefused && error.status === 409 && error.message === `HTTP 409: ${text}`);
      return true;
    });
  }
});

test("what is refused as malformed says where", async () => {
  await assert.rejects(client.createSession({ model: "" }), { name: "RequestRefused", code: "invalid-request" });
});

test("numbers that JSON has no form of are named in outputs, and refused elsewhere", async () => {
  assert.deepEqual(toolOutput("c", { mean: NaN, range: [-Infinity, Infinity], no: undefined }).payload, {
    output: { mean: "NaN", range: ["-Infinity", "Infinity"] },
  });
  assert.deepEqual(toolOutput("c", undefined).payload, { output: null });
  const id = freshId();
  await client.createSession({ model: MODEL, id });
  const cycle: Record<string, unknown> = {};
  cycle["self"] = cycle;
  await client.turn(id, async (turn) => {
    for (const bad of [NaN, 1n, cycle]) await assert.rejects(turn.append(message({ bad })), InvalidEntry);
    await turn.append(message({ text: "\ud800" }));
  });
  assert.deepEqual((await client.entries(id)).data.map((entry) => entry.payload), [{ text: "\ud800" }]);
});

test("a key is sent as a bearer token, and redirects are not followed with it", async () => {
  const { fetch, sent } = intercepted(async (_, __, request) => {
    assert.equal(request.redirect, "manual");
    return new Response(null, { status: 307, headers: { Location: "http://elsewhere.example/" } });
  });
  await assert.rejects(connect({ fetch, apiKey: "ags_1" }).read("s"), { name: "NotAgentState", status: 307 });
  assert.deepEqual(sent.map(({ headers }) => headers["Authorization"]), ["Bearer ags_1"]);
});
