import { finite } from "./documents.js";
import { waitOperation } from "./operations.js";
import { EngineUnreachable, LeaseLost, ToolInFlight } from "./problems.js";
import type {
  AppendedEntries,
  Entry,
  Lease,
  NewEntry,
  Operation,
  Outlook,
  Resumed,
  ResumeSession,
  Session,
  StoredKv,
  Suspended,
  SuspendSession,
  ToolCall,
} from "./schema.js";
import * as routes from "./routes.js";
import { once, type Call, type CallOptions, type Transport } from "./transport.js";

/** How a turn begins and ends. */
export interface TurnOptions
  extends CallOptions,
    Pick<ResumeSession, "tail" | "on_busy" | "busy_timeout_ms" | "prefetch" | "expect">,
    Partial<Pick<SuspendSession, "reason" | "kv" | "durable_timeout_ms" | "durability">> {
  /** The lease lapses so long after this process has vanished. 60 by default. */
  lease_ttl_s?: number;
}

const RENEWALS_PER_TTL = 3;

/**
 * A turn: the period in which this process runs a session. `Client.turn` and `Client.begin` make it.
 *
 * A timer renews the lease meanwhile. Work that blocks the event loop for longer than `lease_ttl_s` loses the lease.
 */
export class Turn implements AsyncDisposable {
  /** All that the resume answered. */
  readonly resumed: Resumed;
  /** Why the turn ends. May be set while it runs. */
  reason: SuspendSession["reason"];
  /** What the suspend at the end of the turn answered; undefined before. */
  suspended: Suspended | undefined;
  /** Aborted once the lease is known to be lost: another process may run the session, and appends fail. */
  readonly signal: AbortSignal;

  readonly #transport: Transport;
  readonly #options: TurnOptions;
  readonly #lost = new AbortController();
  #timer: ReturnType<typeof setTimeout> | undefined;
  #ending: Promise<Suspended> | undefined;

  private constructor(transport: Transport, resumed: Resumed, options: TurnOptions) {
    this.resumed = resumed;
    this.reason = options.reason ?? "user_wait";
    this.signal = this.#lost.signal;
    this.#transport = transport;
    this.#options = options;
    this.#renewLater();
  }

  /** @internal */
  static async begin(transport: Transport, sessionId: string, options: TurnOptions): Promise<Turn> {
    const { tail, on_busy, busy_timeout_ms, prefetch, expect, lease_ttl_s = 60 } = options;
    const body = { tail, on_busy, busy_timeout_ms, prefetch, expect, lease_ttl_s };
    const resumption = once(routes.resume(sessionId, body));
    try {
      return new Turn(transport, await transport.json(resumption, options), options);
    } catch (error) {
      // It may take, or have taken, the lease after all.
      if (options.signal?.aborted) void withdraw(transport, resumption, options);
      throw error;
    }
  }

  get session(): Session {
    return this.resumed.session;
  }

  get lease(): Lease {
    return this.resumed.lease;
  }

  /** The newest entries as of the resume, the oldest first: as many as `tail` asked for. */
  get entries(): Entry[] {
    return this.resumed.entries.data;
  }

  /** Calls without a result as of the resume: another process claimed them, and they may or may not have run. */
  get pendingToolCalls(): string[] {
    return this.resumed.pending_tool_calls;
  }

  /** How much of the session's KV can be restored, as of the resume. */
  get kv(): Outlook {
    return this.resumed.kv;
  }

  get leaseLost(): boolean {
    return this.signal.aborted;
  }

  /** The URL of the engine's OpenAI API. Throws EngineUnreachable if no live engine serves the model. */
  get baseUrl(): string {
    return this.#engine.base_url;
  }

  /** What every model call of the turn has to have in its body. Throws EngineUnreachable. */
  get extraBody(): Record<string, string> {
    return this.#engine.extra_body;
  }

