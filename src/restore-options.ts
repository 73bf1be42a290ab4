import { isAbsolute, join, relative, resolve } from 'node:path';

import { validateSignal } from './exited.js';
import { type FirecrackerServerOptions, readOptions, type Start } from './firecracker-options.js';
import { IMAGE_OPTIONS, readMemory, withOverlays } from './images.js';
import { LONGEST_TIMEOUT } from './limits.js';
import type { FailureOptions } from './policy.js';
import type { Overlay } from './sources.js';
import type { TraceOptions } from './trace-options.js';
import {
  argumentError,
  got,
  validateBoolean,
  validateInteger,
  validateOptions,
  validatePath,
} from './validate.js';

/** Options of `restoreFirecracker`. Paths are this process's own, also where Firecracker is jailed. */
export interface RestoreOptions extends Pick<
  FirecrackerServerOptions,
  | 'memory'
  | 'window'
  | 'mode'
  | 'collapse'
  | 'sourceTimeout'
  | 'peer'
  | keyof FailureOptions
  | keyof TraceOptions
> {
  /** Firecracker's API socket (`--api-sock`). It must be running and must not have loaded or booted anything. */
  apiSocket: string;
  /** The snapshot's state file (`snapshot_path`). */
  state: string;
  /**
   * Where to listen for the memory; removed when Firecracker has come. Default: a path in a folder made for it, below
   * `jailRoot` or the folder for temporary files.
   */
  socketPath?: string;
  /**
   * The root folder of a jailed Firecracker, as this process sees it. `state` and `socketPath` must lie in it; Firecracker is
   * told what they are called inside.
   */
  jailRoot?: string;
  /**
   * Bytes of this clone's own over the memory, such as its identity and its network settings ({@link overlaySource}). A function of
   * `memory` tells them itself. Default: none.
   */
  overlays?: readonly Overlay[];
  /** Whether the VM runs when this is done, or stays paused until {@link FirecrackerVm.resume}. Default: `true`. */
  resume?: boolean;
  /** Milliseconds for all of it. Default: 30 000. */
  timeout?: number;
  /** Gives up with its reason. */
  signal?: AbortSignal;
}

/** @hidden What is to be done, checked. */
export interface Restore {
  apiSocket: string;
  /** As Firecracker knows it. */
  state: string;
  socketPath: string | undefined;
  jailRoot: string | undefined;
  /** What Firecracker calls a path of this process. */
  asSeen: (name: string, path: string) => string;
  /** To be loaded paused, and resumed when its memory is there. */
  fills: boolean;
  resume: boolean;
  timeout: number;
  signal: AbortSignal | undefined;
  start: (socketPath: string) => Start;
  /** Whether Firecracker runs as somebody else. */
  foreign: boolean;
}

/** What its server is given as it is. */
const PASSED_ON = [...IMAGE_OPTIONS, 'peer'] as const;
const OPTIONS = [
  'apiSocket',
  'state',
  'memory',
  'socketPath',
  'jailRoot',
  'resume',
  'timeout',
  'signal',
  'overlays',
  ...PASSED_ON,
];
/** Bytes of `sun_path`, less the terminating NUL. */
const LONGEST_SOCKET_PATH = 107;
/** Milliseconds. */
export const PATIENCE = 30_000;

/** @hidden */
export function readRestore(options: RestoreOptions): Restore {
  validateOptions('options', options, OPTIONS);
  const { peer, timeout = PATIENCE } = options;
  const memory = readClone(options);
  const jailRoot =
    options.jailRoot === undefined ? undefined : resolve(validatePath('options.jailRoot', options.jailRoot));
  const asSeen = (name: string, path: string): string =>
    jailRoot === undefined ? resolve(path) : inside(jailRoot, name, path);
  const read = {
    apiSocket: socketPathOf('options.apiSocket', options.apiSocket),
    state: asSeen('options.state', validatePath('options.state', options.state)),
    jailRoot,
    asSeen,
    resume: validateBoolean('options.resume', options.resume, true),
    timeout: validateInteger('options.timeout', timeout, 1, LONGEST_TIMEOUT),
    signal: validateSignal(options.signal),
    foreign: peer !== undefined && peer.uid !== process.getuid?.(),
  };
  let socketPath: string | undefined;
  if (options.socketPath !== undefined) {
    socketPath = socketPathOf('options.socketPath', options.socketPath);
    asSeen('options.socketPath', socketPath);
  }
  // One process, and as long for its handshake (and for a function of `memory`) as for everything.
  const given: FirecrackerServerOptions = { memory, handshakeTimeout: timeout, maxSessions: 1 };
  for (const option of PASSED_ON) {
    if (options[option] !== undefined) Object.assign(given, { [option]: options[option] });
  }
  const checked = readOptions({ ...given, socketPath: 'checked before there is one' });
  const start = (path: string): Start => ({ ...checked, native: { ...checked.native, socketPath: path } });
  // What a function will say is not known yet.
  const fills = typeof memory === 'function' || checked.native.mode !== 'windows';
  return { ...read, fills, socketPath, start };
}

/** The memory with what is this clone's own. */
function readClone({ memory, overlays }: RestoreOptions): RestoreOptions['memory'] {
  if (overlays === undefined) return memory;
  if (typeof memory === 'function') {
    throw argumentError(
      TypeError,
      'ERR_INVALID_ARG_VALUE',
      'Expected no `options.overlays` beside a function as `options.memory`: its answer has them',
    );
  }
  return withOverlays(readMemory('options.memory', memory), overlays);
}

function socketPathOf(name: string, value: unknown): string {
  const path = validatePath(name, value);
  if (Buffer.byteLength(path) <= LONGEST_SOCKET_PATH) return path;
  throw argumentError(
    TypeError,
    'ERR_INVALID_ARG_VALUE',
    `Expected \`${name}\` to have at most ${LONGEST_SOCKET_PATH} bytes (a socket's path), ${got(value)}`,
  );
}

/** What a path below the jail's root is called in the jail. */
function inside(jailRoot: string, name: string, path: string): string {
  const within = relative(jailRoot, resolve(path));
  if (within !== '' && within !== '..' && !within.startsWith('../') && !isAbsolute(within)) {
    return join('/', within);
  }
  throw argumentError(
    TypeError,
    'ERR_INVALID_ARG_VALUE',
    `Expected \`${name}\` to lie in \`options.jailRoot\` (${jailRoot}), ${got(path)}`,
  );
}
