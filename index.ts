export { UffdError, type UffdErrorCode } from './src/errors.js';
export {
  type AcceptOptions,
  FirecrackerServer,
  type FirecrackerServerEvents,
  type FirecrackerServerOptions,
  type RejectedConnection,
  serveFirecracker,
} from './src/firecracker.js';
export type { FailurePolicy, Rest } from './src/policy.js';
export {
  type CloseOptions,
  type Peer,
  Session,
  type SessionEnd,
  type SessionEndReason,
  type SessionRegion,
  type SessionStats,
} from './src/session.js';
export { GiB, KiB, MiB } from './src/units.js';
