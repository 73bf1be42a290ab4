import { cpus } from 'node:os';

import type { NativeServerOptions } from '#native';

import type { RestoreMode } from './fill-options.js';
import { UffdError } from './errors.js';
import {
  type ChooseImage,
  IMAGE_OPTIONS,
  type MemoryImage,
  openMemory,
  type OpenMemory,
  readDefaults,
  readMemory,
} from './images.js';
import { LONGEST_TIMEOUT } from './limits.js';
import { native } from './native.js';
import { Pager } from './pager.js';
import { PagerClient } from './pager-client.js';
import type { FailureOptions, OnFailure } from './policy.js';
import { RemoteServer, type ServerEngine } from './remote-server.js';
import { fileSource, PageSource, passing } from './sources.js';
import { readStatsInterval } from './stats-reports.js';
import { readTraceOptions, type TraceOptions } from './trace-options.js';
import {
  argumentError,
  got,
  validateFd,
  validateInteger,
  validateOptions,
  validatePath,
  wrongType,
} from './validate.js';

/** Options of `serveFirecracker`. */
export interface FirecrackerServerOptions extends TraceOptions, FailureOptions {
  /**
   * Where to listen: what Firecracker gets as `mem_backend.backend_path`. At most 107 bytes. Nothing may lie there but a
   * socket of the same user that nobody listens on. The directory must not be writable by other users (unless sticky).
   */
  socketPath?: string;
  /**
   * Instead of `socketPath`: the descriptor of a Unix stream socket that listens already, such as a service manager hands
   * over (systemd's `LISTEN_FDS` begin at 3). Who may reach it was decided by who made it; `peer` is checked all the same.
   * The server owns it from the moment this resolves: it makes it nonblocking, and `close()` and `drain()` close it, but leave its path.
   */
  fd?: number;
  /**
   * The snapshot's memory file, which must not change while it is served, or a {@link PageSource}; or a function that says
   * for each process which of these it gets. The process waits for the answer, at most until its handshake times out; where there is none, it is
   * turned away (`'rejected'`).
   */
  memory: MemoryImage | ChooseImage;
  /**
   * Bytes installed around a fault, a power of two from 4 KiB to 2 MiB. More is faster and uses more memory; pages
   * present or discarded are never touched, nor anything outside the region. Default: as the
   * faults suggest: 64 KiB at first, doubling to 2 MiB where one is right behind the other, 256 KiB in those stretches of
   * 16 MiB where 32 faults have shown that most of it is wanted, 16 KiB where they are rare.
   */
  window?: number;
  /**
   * How much is brought before `'session'` tells of a process, and before `accept` gives it. A VM that is to find everything there is
   * loaded paused (`resume_vm: false`) and resumed then; {@link restoreFirecracker} does so. Default: `'windows'`.
   */
  mode?: RestoreMode;
  /**
   * Join what is there to transparent huge pages, 2 MiB after 2 MiB, when no fault has come for 20 ms (`process_madvise`,
   * `MADV_COLLAPSE`, Linux 6.1). Zeros of the image take memory then. Where it cannot be, {@link Session.fallback} says why. Default: `false`.
   */
  collapse?: boolean;
  /**
   * Milliseconds a source may take for a read that is not at hand; then its session fails, as `'stalled'` where it ends. Meant for
   * sources in JavaScript, and files on a network. Default: 30,000.
   */
  sourceTimeout?: number;
  /** Whose processes may connect: those of this user id. Default: this process's own. */
  peer?: {
    /** The user whose processes may connect. */
    uid: number;
  };
  /** Milliseconds from a connection to its session: for the handshake, and for a function's answer. Default: 5000. */
  handshakeTimeout?: number;
  /** Sessions and handshakes at one time; connections beyond are rejected. Default: 1024. */
  maxSessions?: number;
  /**
   * The CPU to pin the pager's thread to; the server then has a pager of its own. Worth it only where the faulting
   * threads are pinned as well. Default: not pinned, one thread shared by all servers of this process.
   */
  cpu?: number;
  /** Milliseconds between `'stats'` events, at least 10. Default: there are none. */
  statsInterval?: number;
  /**
   * Who serves: a pager in a process of its own ({@link PagerClient}), which goes on listening and serving when this program
   * ends; or one of this process, which is the same as none. Default: this process's own thread.
   */
  pager?: Pager | PagerClient;
}

