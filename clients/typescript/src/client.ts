import { follow, type SessionEvent } from "./events.js";
import { finite } from "./documents.js";
import { waitOperation } from "./operations.js";
import { SessionExists } from "./problems.js";
import * as routes from "./routes.js";
import type {
  AppendedEntries,
  CreateSession,
  DecisionList,
  EngineList,
  EntryList,
  Lease,
  NewEntry,
  Operation,
  Overview,
  Pinned,
  PinKv,
  Placement,
  PrefetchPages,
  Resumed,
  Session,
  SessionList,
  SessionOverviewList,
  Signal,
  Signalled,
  Suspended,
  ToolCall,
  UpdateSession,
} from "./schema.js";
import { Transport, type CallOptions, type ClientOptions } from "./transport.js";
import { Turn, type TurnOptions } from "./turn.js";

/**
 * A connection to one service: a method a route.
 *
 * Parameters and answers have the API's own names. Every method may throw ServiceUnreachable (no answer in time; the
 * service may still have carried out the request), RequestRefused (the request itself is malformed), DatabaseError, and
 * the errors that it names. A request that failed in transit is repeated up to `retries` times if that cannot carry it
 * out twice: all but `update` and `delete`.
 */
export class Client {
  readonly #transport: Transport;

  constructor(baseUrl: string, options: ClientOptions = {}) {
    this.#transport = new Transport(baseUrl, options);
  }

  /** The base URL of the gateway, for a client of OpenAI's API. */
  get gatewayUrl(): string {
    return `${this.#transport.baseUrl}/v1`;
  }

  /** The headers that name a session to the gateway. */
  gatewayHeaders(sessionId: string): Record<string, string> {
    return { "X-AgentState-Session": encodeURIComponent(sessionId) };
  }

  /** Create a session. Throws SessionExists when the caller's own `id` is taken. */
  createSession(session: CreateSession, options?: CallOptions): Promise<Session> {
    return this.#transport.json(routes.createSession(session), options);
  }

  /** The session of that id, created with `model` and the rest if there is none. */
  async ensureSession(
    sessionId: string,
    model: string,
    rest: Omit<CreateSession, "id" | "model"> = {},
    options?: CallOptions,
  ): Promise<Session> {
    try {
      return await this.createSession({ ...rest, id: sessionId, model }, options);
    } catch (error) {
      if (!(error instanceof SessionExists)) throw error;
      return this.read(sessionId, options);
    }
  }

  /** One page of the sessions that have not expired, by id; continue with `after: page.last_id`. */
  listSessions(page: routes.Page = {}, options?: CallOptions): Promise<SessionList> {
    return this.#transport.json(routes.listSessions(page), options);
  }

  /** A session without its entries. Throws SessionNotFound, SessionExpired. */
  read(sessionId: string, options?: CallOptions): Promise<Session> {
    return this.#transport.json(routes.read(sessionId), options);
  }

  /** Change keys of the metadata (null removes a key), and the expiry. Throws RevisionStale. */
  update(sessionId: string, revision: string, changes: UpdateSession, options?: CallOptions): Promise<Session> {
    return this.#transport.json(routes.update(sessionId, changes, revision), options);
  }

  /** Delete a session; its forks keep what they share with it. Throws RevisionStale, SessionBusy. */
  delete(sessionId: string, revision: string, options?: CallOptions): Promise<void> {
    return this.#transport.json(routes.remove(sessionId, revision), options);
  }

  /** One page of the transcript; continue with `after: page.last_id` while it `has_more`. Throws EntryNotFound. */
  entries(sessionId: string, page: routes.Page = {}, options?: CallOptions): Promise<EntryList> {
    return this.#transport.json(routes.entries(sessionId, page), options);
  }

  /**
   * Append entries, all or none. Make them with `message`, `toolCall`, `toolOutput`, `toolError`, `note`, or by hand.
   * Throws LeaseLost, InvalidEntry.
   */
  append(sessionId: string, lease: Lease, entries: NewEntry[], options?: CallOptions): Promise<AppendedEntries> {
    return this.#transport.json(routes.append(sessionId, lease, entries), options);
  }

  /** Take the session's lease. Throws SessionBusy, ModelMismatch, RevisionStale. */
  resume(sessionId: string, wanted: routes.Resume = {}, options?: CallOptions): Promise<Resumed> {
    return this.#transport.json(routes.resume(sessionId, wanted), options);
  }

  /** Renew the lease. Throws LeaseLost. */
  renew(sessionId: string, lease: Lease, wanted: routes.Renew = {}, options?: CallOptions): Promise<Lease> {
    return this.#transport.json(routes.renew(sessionId, lease, wanted), options);
  }

  /** End the turn. Throws LeaseLost, ToolInFlight. */
  suspend(sessionId: string, lease: Lease, wanted: routes.Suspend = {}, options?: CallOptions): Promise<Suspended> {
    return this.#transport.json(routes.suspend(sessionId, lease, wanted), options);
  }

  /** Create a session that shares this one's history, and KV, up to an entry. Throws RevisionStale, NotABranchPoint. */
  fork(sessionId: string, wanted: routes.Fork, options?: CallOptions): Promise<Session> {
    return this.#transport.json(routes.fork(sessionId, wanted), options);
  }

  /**
   * Make the entry `at` the head again, and take back the entries after it (null: all entries). Needs the `lease` while
   * a turn is running. Throws RevisionStale, EntryNotFound, NotABranchPoint, SessionBusy, ToolInFlight.
   */
  rewind(sessionId: string, wanted: routes.Rewind, options?: CallOptions): Promise<Session> {
    return this.#transport.json(routes.rewind(sessionId, wanted), options);
  }

