import type { Operation } from "./schema.js";
import { readOperation } from "./routes.js";
import { sleep, type CallOptions, type Transport } from "./transport.js";

const POLL_S = 0.1;

/** Polls until the operation is `done` or `failed`. Throws an Error after `timeoutS`; the operation then continues. */
export async function waitOperation(
  transport: Transport,
  operationId: string,
  { timeoutS, signal }: CallOptions & { timeoutS: number },
): Promise<Operation> {
  const deadline = performance.now() + timeoutS * 1000;
  const options = signal === undefined ? {} : { signal };
  for (;;) {
    const operation = await transport.json<Operation>(readOperation(operationId), options);
    if (operation.state === "done" || operation.state === "failed") return operation;
    if (performance.now() >= deadline) {
      throw new Error(`operation ${operation.id} is still ${operation.state} after ${timeoutS} s`);
    }
    await sleep(POLL_S, signal);
  }
}