const OPTIONS = [
  'socketPath',
  'fd',
  'memory',
  'peer',
  'handshakeTimeout',
  'maxSessions',
  'cpu',
  'statsInterval',
  'pager',
  ...IMAGE_OPTIONS,
];

/** @hidden What the addon needs to know, and what it is not told. */
export interface Start {
  native: NativeServerOptions;
  image: string | PageSource | undefined;
  choose: ChooseImage | undefined;
  onFailure: OnFailure;
  open: OpenMemory;
  engine: (options: NativeServerOptions, notify: () => void) => ServerEngine;
  statsInterval?: number | undefined;
}

/** @hidden */
export function readOptions(options: FirecrackerServerOptions): Start {
  validateOptions('options', options, OPTIONS);
  const { memory, peer, handshakeTimeout = 5000, maxSessions = 1024, cpu } = options;
  const defaults = readDefaults('options', options);
  const read: NativeServerOptions = {
    ...readListener(options),
    ...defaults.image,
    handshakeTimeout: validateInteger('options.handshakeTimeout', handshakeTimeout, 1, LONGEST_TIMEOUT),
    maxSessions: validateInteger('options.maxSessions', maxSessions, 1, 1_000_000),
  };
  const image = typeof memory === 'function' ? undefined : readMemory('options.memory', memory);
  if (peer !== undefined) {
    validateOptions('options.peer', peer, ['uid']);
    read.peerUid = validateInteger('options.peer.uid', peer.uid, 0, 2 ** 32 - 2);
  }
  if (cpu !== undefined) read.cpu = validateInteger('options.cpu', cpu, 0, Math.max(cpus().length, 1024) - 1);
  const choose = typeof memory === 'function' ? memory : undefined;
  const statsInterval = readStatsInterval(options.statsInterval);
  const { onFailure } = defaults;
  return { native: read, image, choose, onFailure, statsInterval, ...enginesOf(options) };
}

/** Who serves, and opens what is served. */
function enginesOf(options: FirecrackerServerOptions): Pick<Start, 'open' | 'engine'> {
  const { pager, cpu } = options;
  if (pager instanceof PagerClient) {
    if (cpu !== undefined) {
      throw new UffdError('ERR_UFFD_UNSUPPORTED', 'a daemon is not pinned to a `cpu`');
    }
    const { remote } = pager;
    remote.refuseTraces(readTraceOptions('options', options));
    return {
      open: async memory => {
        const source = memory instanceof PageSource ? memory : passing(fileSource(memory));
        return { memory: '', source: await remote.open(source) };
      },
      engine: (given, notify) => new RemoteServer(remote, given, notify),
    };
  }
  if (pager !== undefined && !(pager instanceof Pager)) {
    throw wrongType('options.pager', 'a Pager or PagerClient', pager);
  }
  return {
    open: openMemory,
    engine: (given, notify) => native().startFirecrackerServer(given, notify),
  };
}

function readListener({ socketPath, fd }: FirecrackerServerOptions): { socketPath: string } | { fd: number } {
  if (fd === undefined) return { socketPath: validatePath('options.socketPath', socketPath) };
  if (socketPath !== undefined) {
    throw argumentError(
      TypeError,
      'ERR_INVALID_ARG_VALUE',
      `Expected one of \`options.socketPath\` and \`options.fd\`, ${got({ socketPath, fd })}`,
    );
  }
  return { fd: validateFd('options.fd', fd) };
}