  /** Bring the session's KV back before a request needs it. The operation is already done if the KV is there. */
  prefetch(sessionId: string, wanted: PrefetchPages = {}, options?: CallOptions): Promise<Operation> {
    return this.#transport.json(routes.prefetch(sessionId, wanted), options);
  }

  /** Make the session's KV the first to leave the device. It stays where it is stored. Throws RateLimited. */
  demote(sessionId: string, options?: CallOptions): Promise<Operation> {
    return this.#transport.json(routes.demote(sessionId), options);
  }

  /** Where the session's KV is, what it waits for, and what would move it. */
  kv(sessionId: string, options?: CallOptions): Promise<Placement> {
    return this.#transport.json(routes.kv(sessionId), options);
  }

  /** Let the session's KV stay on a tier for so many seconds, in place of its pin before. Throws RateLimited. */
  pin(sessionId: string, wanted: PinKv, options?: CallOptions): Promise<Pinned> {
    return this.#transport.json(routes.pin(sessionId, wanted), options);
  }

  /** End the session's pin, if it has one. Throws RateLimited. */
  unpin(sessionId: string, options?: CallOptions): Promise<void> {
    return this.#transport.json(routes.unpin(sessionId), options);
  }

  /** Say what a person does who is going to go on with the session. Throws RateLimited. */
  activity(sessionId: string, kind: Signal["kind"], options?: CallOptions): Promise<Signalled> {
    return this.#transport.json(routes.activity(sessionId, kind), options);
  }

  /**
   * Claim a tool call, before executing it. Execute it only if its `state` is claimed. Needs the `lease` while a turn is
   * running. Throws ToolCallClaimed, ToolCallUnknown, ToolCallReused, SessionBusy, LeaseLost.
   */
  claimToolCall(sessionId: string, callId: string, claim: routes.Claim, options?: CallOptions): Promise<ToolCall> {
    const body = claim.lease == null ? claim : { ...claim, lease: routes.proof(claim.lease) };
    return this.#transport.json(routes.claimToolCall(sessionId, callId, body), options);
  }

  /**
   * Report a tool call's result: its `error` if there is one, else its `output`. Needs the `lease` while a turn is
   * running, and none otherwise. Throws ToolCallNotFound, ToolCallFinal, SessionBusy, LeaseLost.
   */
  finishToolCall(sessionId: string, callId: string, result: routes.Finish, options?: CallOptions): Promise<ToolCall> {
    const told = result.error == null ? { output: finite(result.output) } : { error: finite(result.error) };
    const body = result.lease == null ? told : { ...told, lease: routes.proof(result.lease) };
    return this.#transport.json(routes.finishToolCall(sessionId, callId, body), options);
  }

  /** Read an operation's state. Throws OperationNotFound. */
  operation(operationId: string, options?: CallOptions): Promise<Operation> {
    return this.#transport.json(routes.readOperation(operationId), options);
  }

  /** Poll until the operation is `done` or `failed`. Throws an Error after `timeoutS`; the operation then continues. */
  waitOperation(operationId: string, options: CallOptions & { timeoutS: number }): Promise<Operation> {
    return waitOperation(this.#transport, operationId, options);
  }

  /** The registered engine ranks, and which of them are live. */
  engines(options?: CallOptions): Promise<EngineList> {
    return this.#transport.json(routes.engines(), options);
  }

  /** What there is and what is wrong: how many sessions, the account's KV by tier, the engines. */
  overview(options?: CallOptions): Promise<Overview> {
    return this.#transport.json(routes.overview(), options);
  }

  /** At most 50 sessions with what they do and what is stored of them; continue with `after: list.next`. */
  sessionOverviews(choice: routes.Choice = {}, options?: CallOptions): Promise<SessionOverviewList> {
    return this.#transport.json(routes.sessionOverviews(choice), options);
  }

  /** One page of what an engine has decided lately about the caller's sessions, the oldest first. */
  decisions(engineId: string, page: Pick<routes.Page, "after" | "limit"> = {}, options?: CallOptions): Promise<DecisionList> {
    return this.#transport.json(routes.decisions(engineId, page), options);
  }

  /**
   * Follow a session: every entry after the seq `after`, once and in order; the session's state after a change; and
   * `rewind` when delivered entries were taken back. Ends when the session does, or when the loop is left.
   *
   * Opens the stream anew after a failure, however long the service or its database is away. Throws SessionNotFound,
   * SessionExpired, and EventsTrimmed if the session never had an entry `after`.
   */
  events(sessionId: string, { after = 0, ...options }: CallOptions & { after?: number } = {}): AsyncGenerator<SessionEvent, void> {
    return follow(this.#transport, sessionId, after, options);
  }

  /**
   * Run a session while `work` does: take the lease, renew it, and suspend the session at the end, even if `work`
   * throws. Returns the turn, which has ended.
   *
   * Throws what `resume` and `suspend` do. A turn whose `work` threw is suspended as `user_wait`; if that fails too, the
   * lease lapses, and what `work` threw is thrown all the same.
   */
  async turn(sessionId: string, work: (turn: Turn) => unknown, options: TurnOptions = {}): Promise<Turn> {
    const turn = await this.begin(sessionId, options);
    try {
      await work(turn);
    } catch (error) {
      await turn.end("user_wait").catch(() => undefined);
      throw error;
    }
    await turn.end();
    return turn;
  }

  /** A turn that the caller ends: `await using`, or `turn.end()`. Throws what `resume` does. */
  begin(sessionId: string, options: TurnOptions = {}): Promise<Turn> {
    return Turn.begin(this.#transport, sessionId, options);
  }
}
