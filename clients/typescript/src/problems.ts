// Written by generate.py from the service. Do not edit.
import { AgentStateError } from "./errors.js";

/** The database refused the statement. */
export class DatabaseError extends AgentStateError {
  static override readonly code: string = "database-error";
  static override readonly summary: string = "The database refused the statement.";
  static override readonly retryable: boolean = true;
}

/** The database cannot be reached. */
export class DatabaseUnreachable extends DatabaseError {
  static override readonly code: string = "database-unreachable";
  static override readonly summary: string = "The database cannot be reached.";
  static override readonly retryable: boolean = true;
}

/** The disk of the database is full. */
export class DatabaseFull extends DatabaseError {
  static override readonly code: string = "database-full";
  static override readonly summary: string = "The disk of the database is full.";
  static override readonly retryable: boolean = true;
}

/** The database schema is older than this version of AgentState: run 'agentstate db upgrade'. */
export class SchemaOutdated extends DatabaseError {
  static override readonly code: string = "schema-outdated";
  static override readonly summary: string = "The database schema is older than this version of AgentState: run 'agentstate db upgrade'.";
  static override readonly retryable: boolean = false;
}

/** The database schema is newer than this version of AgentState: upgrade AgentState. */
export class SchemaNewer extends DatabaseError {
  static override readonly code: string = "schema-newer";
  static override readonly summary: string = "The database schema is newer than this version of AgentState: upgrade AgentState.";
  static override readonly retryable: boolean = false;
}

/** The session does not allow this now. */
export class SessionError extends AgentStateError {
  static override readonly code: string = "session-error";
  static override readonly summary: string = "The session does not allow this now.";
  static override readonly retryable: boolean = false;
}

/** There is no such session. */
export class SessionNotFound extends SessionError {
  static override readonly code: string = "session-not-found";
  static override readonly summary: string = "There is no such session.";
  static override readonly retryable: boolean = false;
}

/** The session id is taken. */
export class SessionExists extends SessionError {
  static override readonly code: string = "session-exists";
  static override readonly summary: string = "The session id is taken.";
  static override readonly retryable: boolean = false;
}

/** The session has expired. */
export class SessionExpired extends SessionError {
  static override readonly code: string = "session-expired";
  static override readonly summary: string = "The session has expired.";
  static override readonly retryable: boolean = false;
}

/** Another process runs the session. */
export class SessionBusy extends SessionError {
  static override readonly code: string = "session-busy";
  static override readonly summary: string = "Another process runs the session.";
  static override readonly retryable: boolean = true;
}

/** The lease is not valid any more: resume the session to get a new one. */
export class LeaseLost extends SessionError {
  static override readonly code: string = "lease-lost";
  static override readonly summary: string = "The lease is not valid any more: resume the session to get a new one.";
  static override readonly retryable: boolean = false;
}

/** A tool call of the session is claimed and has no result yet. */
export class ToolInFlight extends SessionError {
  static override readonly code: string = "tool-in-flight";
  static override readonly summary: string = "A tool call of the session is claimed and has no result yet.";
  static override readonly retryable: boolean = false;
}

/** There is no such entry in the session. */
export class EntryNotFound extends SessionError {
  static override readonly code: string = "entry-not-found";
  static override readonly summary: string = "There is no such entry in the session.";
  static override readonly retryable: boolean = false;
}

/** The entry would make the transcript inconsistent. */
export class InvalidEntry extends SessionError {
  static override readonly code: string = "invalid-entry";
  static override readonly summary: string = "The entry would make the transcript inconsistent.";
  static override readonly retryable: boolean = false;
}

/** A history cannot be forked or rewound to there. */
export class NotABranchPoint extends SessionError {
  static override readonly code: string = "not-a-branch-point";
  static override readonly summary: string = "A history cannot be forked or rewound to there.";
  static override readonly retryable: boolean = false;
}

/** The session has changed since: reload it. */
export class RevisionStale extends SessionError {
  static override readonly code: string = "revision-stale";
  static override readonly summary: string = "The session has changed since: reload it.";
  static override readonly retryable: boolean = false;
}

/** There is no such tool call in the session. */
export class ToolCallNotFound extends SessionError {
  static override readonly code: string = "tool-call-not-found";
  static override readonly summary: string = "There is no such tool call in the session.";
  static override readonly retryable: boolean = false;
}

/** The tool call is claimed: another one executes it, or did. */
export class ToolCallClaimed extends SessionError {
  static override readonly code: string = "tool-call-claimed";
  static override readonly summary: string = "The tool call is claimed: another one executes it, or did.";
  static override readonly retryable: boolean = false;
}

/** The claimant of the tool call vanished: it may have run or not. */
export class ToolCallUnknown extends SessionError {
  static override readonly code: string = "tool-call-unknown";
  static override readonly summary: string = "The claimant of the tool call vanished: it may have run or not.";
  static override readonly retryable: boolean = false;
}

/** The tool call has a result already. */
export class ToolCallFinal extends SessionError {
  static override readonly code: string = "tool-call-final";
  static override readonly summary: string = "The tool call has a result already.";
  static override readonly retryable: boolean = false;
}

