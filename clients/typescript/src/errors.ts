/** What a service, or a lost connection, tells of an error. */
export interface Told {
  code?: string;
  status?: number;
  retryable?: boolean;
  revision?: string;
  retryAfterS?: number;
  cause?: unknown;
}

/**
 * The base of every error of this package. A problem of the service is an instance of the class that has its `code`, the
 * last part of the problem's type; one that this release does not know is a `RequestRefused` with that code.
 */
export class AgentStateError extends Error {
  static readonly code: string = "agent-state-error";
  static readonly summary: string = "AgentState could not do what was asked.";
  static readonly retryable: boolean = false;

  readonly code: string;
  /** The HTTP status; undefined where nothing was answered. */
  readonly status: number | undefined;
  /** Whether the same call may succeed later without a change by the caller. */
  readonly retryable: boolean;
  /** Of a conflict: the session's revision then. */
  readonly revision: string | undefined;
  /** When the same call may succeed, as far as the service knows. */
  readonly retryAfterS: number | undefined;

  constructor(message?: string, told: Told = {}) {
    super(message ?? new.target.summary, told.cause === undefined ? {} : { cause: told.cause });
    this.name = new.target.name;
    this.code = told.code ?? new.target.code;
    this.status = told.status;
    this.retryable = told.retryable ?? new.target.retryable;
    this.revision = told.revision;
    this.retryAfterS = told.retryAfterS;
  }
}
