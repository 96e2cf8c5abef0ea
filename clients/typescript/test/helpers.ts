import { randomUUID } from "node:crypto";
import { Client, type ClientOptions } from "@agentstate/client";

/** The service that the tests are run with, in front of an engine that says `durable` to every flush. */
export const URL_OF_SERVICE = process.env["AGENTSTATE_URL"] ?? "http://127.0.0.1:8700";
export const MODEL = "m";

export function connect(options: ClientOptions = {}): Client {
  return new Client(URL_OF_SERVICE, { timeoutS: 300, ...options });
}

export function freshId(): string {
  return `s-${randomUUID()}`;
}

export interface Sent {
  method: string;
  path: string;
  headers: Record<string, string>;
  body: unknown;
}

type Send = () => Promise<Response>;

/** A fetch that a test decides about: `fate` gets each request, and `send`, which sends it to where it goes. */
export function intercepted(fate: (sent: Sent, send: Send, request: RequestInit) => Promise<Response>): {
  fetch: typeof fetch;
  sent: Sent[];
} {
  const all: Sent[] = [];
  return {
    sent: all,
    fetch: async (input, request = {}) => {
      const { pathname } = new URL(String(input));
      const sent: Sent = {
        method: request.method ?? "GET",
        path: pathname,
        headers: { ...(request.headers as Record<string, string>) },
        body: typeof request.body === "string" ? JSON.parse(request.body) : undefined,
      };
      all.push(sent);
      return fate(sent, () => fetch(input, request), request);
    },
  };
}

export function answer(document: unknown, status = 200, headers: Record<string, string> = {}): Response {
  return new Response(JSON.stringify(document), { status, headers });
}

export function problem(code: string, status: number, more: object = {}, headers = {}): Response {
  const told = { type: `/problems/${code}`, title: "t", status, detail: "told", retryable: false, ...more };
  return answer(told, status, headers);
}

/** What fetch throws where a connection breaks. */
export function broken(code: string): TypeError {
  return new TypeError("fetch failed", { cause: Object.assign(new Error(code), { code }) });
}
