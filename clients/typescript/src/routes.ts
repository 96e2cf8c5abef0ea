// The routes of the HTTP API: what each sends, and when repeating that is harmless.

import type {
  ClaimToolCall,
  CreateSession,
  FinishToolCall,
  ForkSession,
  Lease,
  LeaseProof,
  NewEntry,
  PinKv,
  PrefetchPages,
  RenewLease,
  ResumeSession,
  RewindSession,
  Signal,
  SuspendSession,
  UpdateSession,
} from "./schema.js";
import { Repeat, segment, type Call } from "./transport.js";

/** Which page of a list. */
export interface Page {
  /** The `last_id` of the page before. */
  after?: string;
  limit?: number;
  order?: "asc" | "desc";
}

/** The last revision that the caller has seen, or `*` for any. */
export type Revision = string;

export type Resume = ResumeSession & { revision?: Revision };
export type Renew = Omit<RenewLease, "lease">;
export type Suspend = Partial<Omit<SuspendSession, "lease">>;
export type Fork = ForkSession & { revision: Revision };
export type Rewind = Pick<RewindSession, "at"> & { revision: Revision; lease?: Lease };
export type Claim = Omit<ClaimToolCall, "lease"> & { lease?: LeaseProof | null };
export type Finish = Omit<FinishToolCall, "lease"> & { lease?: LeaseProof | null };

const DURABLE_TIMEOUT_MS = 500;

export function createSession(body: CreateSession): Call {
  return { method: "POST", path: "/v1/sessions", repeat: Repeat.Keyed, body };
}

export function listSessions(page: Page): Call {
  return { method: "GET", path: "/v1/sessions", repeat: Repeat.Read, query: { ...page } };
}

export function read(id: string): Call {
  return { method: "GET", path: session(id), repeat: Repeat.Read };
}

export function update(id: string, body: UpdateSession, revision: Revision): Call {
  return { method: "PATCH", path: session(id), repeat: Repeat.Never, body, headers: seen(revision) };
}

export function remove(id: string, revision: Revision): Call {
  return { method: "DELETE", path: session(id), repeat: Repeat.Never, headers: seen(revision) };
}

export function entries(id: string, page: Page): Call {
  return { method: "GET", path: session(id, "entries"), repeat: Repeat.Read, query: { ...page } };
}

export function append(id: string, lease: Lease, added: NewEntry[]): Call {
  const body = { lease: proof(lease), entries: added };
  return { method: "POST", path: session(id, "entries"), repeat: Repeat.Keyed, body };
}

export function resume(id: string, { revision, ...body }: Resume): Call {
  const waitS = body.on_busy === "wait" ? (body.busy_timeout_ms ?? 10_000) / 1000 : 0;
  const headers = revision === undefined ? {} : seen(revision);
  return { method: "POST", path: session(id, "resume"), repeat: Repeat.Keyed, body, headers, waitS };
}

export function renew(id: string, lease: Lease, body: Renew): Call {
  return {
    method: "POST",
    path: session(id, "lease", "renew"),
    repeat: Repeat.Read,
    body: { ...body, lease: proof(lease) },
  };
}

export function suspend(id: string, lease: Lease, { reason = "user_wait", ...rest }: Suspend): Call {
  const body = { ...rest, reason, lease: proof(lease) };
  const waitS = (rest.durable_timeout_ms ?? DURABLE_TIMEOUT_MS) / 1000;
  return { method: "POST", path: session(id, "suspend"), repeat: Repeat.Keyed, body, waitS };
}

export function fork(id: string, { revision, ...body }: Fork): Call {
  return { method: "POST", path: session(id, "forks"), repeat: Repeat.Keyed, body, headers: seen(revision) };
}

export function rewind(id: string, { at, revision, lease }: Rewind): Call {
  const body = { at, ...(lease === undefined ? {} : { lease: proof(lease) }) };
  return { method: "POST", path: session(id, "rewind"), repeat: Repeat.Keyed, body, headers: seen(revision) };
}

export function prefetch(id: string, body: PrefetchPages): Call {
  return { method: "POST", path: session(id, "prefetch"), repeat: Repeat.Keyed, body };
}

export function demote(id: string): Call {
  return { method: "POST", path: session(id, "kv", "demote"), repeat: Repeat.Keyed, body: {} };
}

export function kv(id: string): Call {
  return { method: "GET", path: session(id, "kv"), repeat: Repeat.Read };
}

export function pin(id: string, body: PinKv): Call {
  return { method: "POST", path: session(id, "kv", "pin"), repeat: Repeat.Read, body };
}

export function unpin(id: string): Call {
  return { method: "DELETE", path: session(id, "kv", "pin"), repeat: Repeat.Read };
}

export function activity(id: string, kind: Signal["kind"]): Call {
  return { method: "POST", path: session(id, "activity"), repeat: Repeat.Read, body: { kind } };
}

export function claimToolCall(id: string, callId: string, body: Claim): Call {
  return { method: "PUT", path: session(id, "tool-calls", segment(callId)), repeat: Repeat.Keyed, body };
}

export function finishToolCall(id: string, callId: string, body: Finish): Call {
  return { method: "PUT", path: session(id, "tool-calls", segment(callId), "result"), repeat: Repeat.Keyed, body };
}

export function readOperation(id: string): Call {
  return { method: "GET", path: `/v1/operations/${segment(id)}`, repeat: Repeat.Read };
}

export function engines(): Call {
  return { method: "GET", path: "/v1/engines", repeat: Repeat.Read };
}

export function overview(): Call {
  return { method: "GET", path: "/v1/overview", repeat: Repeat.Read };
}

export interface Choice {
  state?: "running" | "lapsed" | "suspended" | "idle";
  sort?: "newest" | "oldest" | "id" | "-id";
  search?: string;
  after?: string;
}

export function sessionOverviews(choice: Choice): Call {
  return { method: "GET", path: "/v1/overview/sessions", repeat: Repeat.Read, query: { ...choice } };
}

export function decisions(engineId: string, page: Pick<Page, "after" | "limit">): Call {
  return { method: "GET", path: `/v1/engines/${segment(engineId)}/decisions`, repeat: Repeat.Read, query: { ...page } };
}

export function session(id: string, ...parts: string[]): string {
  return ["/v1/sessions", segment(id), ...parts].join("/");
}

/** What shows that the caller holds the lease. */
export function proof({ token, epoch }: LeaseProof): LeaseProof {
  return { token, epoch };
}

function seen(revision: Revision): Record<string, string> {
  return { "If-Match": revision === "*" ? revision : `"${revision}"` };
}
