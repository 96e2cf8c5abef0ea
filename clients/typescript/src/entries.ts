import { finite } from "./documents.js";
import type { NewEntry } from "./schema.js";

/** A message of the conversation, in the caller's own form. */
export function message(payload: object): NewEntry {
  return { kind: "message", payload: { ...payload } };
}

/** Data to keep with the session outside the conversation. */
export function note(payload: object): NewEntry {
  return { kind: "note", payload: { ...payload } };
}

/** The claim of a tool call. Append it **before** the tool runs. */
export function toolCall(callId: string, name: string, args: unknown = null, expectedS?: number): NewEntry {
  const expected = expectedS === undefined ? {} : { expected_s: expectedS };
  return { kind: "tool_call", call_id: callId, payload: { name, arguments: args, ...expected } };
}

/** The output of a tool call. Numbers that JSON cannot express are stored by name: `NaN`, `Infinity`. */
export function toolOutput(callId: string, output: unknown): NewEntry {
  return { kind: "tool_result", call_id: callId, payload: { output: finite(output) } };
}

/** The error of a failed tool call. */
export function toolError(callId: string, error: unknown): NewEntry {
  return { kind: "tool_result", call_id: callId, payload: { error: finite(error) } };
}
