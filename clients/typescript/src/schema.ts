// Written by generate.py from the service. Do not edit.

/** Whom a session's KV is charged to. */
export interface Account {
  /** The tenant, or its KV group; none if the engine knows no turn. */
  name: string;
  tiers: Partial<Record<"device" | "host" | "nvme", AccountTier>>;
}

export interface AccountTier {
  /** What the account has there, on the rank that answers; null where unknown. */
  bytes: number | null;
  /** What it may have there before it gives first; null: no limit. */
  limit: number | null;
}

/** What a person does before going on with a session. */
export type Activity = "typing" | "opened";

export interface AppendEntries {
  lease: LeaseProof;
  entries: NewEntry[];
}

export interface AppendedEntries {
  object?: "list";
  data: Entry[];
  first_id: string | null;
  last_id: string | null;
  /** Whether more follow in the direction read; for a tail, older ones. */
  has_more: boolean;
  /** The session's revision after the append. */
  revision: string;
}

export interface ClaimToolCall {
  name: string;
  arguments?: unknown;
  /** Its expected duration. */
  expected_s?: number | null;
  /** Needed while the session is being run. */
  lease?: LeaseProof | null;
}

export interface CreateSession {
  /** The name under which an engine serves the model. */
  model: string;
  /** An id of the caller's own. */
  id?: string | null;
  metadata?: Record<string, unknown>;
  /** Seconds from now. */
  expires_in_s?: number | null;
  /** Sessions with different salts share no pages. */
  cache_salt?: string | null;
  /** A second name that separates pages, like cache_salt. */
  extra_key?: string | null;
}

/** What an engine has decided about a session, or what became of that. */
export interface Decision {
  id: string;
  at: string;
  session_id: string;
  /** fetch, demote, evict, release or foresee. */
  decision: string;
  /**
   * Of a fetch: begun, there, used, late, left, wrong, cancelled. Of a demotion: begun, copied, failed. Of an
   * eviction: waited_for. Of a release: accepted, ignored. Of a forecast: ignored.
   */
  outcome: string;
  /** How many tokens of its context that is about. */
  tokens: number;
  /** What a byte of it was worth on the device then, per second. */
  index: number | null;
  /** Of a fetch: the largest index of what had to leave for it. */
  displaced: number | null;
}

export interface DecisionList {
  object?: "list";
  data: Decision[];
  first_id: string | null;
  last_id: string | null;
  has_more: boolean;
  /** Why the engine does not say what it has decided; null if it does. */
  silent: string | null;
}

/** Where a session's KV survives, or is asked to. */
export type Durability = "node" | "shared";

export interface Engine {
  id: string;
  node: string;
  rank: number;
  base_url: string;
  model: string;
  fingerprint: string;
  pages_dir: string;
  /** The URL of the store that it shares with others; empty: none. */
  shared_store?: string;
  /** The other nodes of its machine whose pages it can restore too. */
  reads?: string[];
  /** Its DP rank; `rank` is its number within that one. */
  dp_rank?: number;
  /** How many DP ranks its server has. */
  dp_size?: number;
  /** What it does of a request where prefill and decode are apart: `prefill` or `decode`; empty: both. */
  phase?: Phase;
  live: boolean;
  started_at: string;
  heartbeat_at: string;
}

/** The arguments that an OpenAI client needs for the session's next call to the engine. */
export interface EngineLink {
  base_url: string;
  extra_body: Record<string, string>;
  /**
   * The DP rank of the engine that the session goes to, which `session_id` names to it; null where it has only one.
   */
  dp_rank?: number | null;
}

export interface EngineList {
  object?: "list";
  data: Engine[];
  first_id: string | null;
  last_id: string | null;
  has_more?: false;
}

/** An engine: all ranks that answer under one base URL. */
export interface EngineOverview {
  /** The id of its first rank. */
  id: string;
  base_url: string;
  model: string;
  ranks: number;
  /** Whether all ranks send heartbeats. */
  live: boolean;
  /** Why it stores nothing; null if it does. */
  off: string | null;
  /** Why it does not answer; null if it does. */
  silent: string | null;
  /** Its page stores, of all tenants. Null but for administrators. */
  stored_bytes: number | null;
  /** Since the snapshot before. Null but for administrators. */
  restores_per_s: number | null;
  /** Since the snapshot before. Null but for administrators. */
  restored_bytes_per_s: number | null;
}

export interface Entry {
  id: string;
  session_id: string;
  parent_id: string | null;
  /** Grows along the history from 1; a rewind does not reuse the numbers it took back. */
  seq: number;
  kind: EntryKind;
  payload: Record<string, unknown>;
  call_id: string | null;
  created_at: string;
}

export type EntryKind = "message" | "tool_call" | "tool_result" | "note";

