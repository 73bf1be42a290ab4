import { closeSync } from 'node:fs';
import { resolve } from 'node:path';

import { DaemonRecording } from './daemon-recording.js';
import { DaemonServer, type EndedSession } from './daemon-server.js';
import { fromNative, UffdError } from './errors.js';
import { LONGEST_TIMEOUT } from './limits.js';
import { MemoryMapping } from './mapping.js';
import { holdOpen } from './hold-open.js';
import {
  type Adopting,
  type AdoptOptions,
  readAdopting,
  readServing,
  type ServeOptions,
} from './serve-options.js';
import { executablePath, startDaemon, type Started } from './pagerd.js';
import { Paging } from './paging.js';
import type { OnFailure, Rest } from './policy.js';
import { RemoteEngine } from './remote-engine.js';
import { closePacked, type PackedTraces, packTraces } from './remote-traces.js';
import { type CloseOptions, type Session } from './session.js';
import type { PageSource } from './sources.js';
import { readStatsInterval } from './stats-reports.js';
import { Userfaultfd } from './userfaultfd.js';
import {
  validateBoolean,
  validateInteger,
  validateOneOf,
  validateOptions,
  validatePath,
  wrongType,
} from './validate.js';

/** Options of {@link PagerClient.connect}. */
export interface ConnectOptions {
  /**
   * Milliseconds in which a daemon has to be reached again after the connection broke; then every session is held to have
   * lost its pager (`'pager-lost'`). Default: 5000.
   */
  reconnectTimeout?: number;
  /** Milliseconds between `'stats'` events, at least 10. Default: there are none. */
  statsInterval?: number;
}

/** What a daemon gives up. */
export type Confinement = 'all' | 'calls' | 'off';

/** Options of {@link PagerClient.spawn}. */
export interface SpawnOptions extends ConnectOptions {
  /** Where it listens. At most 107 bytes. Default: in a new private directory. */
  socketPath?: string;
  /**
   * Whether a daemon that dies is replaced by one that goes on with its sessions. With `false`, they meet their failure policy.
   * Default: `true`.
   */
  takeover?: boolean;
  /**
   * What the daemon gives up before it talks to anybody: `'all'`, the file system (Landlock) and the system calls that serving
   * does not take (seccomp); `'calls'`, the latter alone; `'off'`. What the kernel does not have is left out. Default: `'all'`.
   */
  confine?: Confinement;
  /** Another executable. Default: the one of this package. */
  executable?: string;
  /** Milliseconds until it can be connected to. Default: 5000. */
  startTimeout?: number;
}

const CONNECT = ['reconnectTimeout', 'statsInterval'];
const SPAWN = [...CONNECT, 'socketPath', 'takeover', 'confine', 'executable', 'startTimeout'];

/**
 * A pager in a process of its own (`userfaultfd-pagerd`), which needs no Node: whatever becomes of this process, sessions whose
 * source is native go on. It has the interface of {@link Pager}; `serveFirecracker({ pager })` listens there.
 *
 * Sources in JavaScript stay here, and are asked over the connection: when this process ends, so do they, and their sessions
 * meet their failure policy as soon as they want more bytes.
 */
export class PagerClient extends Paging {
  readonly #remote: RemoteEngine;
  /** Of a daemon that it has started itself. */
  readonly #daemon: Started | undefined;
  /** Of mappings of this process: sessions that end with it. */
  readonly #started = new Set<Session>();
  #holderIsLost = false;
  #endsAll = false;
  /** Where the daemon listens. */
  readonly socketPath: string;

  private constructor(
    path: string,
    remote: RemoteEngine,
    daemon: Started | undefined,
    statsInterval: number | undefined,
  ) {
    super(notify => {
      remote.notify = notify;
      return remote;
    }, statsInterval);
    this.socketPath = path;
    this.#remote = remote;
    this.#daemon = daemon;
    remote.handOver = ids => this.handOver(ids);
    remote.onHolderLost = () => {
      this.#holderIsLost = true;
      process.emitWarning('the holder of the pager daemon is gone: nothing replaces the daemon if it dies', {
        type: 'UffdWarning',
        code: 'ERR_UFFD_PAGER_LOST',
      });
    };
  }