  get #engine() {
    const { engine, session } = this.resumed;
    if (engine === null) {
      throw new EngineUnreachable(
        `no live engine serves ${JSON.stringify(session.model)}, the model of session ${session.id}: ` +
          "start one with `agentstate engine`, and resume the session again",
      );
    }
    return engine;
  }

  /** Append entries, all or none; they are stored once this returns. Throws LeaseLost, InvalidEntry. */
  append(...entries: NewEntry[]): Promise<AppendedEntries> {
    return this.#transport.json(routes.append(this.session.id, this.lease, entries));
  }

  /**
   * Run a tool once: claim the call, `run` it, and report its output. Its `result` has the output.
   *
   * `expectedS` is how long it is expected to take. If the call has a result already, nothing is run. What `run` throws
   * is reported as the call's error, and thrown. Throws ToolCallClaimed, ToolCallUnknown, ToolCallReused, LeaseLost.
   */
  async tool(
    callId: string,
    name: string,
    args: unknown,
    run: () => unknown,
    { expectedS }: { expectedS?: number } = {},
  ): Promise<ToolCall> {
    const claim = { name, arguments: args ?? null, expected_s: expectedS ?? null, lease: routes.proof(this.lease) };
    const call = await this.#transport.json<ToolCall>(routes.claimToolCall(this.session.id, callId, claim));
    if (call.state !== "claimed") return call;
    let output: unknown;
    try {
      output = await run();
    } catch (error) {
      const failure = error instanceof Error ? `${error.name}: ${error.message}` : String(error);
      // What the tool threw is what the caller has to see; a call without a result is `unknown` later.
      await this.#finish(callId, { error: failure }).catch(() => undefined);
      throw error;
    }
    const document = finite(output);
    // The service does not repeat what was just reported.
    return { ...(await this.#finish(callId, { output: document })), result: { output: document } };
  }

  #finish(callId: string, result: { output: unknown } | { error: unknown }): Promise<ToolCall> {
    const body = { ...result, lease: routes.proof(this.lease) };
    return this.#transport.json(routes.finishToolCall(this.session.id, callId, body));
  }

  /**
   * End the turn: suspend the session. Safe to call again. A turn that is `done` while a tool call has no result is
   * suspended as `tool_wait`, and throws ToolInFlight. Throws LeaseLost.
   */
  end(reason: SuspendSession["reason"] = this.reason): Promise<Suspended> {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    return (this.#ending ??= this.#end(reason));
  }

  async #end(reason: SuspendSession["reason"]): Promise<Suspended> {
    try {
      return (this.suspended = await this.#transport.json<Suspended>(suspension(this.resumed, reason, this.#options)));
    } catch (error) {
      if (!(error instanceof ToolInFlight)) throw error;
      this.suspended = await this.#transport.json(suspension(this.resumed, "tool_wait", this.#options));
      throw error;
    }
  }

  /** For `await using`. It does not see whether the block has thrown. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.end();
  }

  /** After the end: wait for the flush, and return what is stored of the session. Throws where that takes longer. */
  async waitDurable({ timeoutS = 60 }: { timeoutS?: number } = {}): Promise<StoredKv> {
    const { suspended } = this;
    if (suspended === undefined) throw new Error(`the turn of session ${this.session.id} has not ended by a suspend`);
    if (suspended.operation === null || suspended.kv.state !== "pending") return suspended.kv;
    const operation = await waitOperation(this.#transport, suspended.operation, { timeoutS });
    return settled(suspended.kv, operation);
  }

  #renewLater(): void {
    const ttlS = this.#options.lease_ttl_s ?? 60;
    this.#timer = setTimeout(() => void this.#renew(ttlS), (ttlS / RENEWALS_PER_TTL) * 1000);
    // The renewals alone do not keep a process alive.
    if (typeof this.#timer === "object") (this.#timer as { unref?: () => void }).unref?.();
  }

  async #renew(ttlS: number): Promise<void> {
    try {
      await this.#transport.json(routes.renew(this.session.id, this.lease, { lease_ttl_s: ttlS }));
    } catch (error) {
      if (error instanceof LeaseLost) {
        if (this.#ending === undefined) this.#lost.abort(error);
        return;
      }
      // The service may be back before the lease lapses.
    }
    if (this.#ending === undefined) this.#renewLater();
  }
}

function suspension(resumed: Resumed, reason: SuspendSession["reason"], options: TurnOptions): Call {
  const { kv, durable_timeout_ms, durability } = options;
  const body = { reason, kv, durable_timeout_ms, durability };
  return once(routes.suspend(resumed.session.id, resumed.lease, body));
}

/** Give back the lease that a resume may have taken after all. */
async function withdraw(transport: Transport, resumption: Call, options: TurnOptions): Promise<void> {
  try {
    // If it took no lease so far, it must not wait for one.
    const resumed = await transport.json<Resumed>(once(resumption, { Prefer: "wait=0" }));
    await transport.json(suspension(resumed, "user_wait", options));
  } catch {
    // Then nothing was taken, or the lease lapses.
  }
}

function settled(kv: StoredKv, operation: Operation): StoredKv {
  const result = operation.result ?? {};
  if (typeof result["state"] !== "string" || typeof result["tokens"] !== "number") return { ...kv, state: "unknown" };
  return { ...kv, ...result };
}