export interface EntryList {
  object?: "list";
  data: Entry[];
  first_id: string | null;
  last_id: string | null;
  /** Whether more follow in the direction read; for a tail, older ones. */
  has_more: boolean;
}

export interface Expectation {
  model: string;
}

/** The last time that the session's KV was brought to the device before a request. */
export interface Fetch {
  ago_s: number;
  index: number;
  /** The largest index of what had to leave the device for it. */
  displaced: number;
  tokens: number;
  /**
   * under way; there; used: the next request found it; late: that came before it; wasted: it failed, or left the
   * device unused.
   */
  outcome: string;
  /**
   * Of one that was wasted. left: it went although its request was still expected; wrong: that should have come by
   * then, or was not expected any more; cancelled: it came to nothing.
   */
  reason?: string;
}

/** Has either output or error. */
export interface FinishToolCall {
  output?: unknown;
  error?: unknown;
  /** Needed while the session is being run. */
  lease?: LeaseProof | null;
}

export interface ForkSession {
  /** The last entry to share; the head if not given. */
  at?: string | null;
  /** An id of the caller's own. */
  id?: string | null;
  /** The parent's if not given. */
  metadata?: Record<string, unknown> | null;
  /** Seconds from now. */
  expires_in_s?: number | null;
}

/** What an account has on a tier. */
export interface Held {
  /** On all engines that answer; null where none says. */
  bytes: number | null;
  /** What it may have there on one engine; null: no limit. */
  limit: number | null;
}

export interface HeldUntil {
  tier: "device" | "host" | "nvme";
  /** The pin expires this soon. */
  rest_s: number;
}

/** What is known of a session's KV outside of device memory. */
export type KvState = "durable" | "pending" | "partial" | "lost" | "unknown";

export interface KvTier {
  /** Tokens from the head of the session that are there, on every rank. */
  tokens: number;
  /** Their bytes, of all ranks. */
  bytes: number;
}

export interface Lease {
  token: string;
  epoch: number;
  expires_at: string;
}

export interface LeaseProof {
  token: string;
  epoch: number;
}

export interface NewEntry {
  kind: EntryKind;
  /**
   * A tool call has name, and may have arguments and expected_s; a tool result has either output or error; other
   * payloads are the caller's own.
   */
  payload: Record<string, unknown>;
  /** Of a tool call and its result. */
  call_id?: string | null;
}

export interface Operation {
  id: string;
  kind: string;
  session_id: string;
  state: OperationState;
  /** The outcome: state, tokens, pages, bytes and, of a flush, durable_on; or error. */
  result: Record<string, unknown> | null;
  created_at: string;
  finished_at: string | null;
  /** From its start to its end. */
  seconds?: number | null;
}

export type OperationState = "pending" | "running" | "done" | "failed";

export type Order = "asc" | "desc";

export interface Outlook {
  state: KvState;
  tokens: number;
  /** Whether the engine can use the stored pages; if not, it recomputes. */
  valid: boolean;
  invalid_reason: string | null;
  /** Whether tokens is an upper bound: after a fork or rewind, until the next turn. */
  upper_bound?: boolean;
  /**
   * Where all of the tokens are: node, on the drive of one node; shared, in the shared store, which outlives that.
   * Null where there are none.
   */
  durable_on?: Durability | null;
  /** The operation that brings the pages back, if asked for. */
  prefetch?: string | null;
}

/** What there is and what is wrong, as of one moment. */
export interface Overview {
  /** By the database's clock. A snapshot is at most ten seconds old. */
  taken_at: string;
  /** The caller's. */
  tenant: string;
  sessions: SessionCounts;
  /** Of the caller's account. */
  tiers: Partial<Record<"device" | "host" | "nvme", Held>>;
  engines: EngineOverview[];
  /**
   * Tokens of prompts since the engines started, by where they came from: device, fetched, host, nvme, recomputed.
   * Of all tenants: null but for administrators.
   */
  prompt_tokens: Record<string, number> | null;
  /** What is wrong, in sentences that say what to do. */
  alarms: string[];
  /** By name, at most 50. Null but for administrators. */
  tenants: TenantOverview[] | null;
  /** Whether there are more tenants than those. */
  more_tenants: boolean;
}

/** Tokens of a session's context that follow each other and are in the same places. */
export interface PagesPart {
  /** The number of its first token, from 0. */
  first: number;
  tokens: number;
  device: boolean;
  host: boolean;
  /** The file on the drive that they are read from; null: they are not there. */
  extent: string | null;
  /** The extent in the shared store; null: they are not there. */
  shared_extent: string | null;
}

/** `prefill` computes and restores prompts, and sends their KV to an engine that does `decode`. */
export type Phase = "" | "prefill" | "decode";

export interface PinKv {
  /** What stays on a tier stays on those below it, too. */
  tier?: PinTier;
  /** For how long; cut to the service's pin_max_s. */
  ttl_s: number;
}