/** The id is that of another tool call: of another tool, or with other arguments. */
export class ToolCallReused extends SessionError {
  static override readonly code: string = "tool-call-reused";
  static override readonly summary: string = "The id is that of another tool call: of another tool, or with other arguments.";
  static override readonly retryable: boolean = false;
}

/** The session never had that event: read it. */
export class EventsTrimmed extends SessionError {
  static override readonly code: string = "events-trimmed";
  static override readonly summary: string = "The session never had that event: read it.";
  static override readonly retryable: boolean = false;
}

/** The session runs another model than the caller expects. */
export class ModelMismatch extends SessionError {
  static override readonly code: string = "model-mismatch";
  static override readonly summary: string = "The session runs another model than the caller expects.";
  static override readonly retryable: boolean = false;
}

/** No session and no tool call can have this id. */
export class InvalidId extends AgentStateError {
  static override readonly code: string = "invalid-id";
  static override readonly summary: string = "No session and no tool call can have this id.";
  static override readonly retryable: boolean = false;
}

/** There is no such operation. */
export class OperationNotFound extends AgentStateError {
  static override readonly code: string = "operation-not-found";
  static override readonly summary: string = "There is no such operation.";
  static override readonly retryable: boolean = false;
}

/** There is no such engine. */
export class EngineNotFound extends AgentStateError {
  static override readonly code: string = "engine-not-found";
  static override readonly summary: string = "There is no such engine.";
  static override readonly retryable: boolean = false;
}

/** The service follows as many operations as it can: try again later. */
export class TooManyOperations extends AgentStateError {
  static override readonly code: string = "too-many-operations";
  static override readonly summary: string = "The service follows as many operations as it can: try again later.";
  static override readonly retryable: boolean = true;
}

/** The tenant has as many sessions as it may: delete some, or wait until some expire. */
export class TooManySessions extends AgentStateError {
  static override readonly code: string = "too-many-sessions";
  static override readonly summary: string = "The tenant has as many sessions as it may: delete some, or wait until some expire.";
  static override readonly retryable: boolean = false;
}

/** The Idempotency-Key came with another request before. */
export class IdempotencyKeyReused extends AgentStateError {
  static override readonly code: string = "idempotency-key-reused";
  static override readonly summary: string = "The Idempotency-Key came with another request before.";
  static override readonly retryable: boolean = false;
}

/** The first request with this Idempotency-Key is still being answered. */
export class IdempotencyKeyInUse extends AgentStateError {
  static override readonly code: string = "idempotency-key-in-use";
  static override readonly summary: string = "The first request with this Idempotency-Key is still being answered.";
  static override readonly retryable: boolean = true;
}

/** A valid API key is needed. */
export class Unauthenticated extends AgentStateError {
  static override readonly code: string = "unauthenticated";
  static override readonly summary: string = "A valid API key is needed.";
  static override readonly retryable: boolean = false;
}

/** Without API keys the service answers under a name of its own machine only. */
export class HostRefused extends AgentStateError {
  static override readonly code: string = "host-refused";
  static override readonly summary: string = "Without API keys the service answers under a name of its own machine only.";
  static override readonly retryable: boolean = false;
}

/** The API key may not do this: its role reads, or is not that of an administrator. */
export class NotAllowed extends AgentStateError {
  static override readonly code: string = "not-allowed";
  static override readonly summary: string = "The API key may not do this: its role reads, or is not that of an administrator.";
  static override readonly retryable: boolean = false;
}

/** The tenant sends more requests than it may. */
export class RateLimited extends AgentStateError {
  static override readonly code: string = "rate-limited";
  static override readonly summary: string = "The tenant sends more requests than it may.";
  static override readonly retryable: boolean = true;
}

/** There is no such API key. */
export class KeyNotFound extends AgentStateError {
  static override readonly code: string = "key-not-found";
  static override readonly summary: string = "There is no such API key.";
  static override readonly retryable: boolean = false;
}

/** The service refused the request. */
export class RequestRefused extends AgentStateError {
  static override readonly code: string = "request-refused";
  static override readonly summary: string = "The service refused the request.";
  static override readonly retryable: boolean = false;
}

/** The AgentState service did not answer. */
export class ServiceUnreachable extends AgentStateError {
  static override readonly code: string = "service-unreachable";
  static override readonly summary: string = "The AgentState service did not answer.";
  static override readonly retryable: boolean = true;
}

/** What answers is no AgentState service, or one of another release. */
export class NotAgentState extends ServiceUnreachable {
  static override readonly code: string = "not-agent-state";
  static override readonly summary: string = "What answers is no AgentState service, or one of another release.";
  static override readonly retryable: boolean = false;
}

/** The engine could not do what was asked. */
export class EngineError extends AgentStateError {
  static override readonly code: string = "engine-error";
  static override readonly summary: string = "The engine could not do what was asked.";
  static override readonly retryable: boolean = false;
}

/** The engine did not answer in time; it may still act on the request. */
export class EngineUnreachable extends EngineError {
  static override readonly code: string = "engine-unreachable";
  static override readonly summary: string = "The engine did not answer in time; it may still act on the request.";
  static override readonly retryable: boolean = true;
}