  /**
   * Starts a daemon, which outlives this process, and connects to it.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_SOCKET` (it did not start, or nobody can be reached), `ERR_UFFD_TIMEOUT`,
   *   `ERR_UFFD_UNSUPPORTED_PLATFORM` (there is no executable for this machine), `ERR_UFFD_UNSUPPORTED` (another protocol)
   */
  static async spawn(options: SpawnOptions = {}): Promise<PagerClient> {
    validateOptions('options', options, SPAWN);
    const { socketPath, executable, startTimeout = 5000 } = options;
    const settings = {
      socketPath: socketPath === undefined ? undefined : validatePath('options.socketPath', socketPath),
      confine: validateOneOf('options.confine', options.confine ?? 'all', ['all', 'calls', 'off'] as const),
      takeover: validateBoolean('options.takeover', options.takeover, true),
      executable:
        executable === undefined ? executablePath() : validatePath('options.executable', executable),
      timeout: validateInteger('options.startTimeout', startTimeout, 1, LONGEST_TIMEOUT),
    };
    const patience = patienceOf(options);
    const statsInterval = readStatsInterval(options.statsInterval);
    const daemon = await holdOpen(startDaemon(settings));
    return PagerClient.#at(daemon.socket, patience, statsInterval, daemon);
  }

  /**
   * Connects to a daemon that runs. Its sessions are found as {@link PagerClient.sessions}.
   *
   * @param path Where it listens.
   * @throws {@linkcode UffdError} `ERR_UFFD_SOCKET` (nobody listens there), `ERR_UFFD_PEER_NOT_ALLOWED`,
   *   `ERR_UFFD_UNSUPPORTED` (another protocol; the message says which it speaks), `ERR_UFFD_PROTOCOL` (it is no daemon)
   */
  static async connect(path: string, options: ConnectOptions = {}): Promise<PagerClient> {
    validatePath('path', path);
    validateOptions('options', options, CONNECT);
    const statsInterval = readStatsInterval(options.statsInterval);
    return PagerClient.#at(path, patienceOf(options), statsInterval);
  }