export type PinTier = "device" | "host" | "nvme";

/** That a session's KV stays on a tier. */
export interface Pinned {
  session_id: string;
  /**
   * clipped: for less time, on a lower tier, or less of it on the drive; pending: its engine takes note with its
   * next heartbeat; ignored: too much is pinned, or its engine cannot pin.
   */
  state: "accepted" | "clipped" | "pending" | "ignored";
  /** The tier on which it stays. */
  tier: "device" | "host" | "nvme";
  expires_at: string;
  /** Tokens from the session's head that are pinned, on every rank. */
  tokens?: number;
  /** Their bytes, of all ranks. */
  bytes?: number;
}

/** Where a session's KV is, what it waits for, and why it is there. */
export interface Placement {
  session_id: string;
  /** The engine that was asked; null if none that is live has the session. */
  engine: string | null;
  /** Empty where no engine answers. */
  tiers: Partial<Record<"device" | "host" | "disk", KvTier>>;
  /** Null if none of its requests has ended on that engine lately. */
  wait?: Wait | null;
  /** What a byte of it is worth on the device, per second; the least leaves first. */
  index?: number | null;
  /** Its place among the contexts on the device: 1 leaves last. */
  place?: number | null;
  fetch?: Fetch | null;
  /** What was decided about it lately, and what became of that; the newest last. */
  decisions?: Decision[];
  /** What was restored of it lately, at most 20; the newest last. */
  restores?: Restore[];
  /** Where its tokens are on the engine's first rank, at most 256 parts. */
  page_map?: PagesPart[];
  /** Tokens beyond these parts. */
  more_tokens?: number;
  /** Null if it is not pinned. */
  pin?: HeldUntil | null;
  /** Tokens on the device that its last turns have left: they are the first to leave. */
  left_tokens?: number;
  /** Null from an engine of an earlier release. */
  account?: Account | null;
  /**
   * Where what can be restored of it is stored: node, on the drive of one node; shared, all of it in the shared
   * store. Null where nothing is.
   */
  durable_on?: Durability | null;
  /** What would move it, in words. */
  next?: string;
}

export interface PrefetchPages {
  tier?: Tier;
  /** When the pages are needed: what is needed sooner is read before them. The default is at once. */
  due_ms?: number | null;
  /** Fail after this time, when the pages are no longer useful. */
  deadline_ms?: number | null;
}

/** The body of an error. Conflicts also carry the session's `revision`. */
export interface Problem {
  type: string;
  title: string;
  status: number;
  detail: string;
  retryable: boolean;
  [more: string]: unknown;
}

export interface RenewLease {
  lease: LeaseProof;
  /** The default is the service's lease_ttl_s. */
  lease_ttl_s?: number | null;
}

/** That a session's pages were restored to the device. */
export interface Restore {
  /** When that had ended. */
  at: string;
  /**
   * request: under its request's forward; queued: for a queued one, before its forward; prefetch: before there was
   * one.
   */
  why: string;
  /** How many came from the host tier (host), the drive (nvme) and the shared store (shared). */
  tokens: Record<string, number>;
  /** As they were read, on the engine's first rank. */
  bytes: number;
  /** From begin to end, with what else was restored in the same batch. */
  seconds: number;
  /** How long of that a forward waited for pages. */
  waited_s: number;
}

export interface ResumeSession {
  /** The default is the service's lease_ttl_s. */
  lease_ttl_s?: number | null;
  on_busy?: "reject" | "wait";
  /** With on_busy wait: how long to wait for the lease. */
  busy_timeout_ms?: number;
  /** How many of the newest entries to return. */
  tail?: number;
  /** Where to bring the pages back to; the answer does not wait for it. */
  prefetch?: "none" | "host" | "device";
  /** Refuse (412) if the session differs. */
  expect?: Expectation | null;
}

export interface Resumed {
  session: Session;
  lease: Lease;
  entries: EntryList;
  /** Calls without a result, in the order of their claims. */
  pending_tool_calls: string[];
  /** Null while no live engine serves the session's model. */
  engine: EngineLink | null;
  kv: Outlook;
}

export interface RewindSession {
  /** The entry that becomes the head; null: the start. */
  at: string | null;
  /** Needed while the session is being run. */
  lease?: LeaseProof | null;
}

export interface Session {
  id: string;
  model: string;
  metadata: Record<string, unknown>;
  cache_salt: string | null;
  extra_key: string | null;
  status: SessionStatus;
  /** The newest entry. */
  head_id: string | null;
  revision: string;
  created_at: string;
  updated_at: string;
  expires_at: string | null;
}

/**
 * How many sessions there are. Counting ends: 10,001 means more than 10,000, and 1,001 of `lapsed` more than
 * 1,000.
 */
