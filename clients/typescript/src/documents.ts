import { InvalidEntry } from "./problems.js";

/** `value` as JSON. Throws InvalidEntry for what JSON cannot express, where `JSON.stringify` would write null. */
export function encode(value: unknown): string {
  return stringify(value, (number) => {
    throw new InvalidEntry(`${number} is not JSON`);
  });
}

/** `value` as JSON has it, with the texts `NaN`, `Infinity` and `-Infinity` where it has these numbers. */
export function finite(value: unknown): unknown {
  return JSON.parse(stringify(value === undefined ? null : value, String));
}

function stringify(value: unknown, notFinite: (number: number) => string): string {
  const replacer = (_: string, inner: unknown) =>
    typeof inner === "number" && !Number.isFinite(inner) ? notFinite(inner) : inner;
  let written: string | undefined;
  try {
    written = JSON.stringify(value, replacer);
  } catch (error) {
    if (error instanceof InvalidEntry) throw error;
    // A BigInt, a cycle, or one that is nested too deep.
    throw new InvalidEntry(`this is not JSON: ${(error as Error).message}`, { cause: error });
  }
  if (written === undefined) throw new InvalidEntry(`this is not JSON: a ${typeof value}`);
  return written;
}