  static async #at(
    path: string,
    patience: number,
    statsInterval: number | undefined,
    daemon?: Started,
  ): Promise<PagerClient> {
    const remote = new RemoteEngine(path, patience);
    await holdOpen(remote.connect());
    const client = new PagerClient(path, remote, daemon, statsInterval);
    // Those that are there already are known before anybody asks.
    client.look();
    return client;
  }

  /** The daemon's process. */
  get daemonPid(): number {
    return this.#remote.welcome?.pid ?? 0;
  }

  /** The process that replaces the daemon when it dies; `undefined` when it is gone. */
  get holderPid(): number | undefined {
    return this.#holderIsLost ? undefined : (this.#remote.welcome?.holder ?? undefined);
  }

  /** @hidden */
  get remote(): RemoteEngine {
    this.refuseClosed();
    return this.#remote;
  }

  /** As {@link Pager.serve}. The memory is this process's and ends with it; the session is the daemon's. */
  async serve(mapping: MemoryMapping, options: ServeOptions): Promise<Session> {
    if (!(mapping instanceof MemoryMapping)) throw wrongType('mapping', 'a MemoryMapping', mapping);
    const { settings, onFailure, signal, traces, source } = readServing(options);
    this.#remote.refuseTraces(traces);
    mapping.refuseDeadlock(source.needsThisThread);
    this.refuseClosed();
    if (settings.minor && mapping.fd === undefined) {
      throw new UffdError('ERR_UFFD_UNSUPPORTED', "the mode 'minor' needs memory of a memfd");
    }
    const modes = options.modes ?? ['missing'];
    const uffd = Userfaultfd.create({
      require: [
        ...(settings.minor ? (['minor-shmem'] as const) : []),
        ...(settings.writeProtect ? (['pagefault-flag-wp', 'wp-hugetlbfs-shmem'] as const) : []),
        ...(settings.writeProtect && !settings.missing ? (['wp-unpopulated'] as const) : []),
      ],
      prefer: ['event-remove', 'event-unmap', 'event-remap', 'thread-id', 'exact-address'],
    });
    try {
      uffd.register(mapping.range(), { modes });
      const region = { address: mapping.address, length: mapping.length, sourceOffset: 0 };
      const regions = [settings.minor ? { ...region, memfdOffset: 0 } : region];
      const memfd = settings.minor ? mapping.fd : undefined;
      const given = { regions, pageSize: mapping.pageSize, memfd, pidfd: undefined };
      const id = await this.#adopt(uffd, source, { settings, traces, ...given });
      const begun = this.#begun(id, { source, mapping, onFailure }, signal);
      letGo(uffd);
      return await begun;
    } catch (error) {
      uffd.close({ waiting: 'poison' });
      throw error;
    }
  }

  /** As {@link Pager.adopt}. */
  async adopt(uffd: Userfaultfd, options: AdoptOptions): Promise<Session> {
    if (!(uffd instanceof Userfaultfd)) throw wrongType('uffd', 'a Userfaultfd', uffd);
    const { settings, onFailure, signal, traces, source, ...memory } = readAdopting(options);
    this.#remote.refuseTraces(traces);
    this.refuseClosed();
    const id = await this.#adopt(uffd, source, { settings, traces, ...memory });
    letGo(uffd);
    this.isForeign(id);
    return this.#begun(id, { source, mapping: undefined, onFailure }, signal);
  }

  async #adopt(
    uffd: Userfaultfd,
    pages: PageSource,
    given: Pick<Adopting, 'settings' | 'traces' | 'regions' | 'pageSize' | 'memfd' | 'pidfd'>,
  ): Promise<number> {
    const { settings, traces, regions, pageSize, memfd, pidfd } = given;
    const source = await this.#remote.sources.open(pages);
    const fds = [uffd.fd];
    let packed: PackedTraces = {};
    const at = (fd: number | undefined): number | undefined =>
      fd === undefined ? undefined : fds.push(fd) - 1;
    try {
      // What is wrong with a recording is said before there is a session.
      packed = await packTraces(traces, pages, fds);
      const params = {
        ...settings,
        ...packed,
        mode: settings.mode === 'replay' ? 'windows' : settings.mode,
        source,
        pageSize,
        regions: regions.map(region => ({ ...region, address: `0x${region.address.toString(16)}` })),
        // Of this process the daemon knows by the connection when it has ended.
        own: uffd.backend !== undefined,
        uffd: 0,
        pidfd: at(pidfd),
        memfd: at(memfd),
      };
      const { session } = await this.#remote.request('session.adopt', params, fds, false);
      return session as number;
    } finally {
      closePacked(fds, packed);
      this.#remote.sources.used(source);
    }
  }

  async #begun(
    id: number,
    of: { source: PageSource; mapping: MemoryMapping | undefined; onFailure: OnFailure },
    signal: AbortSignal | undefined,
  ): Promise<Session> {
    const session = await this.started({ id }, of, signal);
    this.#started.add(session);
    void session.closed.then(() => this.#started.delete(session));
    return session;
  }

  /**
   * The sockets on which the daemon takes Firecracker's handshakes, whoever began that. {@link serveFirecracker} with the
   * `socketPath` of one whose program is gone goes on with it.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_PAGER_LOST`
   */
  async servers(): Promise<readonly DaemonServer[]> {
    const { remote } = this;
    const servers = await holdOpen(remote.servers());
    return servers.map(server => new DaemonServer(remote, server, () => this.sessions));
  }

  /**
   * Sessions that are over, whoever began them: what has become of those that a program had before it was started again. A daemon
   * remembers the last 4096, and its successor the last 256 of them.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_PAGER_LOST`, `ERR_UFFD_PROTOCOL` (the daemon is older than this package)
   */
  async ends(): Promise<readonly EndedSession[]> {
    const ends = await holdOpen(this.remote.ends());
    return ends.map(({ id = -1, peer, reason, error, at }) =>
      Object.freeze({
        id,
        ...(peer ? { peer: Object.freeze(peer) } : {}),
        reason: reason as EndedSession['reason'],
        ...(error ? { error: fromNative(error) } : {}),
        at: new Date(at),
      }),
    );
  }

  /**
   * Recordings that are over and in no file yet: those of programs that ended before their sessions did. A daemon keeps the last 256, and at most
   * 128 MiB of them; what had to go is told as `'lost'`.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_PAGER_LOST`, `ERR_UFFD_PROTOCOL` (the daemon is older than this package)
   */
  async recordings(): Promise<readonly DaemonRecording[]> {
    const { recordings } = this.remote;
    const told = await holdOpen(recordings.list());
    return told.map(one => new DaemonRecording(recordings, one));
  }

  /**
   * Has another executable take the daemon's place: of a newer package, or the same one again. It takes everything over, as it
   * would if the daemon had died; processes that are served notice a pause of some milliseconds. It is started beside the daemon, which
   * ends for it only once it is ready; should it not come to serve even so, the one that was there before does. The holder stays the
   * one that was started.
   *
   * @param executable Its path, as the daemon's holder sees it; from this process's directory, where it is not absolute. Default: the one of
   *   this package.
   * @throws {@linkcode UffdError} `ERR_UFFD_SYSTEM` (it cannot be started; `errno` says why), `ERR_UFFD_PROTOCOL` (it is no
   *   userfaultfd-pagerd, or did not come to serve), `ERR_UFFD_PAGER_LOST` (there is no holder, or nobody can be reached afterwards)
   */
  async upgrade(executable?: string): Promise<void> {
    const path = executable === undefined ? executablePath() : validatePath('executable', executable);
    await holdOpen(this.remote.upgrade(resolve(path)));
  }

  /**
   * Ends the connection and nothing else: what the daemon serves from files goes on. What this process would have to answer
   * for fails.
   */
  disconnect(): void {
    this.#remote.release();
    this.finish();
  }

  /**
   * Closes the sessions that this object began, then the connection; a daemon that it has spawned is ended, with all that is
   * left in it. Idempotent: the first call decides.
   */
  override async close(options: CloseOptions = {}): Promise<void> {
    return super.close(options);
  }

  /**
   * Closes everything that the daemon serves, whoever began it, and ends the daemon and this client.
   */
  async shutdown(options: CloseOptions = {}): Promise<void> {
    this.#endsAll = true;
    return this.close(options);
  }

  /** @hidden */
  protected override async closeSessions(rest: Rest): Promise<void> {
    if (this.#daemon === undefined && !this.#endsAll) {
      await Promise.all([...this.#started].map(async session => session.close({ rest })));
      return;
    }
    const sessions = this.sessions.map(async session => session.closed);
    const isDown = await holdOpen(this.#remote.shutDown(rest));
    await holdOpen(Promise.all([this.#daemon?.ended, ...sessions]));
    // What cannot be reached may be there all the same.
    if (isDown) this.#daemon?.clearUp();
  }
}

function patienceOf({ reconnectTimeout = 5000 }: ConnectOptions): number {
  return validateInteger('options.reconnectTimeout', reconnectTimeout, 0, LONGEST_TIMEOUT);
}

/** It is the daemon's now: its events are not to be read here any more, as closing it would. */
function letGo(uffd: Userfaultfd): void {
  closeSync(uffd.releaseFd());
}