export interface SessionCounts {
  all: number;
  /** A turn of theirs runs. */
  running: number;
  /** A turn ran until its lease lapsed, and nobody has resumed them since. */
  lapsed: number;
}

export interface SessionList {
  object?: "list";
  data: Session[];
  first_id: string | null;
  last_id: string | null;
  has_more: boolean;
}

export interface SessionOverview {
  id: string;
  model: string;
  /** lapsed: a turn ran until its lease lapsed; suspended: between turns; idle: before the first. */
  state: "running" | "lapsed" | "suspended" | "idle";
  /** When its newest turn ended, or it was made. */
  turned_at: string;
  /** What a suspended one waits for, as its suspend has said. */
  waits_for: string | null;
  /** Tool calls without a result. */
  open_calls: number;
  /** Tokens from its head that are stored on a node. */
  tokens: number;
  /** Their bytes, on all nodes and ranks. */
  bytes: number;
  expires_at: string | null;
}

export interface SessionOverviewList {
  object?: "list";
  data: SessionOverview[];
  /** Goes on after this list, as `after`; null at the end. */
  next: string | null;
}

export type SessionStatus = "idle" | "running" | "suspended";

export interface Signal {
  /** typing: a person writes the next message; opened: a person reads the session. */
  kind: Activity;
}

export interface Signalled {
  session_id: string;
  /** ignored: the session is being run, no live engine has had it, or foresight is off. */
  state: "accepted" | "ignored";
}

export type Sort = "newest" | "oldest" | "id" | "-id";

/** What a session does, as people see it. */
export type State = "running" | "lapsed" | "suspended" | "idle";

export interface StoredKv {
  state: KvState;
  /** Tokens from the head of the session that can be restored. */
  tokens: number;
  pages: number;
  bytes: number;
  /**
   * Where all of the tokens are: node, on the drive of one node; shared, in the shared store, which outlives that.
   * Null where there are none.
   */
  durable_on?: Durability | null;
  /** Why it is not going to be durable where that was asked for. */
  reason?: string | null;
}

export type SuspendReason = "tool_wait" | "user_wait" | "other" | "done";

export interface SuspendSession {
  lease: LeaseProof;
  reason: SuspendReason;
  /**
   * retain: the KV stays on the device while there is room; demote: it is the first to be evicted there once it is
   * durable; release: the KV is no longer needed, what is stored of it is erased, and the service waits for
   * nothing.
   */
  kv?: "retain" | "demote" | "release";
  /**
   * Where the KV has to be before it is durable: on the drive of its node, or all of it in the shared store, from
   * where other nodes restore it.
   */
  durability?: "node" | "shared";
  /** How long to wait for the KV to be durable. */
  durable_timeout_ms?: number;
  /** Replaces the session's expiry. */
  expires_in_s?: number | null;
}

export interface Suspended {
  id: string;
  status: SessionStatus;
  revision: string;
  head_id: string | null;
  pending_tool_calls: string[];
  /** The flush or demotion to follow, if one is in progress. */
  operation: string | null;
  kv: StoredKv;
}

export interface TenantOverview {
  id: string;
  /** The group that its KV is charged to; null: it is charged itself. */
  kv_group: string | null;
  /** 1,001 means more than 1,000. */
  sessions: number;
  /** How many it may have; null: no limit. */
  session_limit: number | null;
  /** Of the account it is charged to. */
  tiers: Partial<Record<"device" | "host" | "nvme", Held>>;
}

export type Tier = "host" | "device";

export interface ToolCall {
  id: string;
  session_id: string;
  name: string;
  state: ToolCallState;
  /** The claimant's estimate. */
  expected_s: number | null;
  /** The median duration of the tool's earlier calls. */
  typical_s: number | null;
  claimed_at: string;
  finished_at: string | null;
  /** Its output or error, if the claimed call has one; not repeated to the caller that reports it. */
  result: Record<string, unknown> | null;
  revision: string;
}

export type ToolCallState = "claimed" | "done" | "failed" | "unknown";

export interface UpdateSession {
  /** The keys to change; null removes a key. */
  metadata?: Record<string, unknown> | null;
  /** Seconds from now; null: it does not expire. */
  expires_in_s?: number | null;
}

/** What a session waits for between its turns, as its engine knows it. */
export interface Wait {
  /** served: a request of it is queued or runs; released: nobody is expected back. */
  state: "waits" | "served" | "released";
  /** tool, person or other; empty where nobody has said. */
  kind?: string;
  /** Since its last request ended, or the one that is served was queued. */
  waited_s: number;
  /** It is back this soon with a probability of one half. Null: never, or not known. */
  rest_p50_s?: number | null;
  /** It is back this soon in nine of ten such waits. */
  rest_p90_s?: number | null;
}
