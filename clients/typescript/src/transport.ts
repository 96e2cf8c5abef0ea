// How requests are sent: what is retried, when, and which error an answer means.

import { encode } from "./documents.js";
import { AgentStateError } from "./errors.js";
import * as problems from "./problems.js";
import {
  InvalidId,
  NotAgentState,
  RateLimited,
  RequestRefused,
  ServiceUnreachable,
  SessionBusy,
  TooManyOperations,
} from "./problems.js";

export interface ClientOptions {
  /** Sent as a bearer token. */
  apiKey?: string;
  /** How long an attempt may take, beside what it asks the service to wait. 10 by default. */
  timeoutS?: number;
  /** How often a request that failed in transit is repeated. 2 by default. */
  retries?: number;
  /** A stream of events that is silent for so long is opened anew; the service sends something every 15 s. 40 by default. */
  stallS?: number;
  /** What sends the requests. The global fetch by default. */
  fetch?: typeof fetch;
}

export interface CallOptions {
  /** Ends the call: it throws the signal's reason. A write may have been carried out. */
  signal?: AbortSignal;
}

/** Whether a request may be repeated after its answer was lost. */
export enum Repeat {
  /** It changes nothing that sending it twice would change. */
  Read,
  /** It carries an Idempotency-Key: the service carries it out once. */
  Keyed,
  /** It could be carried out twice, or fail because it was carried out. */
  Never,
}

/** One request. The service may take `waitS` longer than usual. */
export interface Call {
  method: "GET" | "POST" | "PUT" | "PATCH" | "DELETE";
  path: string;
  repeat: Repeat;
  query?: Record<string, string | number | undefined>;
  body?: object;
  headers?: Record<string, string>;
  waitS?: number;
}

const FIRST_WAIT_S = 0.1;
// If the service asks for a longer wait, retrying is up to the caller.
const LONGEST_WAIT_S = 5;
// With these the request has not reached the service.
const UNSENT = new Set(["ECONNREFUSED", "ENOTFOUND", "EAI_AGAIN", "UND_ERR_CONNECT_TIMEOUT"]);
const GATEWAY = new Set([502, 503, 504]);
// What a service says of these is a problem.
const NO_SUCH_ROUTE = new Set([404, 405]);

/** A session's or a call's id as a segment of a path. Throws InvalidId for one that no path can carry. */
export function segment(id: string): string {
  // A URL drops dots as segments, however they are encoded: the request would be about something else.
  if (id === "" || id === "." || id === "..") throw new InvalidId(`${JSON.stringify(id)} cannot be an id`);
  try {
    return encodeURIComponent(id);
  } catch (error) {
    throw new InvalidId(`${JSON.stringify(id)} cannot be an id`, { cause: error });
  }
}

/** The same call with an Idempotency-Key of its own: however often it is sent, the service carries it out once. */
export function once(call: Call, headers: Record<string, string> = {}): Call {
  return { ...call, headers: { "Idempotency-Key": crypto.randomUUID(), ...call.headers, ...headers } };
}

export class Transport {
  readonly baseUrl: string;
  readonly stallS: number;
  readonly #headers: Record<string, string>;
  readonly #timeoutS: number;
  readonly #retries: number;
  readonly #fetch: typeof fetch;

  constructor(baseUrl: string, options: ClientOptions = {}) {
    this.baseUrl = baseUrl.replace(/\/+$/, "");
    this.stallS = options.stallS ?? 40;
    this.#headers = options.apiKey === undefined ? {} : { Authorization: `Bearer ${options.apiKey}` };
    this.#timeoutS = options.timeoutS ?? 10;
    this.#retries = options.retries ?? 2;
    this.#fetch = options.fetch ?? fetch;
  }

