import { lstatSync, unlinkSync } from 'node:fs';
import { isAbsolute } from 'node:path';

import { holdOpen } from './hold-open.js';
import type { RemoteEngine } from './remote-engine.js';
import { type CloseOptions, restOf, type Session } from './session.js';
import type { Peer, SessionEnd } from './session-end.js';

/** A session that is over, as a daemon remembers it. */
export interface EndedSession extends SessionEnd {
  /** Its number. */
  readonly id: number;
  /** Whom it served; absent where the daemon that served it is gone, too. */
  readonly peer?: Peer;
}

/** What a daemon tells of a server. @hidden */
export interface ToldServer {
  id: number;
  socketPath: string;
  image?: string | null;
  attended?: boolean;
}

/**
 * A socket on which a daemon takes Firecracker's handshakes, whoever began that: also a program that has ended since. To serve on it
 * as before, call {@link serveFirecracker} with the same client and `socketPath`.
 */
export class DaemonServer {
  readonly #remote: RemoteEngine;
  readonly #sessions: () => readonly Session[];
  /** Unique in its daemon. */
  readonly id: number;
  /** Where it listens; empty for an inherited socket without a path. */
  readonly socketPath: string;
  /** The path of the image that it serves; `undefined` where that is no file, or a function says it. */
  readonly image: string | undefined;
  /** Whether the client that it belongs to is connected. Without it, no function says which image a process gets: it is rejected. */
  readonly attended: boolean;

  /** @hidden */
  constructor(
    remote: RemoteEngine,
    { id, socketPath, image, attended = true }: ToldServer,
    sessions: () => readonly Session[],
  ) {
    this.#remote = remote;
    this.#sessions = sessions;
    this.id = id;
    this.socketPath = socketPath;
    this.image = image ?? undefined;
    this.attended = attended;
  }

  /** Its sessions that are alive, of those in {@link PagerClient.sessions}. */
  get sessions(): readonly Session[] {
    return this.#sessions().filter(({ id }) => this.#remote.serverOf(id) === this.id);
  }

  /**
   * Stops listening, removes the socket, and closes every session. Resolves when nothing is left.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_USE_AFTER_CLOSE` (it is closed already), `ERR_UFFD_PAGER_LOST`
   */
  async close(options: CloseOptions = {}): Promise<void> {
    const rest = restOf(options);
    this.#unlink();
    await holdOpen(this.#remote.endServer('firecracker.close', this.id, rest));
  }

  /**
   * Stops listening, removes the socket, and lets the sessions go on. Resolves when the last one has ended by itself.
   *
   * @throws As {@link DaemonServer.close}.
   */
  async drain(): Promise<void> {
    this.#unlink();
    await holdOpen(this.#remote.endServer('firecracker.drain', this.id));
  }

  /** Nobody finds it any more. The daemon has no access to paths. */
  #unlink(): void {
    if (!isAbsolute(this.socketPath)) return;
    if (lstatSync(this.socketPath, { throwIfNoEntry: false })?.isSocket()) unlinkSync(this.socketPath);
  }
}
