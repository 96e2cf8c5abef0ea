import type { Entry, Session } from "./schema.js";
import { Repeat, type Call, type CallOptions, isAway, segment, sleep, type Transport } from "./transport.js";

/** What happens to a session. `rewind`: the entries after `seq` (0: all) were taken back. */
export type SessionEvent =
  | { type: "entry"; entry: Entry }
  | { type: "session"; session: Session }
  | { type: "rewind"; seq: number };

const FIRST_PAUSE_S = 0.1;
const LONGEST_PAUSE_S = 5;

/** The lines of a stream of server-sent events, and the events that they make. Comments and unknown kinds are skipped. */
export class EventParser {
  /** Whether the session has ended. */
  ended = false;
  readonly #decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  #line = "";
  #afterCr = false;
  #kind = "";
  #data: string[] = [];

  *take(chunk: Uint8Array): Generator<SessionEvent> {
    let text = this.#decoder.decode(chunk, { stream: true });
    if (text === "") return;
    if (this.#afterCr && text.startsWith("\n")) text = text.slice(1);
    this.#afterCr = text.endsWith("\r");
    // No other character ends a line: a text may contain those that only Unicode counts as line ends.
    const [first = "", ...others] = text.split(/\r\n|\r|\n/);
    this.#line += first;
    for (const begun of others) {
      const line = this.#line;
      this.#line = begun;
      const event = this.#takeLine(line);
      if (event !== undefined) yield event;
    }
  }

  #takeLine(line: string): SessionEvent | undefined {
    if (line !== "") {
      const colon = line.indexOf(":");
      const name = colon < 0 ? line : line.slice(0, colon);
      const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
      if (name === "event") this.#kind = value;
      else if (name === "data") this.#data.push(value);
      return undefined;
    }
    const [kind, data] = [this.#kind, this.#data.join("\n")];
    this.#kind = "";
    this.#data = [];
    switch (kind) {
      case "entry":
        return { type: "entry", entry: JSON.parse(data) as Entry };
      case "session":
        return { type: "session", session: JSON.parse(data) as Session };
      case "rewind":
        return { type: "rewind", seq: (JSON.parse(data) as { seq: number }).seq };
      case "end":
        this.ended = true;
    }
    return undefined;
  }
}

/** Follows a session, over as many connections as that takes. */
export async function* follow(
  transport: Transport,
  sessionId: string,
  after: number,
  { signal }: CallOptions,
): AsyncGenerator<SessionEvent, void, undefined> {
  let seq = after;
  let connected = false;
  let failures = 0;
  for (;;) {
    const call: Call = {
      method: "GET",
      path: `/v1/sessions/${segment(sessionId)}/events`,
      repeat: Repeat.Read,
      headers: { Accept: "text/event-stream", "Last-Event-ID": String(seq) },
    };
    const controller = new AbortController();
    const end = () => controller.abort(signal?.reason);
    signal?.throwIfAborted();
    signal?.addEventListener("abort", end);
    try {
      const stream = await transport.stream(call, controller);
      connected = true;
      failures = 0;
      const parser = new EventParser();
      for await (const chunk of pieces(stream, controller, transport.stallS)) {
        for (const event of parser.take(chunk)) {
          if (event.type === "entry") seq = event.entry.seq;
          if (event.type === "rewind") seq = event.seq;
          yield event;
        }
        if (parser.ended) return;
      }
    } catch (error) {
      signal?.throwIfAborted();
      if (!connected || !isAway(error)) throw error;
      failures += 1;
    } finally {
      signal?.removeEventListener("abort", end);
      controller.abort();
    }
    await sleep(Math.min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** Math.min(failures, 10)), signal);
  }
}

/** What a stream has, until it ends, breaks off, or is silent for `stallS`. */
async function* pieces(
  stream: ReadableStream<Uint8Array>,
  controller: AbortController,
  stallS: number,
): AsyncGenerator<Uint8Array> {
  const reader = stream.getReader();
  controller.signal.addEventListener("abort", () => void reader.cancel().catch(() => undefined));
  for (;;) {
    const timer = setTimeout(() => controller.abort(), stallS * 1000);
    let piece: ReadableStreamReadResult<Uint8Array>;
    try {
      piece = await reader.read();
    } catch {
      return;
    } finally {
      clearTimeout(timer);
    }
    if (piece.done) return;
    yield piece.value;
  }
}
