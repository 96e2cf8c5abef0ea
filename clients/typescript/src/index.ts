export { Client } from "./client.js";
export { message, note, toolCall, toolError, toolOutput } from "./entries.js";
export { AgentStateError } from "./errors.js";
export type { SessionEvent } from "./events.js";
export * from "./problems.js";
export type { Claim, Finish, Fork, Page, Renew, Resume, Revision, Rewind, Suspend } from "./routes.js";
export type * from "./schema.js";
export type { CallOptions, ClientOptions } from "./transport.js";
export { Turn, type TurnOptions } from "./turn.js";