  /** The answer's document, or undefined where it has none. */
  async json<A>(call: Call, options: CallOptions = {}): Promise<A> {
    return this.#exchange(call, options, async (response) => {
      const text = await response.text();
      try {
        return (text === "" ? undefined : JSON.parse(text)) as A;
      } catch {
        throw this.#notAgentState(call, response);
      }
    });
  }

  /** An answer whose body is a stream; who reads it also ends it, by `controller`. */
  async stream(call: Call, controller: AbortController): Promise<ReadableStream<Uint8Array>> {
    return this.#exchange(call, { signal: controller.signal }, async (response) => {
      if (response.body === null || !response.headers.get("Content-Type")?.startsWith("text/event-stream")) {
        throw this.#notAgentState(call, response);
      }
      return response.body;
    });
  }

  #notAgentState(call: Call, { status, headers }: Response): NotAgentState {
    const type = headers.get("Content-Type")?.replace(/;.*/s, "") ?? "";
    const said = headers.has("Location") ? `to ${headers.get("Location")}` : type;
    return new NotAgentState(
      `${this.baseUrl} is no AgentState service, or one of another release: it answers ${call.method} ${call.path} ` +
        `with ${status} ${said}`.trimEnd(),
      { status },
    );
  }

  /**
   * A request is repeated, at most `retries` times, if the service did not receive it, if the service says that it may
   * succeed later, or if its answer was lost and `call.repeat` allows it. Waiting for a busy session is up to the caller.
   * Throws NotAgentState for an answer that no service gives.
   */
  async #exchange<A>(first: Call, options: CallOptions, read: (response: Response) => Promise<A>): Promise<A> {
    const call = first.repeat === Repeat.Keyed ? once(first) : first;
    const url = new URL(`${this.baseUrl}${call.path}`);
    for (const [name, value] of Object.entries(call.query ?? {})) {
      if (value !== undefined) url.searchParams.set(name, String(value));
    }
    const headers = {
      ...this.#headers,
      ...call.headers,
      ...(call.body === undefined ? {} : { "Content-Type": "application/json" }),
    };
    const body = call.body === undefined ? null : encode(call.body);
    for (let tried = 0; ; tried++) {
      let waitS = FIRST_WAIT_S * 2 ** tried * (0.5 + Math.random() / 2);
      const outcome = await this.#attempt(
        url,
        { method: call.method, headers, body, redirect: "manual" },
        this.#timeoutS + (call.waitS ?? 0),
        options.signal,
        read,
      );
      if ("answer" in outcome) return outcome.answer;
      let error: AgentStateError;
      let again: boolean;
      if ("failure" in outcome) {
        const reason = shown(outcome.failure);
        error = new ServiceUnreachable(
          `the AgentState service at ${this.baseUrl} did not answer ${call.method} ${call.path}: ${reason}`,
          { cause: outcome.failure },
        );
        again = call.repeat !== Repeat.Never || UNSENT.has(codeOf(outcome.failure));
      } else if (isOfAnother(outcome.refusal.status, outcome.text)) {
        throw this.#notAgentState(call, outcome.refusal);
      } else {
        error = problem(outcome.refusal.status, outcome.text);
        waitS = Math.max(waitS, outcome.retryAfterS);
        again = maySucceedLater(error, call.repeat) && waitS <= LONGEST_WAIT_S;
      }
      if (!again || tried === this.#retries) throw error;
      await sleep(waitS, options.signal);
    }
  }

  async #attempt<A>(
    url: URL,
    request: RequestInit,
    timeoutS: number,
    signal: AbortSignal | undefined,
    read: (response: Response) => Promise<A>,
  ): Promise<{ answer: A } | { failure: unknown } | { refusal: Response; text: string; retryAfterS: number }> {
    signal?.throwIfAborted();
    const controller = new AbortController();
    const end = () => controller.abort(signal?.reason);
    signal?.addEventListener("abort", end);
    const timer = setTimeout(() => controller.abort(new Error(`no answer within ${timeoutS} s`)), timeoutS * 1000);
    let streams = false;
    try {
      const response = await this.#fetch(url, { ...request, signal: controller.signal });
      if (response.ok) {
        const answer = await read(response);
        // The caller's signal goes on to end a stream that is still read.
        streams = answer instanceof ReadableStream;
        return { answer };
      }
      const retryAfterS = Number(response.headers.get("Retry-After") ?? 0);
      // A date is not a number.
      return { refusal: response, text: await response.text(), retryAfterS: retryAfterS || 0 };
    } catch (failure) {
      signal?.throwIfAborted();
      if (failure instanceof NotAgentState) throw failure;
      return { failure };
    } finally {
      clearTimeout(timer);
      if (!streams) signal?.removeEventListener("abort", end);
    }
  }
}

/** Whether an error may be gone after a while: the service, its database or a proxy does not answer now. */
export function isAway(error: unknown): boolean {
  return error instanceof AgentStateError && (error.retryable || GATEWAY.has(error.status ?? 0));
}

/** The error that a problem means, by its type; RequestRefused for any other answer. */
export function problem(status: number, text: string): AgentStateError {
  const found = told(text);
  if (found === undefined) {
    return new RequestRefused(`HTTP ${status}: ${text.trim().replace(/\s+/g, " ").slice(0, 200)}`, { status });
  }
  const { type, detail } = found;
  const code = type.slice(type.lastIndexOf("/") + 1);
  const known = {
    status,
    code,
    ...(typeof found["retryable"] === "boolean" ? { retryable: found["retryable"] } : {}),
    ...(typeof found["revision"] === "string" ? { revision: found["revision"] } : {}),
    ...(typeof found["retry_after_s"] === "number" ? { retryAfterS: found["retry_after_s"] } : {}),
  };
  const kind = Object.values(problems).find((each) => each.code === code);
  return kind === undefined ? new RequestRefused(`${code}: ${detail}`, known) : new kind(detail, known);
}

/** Whether no service refuses a request like this. A proxy before one may, with other statuses. */
function isOfAnother(status: number, text: string): boolean {
  return (status >= 300 && status < 400) || (NO_SUCH_ROUTE.has(status) && told(text) === undefined);
}

interface Problem extends Record<string, unknown> {
  type: string;
  detail: string;
}

/** The problem that a service tells of; undefined for any other text. */
function told(text: string): Problem | undefined {
  try {
    const found = JSON.parse(text) as Problem | null;
    return typeof found?.type === "string" && typeof found.detail === "string" ? found : undefined;
  } catch {
    return undefined;
  }
}

function maySucceedLater(error: AgentStateError, repeat: Repeat): boolean {
  // Refused before the service did anything.
  if (error instanceof RateLimited || error instanceof TooManyOperations) return true;
  if (repeat === Repeat.Never || error instanceof SessionBusy) return false;
  return isAway(error);
}

/** The code of what made fetch fail, which wraps it. */
function codeOf(failure: unknown): string {
  const cause = failure instanceof Error ? (failure.cause ?? failure) : failure;
  const first = cause instanceof AggregateError ? cause.errors[0] : cause;
  return first instanceof Error && "code" in first ? String(first.code) : "";
}

function shown(failure: unknown): string {
  const cause = failure instanceof Error ? (failure.cause ?? failure) : failure;
  return cause instanceof Error ? cause.message || codeOf(failure) || cause.name : String(cause);
}

/** Throws the signal's reason when it is aborted. */
export function sleep(seconds: number, signal?: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    signal?.throwIfAborted();
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", end);
      resolve();
    }, seconds * 1000);
    const end = () => {
      clearTimeout(timer);
      reject(signal?.reason);
    };
    signal?.addEventListener("abort", end, { once: true });
  });
}
