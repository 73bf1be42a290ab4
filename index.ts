export type { AdoptRegion } from './src/adopting.js';
export { callbackSource, type CallbackSourceOptions, type FetchPages } from './src/callback-source.js';
export { capabilities, type Capabilities, type HugePagePool } from './src/capabilities.js';
export { DeadUffdChecker } from './src/checker.js';
export { DaemonRecording } from './src/daemon-recording.js';
export { DaemonServer, type EndedSession } from './src/daemon-server.js';
export { peerOf, pidfdOf, type ReceivedFds, receiveFds, sendFds } from './src/descriptors.js';
export { UffdError, type UffdErrorCode, type UffdErrorKind } from './src/errors.js';
export {
  EventBatch,
  type FaultEvent,
  type FaultKind,
  type ForkEvent,
  type RemapEvent,
  type RemoveEvent,
  type UffdEvent,
  type UnknownEvent,
} from './src/events.js';
export { onExit } from './src/exited.js';
export { type Backend, UserfaultfdFactory } from './src/factory.js';
export { type AnswerOptions, Fault } from './src/fault.js';
export { FaultBatch } from './src/fault-batch.js';
export { FaultHandler } from './src/fault-handler.js';
export type {
  FaultCallbacks,
  DecideFault,
  FaultHandlerOptions,
  HandlerCloseOptions,
  HandlerEnd,
  HandlerEndReason,
} from './src/handler-options.js';
export type { RestoreMode } from './src/fill-options.js';
export type { FirecrackerServerOptions } from './src/firecracker-options.js';
export { FirecrackerServer, serveFirecracker } from './src/firecracker.js';
export type { FirecrackerServerEvents, RejectedConnection } from './src/firecracker-events.js';
export type { ChooseImage, ImageChoice, ImageRequest, MemoryImage } from './src/images.js';
export { type CopyOptions, type FillOptions, type MoveOptions, PageOperations } from './src/filling.js';
export { type MappingRange, MemoryMapping } from './src/mapping.js';
export type { Residency, WrittenPages } from './src/mapping-state.js';
export type { AnonymousOptions, FileMappingOptions, MemfdOptions, PageKind } from './src/mapping-options.js';
export type { Feature, Ioctl, OrBit, RegisterMode } from './src/names.js';
export {
  type AdoptOptions,
  Pager,
  type PagerOptions,
  type ServeOptions,
  type SessionMode,
} from './src/pager.js';
export { type Confinement, type ConnectOptions, PagerClient, type SpawnOptions } from './src/pager-client.js';
export { type PagerEvents, Paging } from './src/paging.js';
export { type LatencyBucket, LatencyHistogram, type SessionLatencies } from './src/latency.js';
export type { AcceptOptions } from './src/limits.js';
export { FirecrackerVm, restoreFirecracker, type RestoreTimings } from './src/restore.js';
export type { RestoreOptions } from './src/restore-options.js';
export type { DecideFailure, FailureOptions, FailurePolicy, Rest, SessionFailure } from './src/policy.js';
export type { AddressRange, MemoryRange } from './src/range.js';
export { registerRegions, type RegionsTarget, unregisterRegions } from './src/regions.js';
export {
  type CloseOptions,
  type DetachOptions,
  type DirtyPages,
  type DirtyRange,
  type Peer,
  type PopulateOptions,
  type ResumeOptions,
  Session,
  type SessionEnd,
  type SessionEndReason,
  type SessionEvents,
  type SessionHold,
  type SessionRegion,
  type TakeDirtyOptions,
} from './src/session.js';
export {
  bufferSource,
  fileSource,
  type FileSourceOptions,
  layeredSource,
  type Overlay,
  overlaySource,
  PageSource,
  zeroSource,
} from './src/sources.js';
export type { SessionStats } from './src/stats.js';
export type { RecordingStats, ReplayStats, TraceOptions } from './src/trace-options.js';
export { Trace, type TraceEnd, type TraceFault, type TraceRange } from './src/trace.js';
export { GiB, KiB, MiB } from './src/units.js';
export type { CreateOptions, UserfaultfdCloseOptions } from './src/create-options.js';
export { Userfaultfd } from './src/userfaultfd.js';
export { workerSource, type WorkerSourceOptions } from './src/worker-source.js';
export type { WrittenPagesOptions } from './src/written.js';
