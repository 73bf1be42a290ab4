import { closeSync, lstatSync, unlinkSync } from 'node:fs';
import { resolve } from 'node:path';

import type { NativeImage, NativeNotice, NativePolicy, NativeServerOptions, NativeStats } from '#native';

import type { ToldServer } from './daemon-server.js';
import { fromNative, toNative, type UffdError } from './errors.js';
import { native } from './native.js';
import type { Rest } from './policy.js';
import type { Inbox, RemoteEngine } from './remote-engine.js';
import { closePacked, type PackedTraces, packTraces } from './remote-traces.js';
import type { Session, SessionOwner } from './session.js';
import type { PageSource } from './sources.js';

/** What a server tells: of a session that was there before it, too. @hidden */
export type ServerNotice = NativeNotice | { kind: 'found'; found: Session };

/** What a `FirecrackerServer` is driven by: the addon, or a connection to a daemon. @hidden */
export interface ServerEngine extends SessionOwner {
  decide(session: number, policy: NativePolicy): void;
  takeNotices(): ServerNotice[];
  answer(asked: number, image: NativeImage): void;
  refuse(asked: number, reason: string): void;
  /** An image that was opened, and that nobody wants any more. */
  unused?(image: NativeImage): void;
  close(rest: Rest): void;
  drain(): void;
  giveUp(): void;
  abandon(): void;
  release(): void;
  /** Another process serves, and goes on when this one ends. */
  readonly isElsewhere?: true;
}

/** A path that was bound here, and what lies there. */
interface Bound {
  path: string;
  dev: number;
  ino: number;
}

/** A server of Firecracker's handshakes in a daemon. The socket is made here, so that the daemon needs no path. @hidden */
export class RemoteServer implements ServerEngine {
  readonly #engine: RemoteEngine;
  readonly #inbox: Inbox<ServerNotice>;
  #bound: Bound | undefined;
  #id = -1;
  /** Sources that were named for processes which are not served yet. */
  readonly #answered = new Map<number, number>();

  constructor(engine: RemoteEngine, options: NativeServerOptions, notify: () => void) {
    this.#engine = engine;
    // Until it has a number, what it tells is said by hand.
    this.#inbox = { notices: [], notify };
    void this.#start(options, notify);
  }

  async #start(options: NativeServerOptions, notify: () => void): Promise<void> {
    let socket: number | undefined;
    const fds: number[] = [];
    let packed: PackedTraces = {};
    try {
      const { source, peerUid, handshakeTimeout, maxSessions } = options;
      packed = await packTraces(options, this.#engine.sources.numbered(source), fds);
      const params = {
        ...servingOf(options),
        ...packed,
        source,
        handshakeTimeout,
        maxSessions,
        image: options.memory === '' ? this.#engine.sources.nameOf(source) : undefined,
        peerUid: peerUid ?? process.geteuid?.(),
      };
      const left = options.fd === undefined ? await this.#leftAt(options.socketPath ?? '') : undefined;
      let answer: Record<string, unknown>;
      if (left === undefined) {
        socket = options.fd ?? this.#bind(options);
        const listening = { ...params, socket: fds.length };
        answer = await this.#engine.request('firecracker.serve', listening, [...fds, socket], false);
        // There is a server: from now on the socket is its own.
        closeSync(socket);
      } else {
        answer = await this.#engine.request('firecracker.attach', { ...params, server: left.id }, fds, false);
        this.#isBoundAt(left.socketPath);
      }
      const { server, socketPath, sessions = [] } = answer;
      this.#id = server as number;
      const inbox = this.#engine.watchServer(this.#id, () => {
        this.#inbox.notices.push(...inbox.notices.splice(0));
        notify();
      });
      this.#push({
        kind: 'listening',
        at: Date.now(),
        path: (socketPath as string) || (this.#bound?.path ?? ''),
      });
      this.#engine.move(sessions as number[], inbox);
      if (left) this.#bringRecordings();
    } catch (thrown) {
      if (socket !== undefined && options.fd === undefined) closeSync(socket);
      this.#unlink();
      this.#push({ kind: 'failed', at: Date.now(), error: toNative(thrown as UffdError) });
    } finally {
      closePacked(fds, packed);
      this.unused(options);
    }
  }

  /** What the program before this one has had recorded, and not written. */
  #bringRecordings(): void {
    // Its sessions, and the list of recordings, say what could not be.
    this.#engine.bringOf(this.#id).catch(() => {});
  }

  /** A server that listens there already, and whose program is gone. */
  async #leftAt(socketPath: string): Promise<ToldServer | undefined> {
    const path = resolve(socketPath);
    const servers = await this.#engine.servers();
    return servers.find(server => server.attended === false && server.socketPath === path);
  }

  #bind({ socketPath = '', peerUid }: NativeServerOptions): number {
    const { error, fd } = native().bindListener(socketPath, peerUid);
    if (error || fd === undefined) throw fromNative(error ?? NO_ANSWER);
    this.#isBoundAt(socketPath);
    return fd;
  }

  #isBoundAt(path: string): void {
    const there = lstatSync(path, { throwIfNoEntry: false });
    if (there) this.#bound = { path, dev: there.dev, ino: there.ino };
  }

  #push(notice: ServerNotice): void {
    this.#inbox.notices.push(notice);
    this.#inbox.notify();
  }

  /** Removes the socket, unless something else lies there by now. */
  #unlink(): void {
    const bound = this.#bound;
    this.#bound = undefined;
    if (!bound) return;
    const there = lstatSync(bound.path, { throwIfNoEntry: false });
    if (there?.dev === bound.dev && there.ino === bound.ino) unlinkSync(bound.path);
  }

  takeNotices(): ServerNotice[] {
    const notices = this.#inbox.notices.splice(0);
    for (const notice of notices) {
      if (notice.kind === 'session') this.#settled(notice.session?.id);
      else if (notice.kind === 'rejected') this.#settled(notice.id);
    }
    return notices;
  }

  /** It is known what became of a question: nobody asks it again. */
  #settled(asked = -1): void {
    this.unused({ source: this.#answered.get(asked) });
    this.#answered.delete(asked);
  }

  answer(session: number, image: NativeImage): void {
    if (image.source !== undefined) this.#answered.set(session, image.source);
    void this.#answer(session, image);
  }

  async #answer(session: number, image: NativeImage): Promise<void> {
    const { source } = image;
    const fds: number[] = [];
    try {
      this.#engine.refuseTraces(image);
      const packed = await packTraces(image, this.#engine.sources.numbered(source), fds);
      this.#engine.tell('firecracker.answer', { session, source, ...servingOf(image), ...packed }, fds);
    } catch (thrown) {
      const { code, message } = toNative(thrown as UffdError);
      this.#engine.tell('firecracker.answer', { session, error: message, code });
    }
  }

  /** The daemon keeps what it serves from. */
  unused({ source }: { source?: number | undefined }): void {
    if (source !== undefined) this.#engine.sources.used(source);
  }

  refuse(session: number, error: string): void {
    this.#engine.tell('firecracker.answer', { session, error });
  }

  close(rest: Rest): void {
    this.#end('firecracker.close', rest);
  }

  drain(): void {
    this.#end('firecracker.drain');
  }

  giveUp(): void {
    this.#end('firecracker.giveUp');
  }

  #end(method: string, rest?: Rest): void {
    this.#unlink();
    this.#engine.repeated(method, { server: this.#id, rest }).catch(() => {
      // It is closed already, or nobody is there who could.
      this.#push({ kind: 'closed', at: Date.now() });
    });
  }

  /** This program ends: the daemon goes on listening. */
  abandon(): void {}

  readonly isElsewhere = true;

  release(): void {
    // The daemon goes on listening there.
    if (this.#engine.leaves) this.#bound = undefined;
    this.#unlink();
    this.#engine.forgetServer(this.#id);
  }

  stats(session: number): NativeStats | null {
    return this.#engine.stats(session);
  }

  forget(session: number): NativeStats | null {
    return this.#engine.forget(session);
  }

  closeSession(session: number, rest: Rest): void {
    this.#engine.closeSession(session, rest);
  }

  populate: SessionOwner['populate'] = async (session, options) => this.#engine.populate(session, options);

  cancelPopulate(session: number, request: number): void {
    this.#engine.cancelPopulate(session, request);
  }

  decide(session: number, policy: NativePolicy): void {
    this.#engine.decide(session, policy);
  }

  hold: SessionOwner['hold'] = async session => this.#engine.hold(session);
  resume: SessionOwner['resume'] = async (session, source) => this.#engine.resume(session, source);
  open = async (source: PageSource): Promise<number> => this.#engine.open(source);
  detach: SessionOwner['detach'] = async session => this.#engine.detach(session);
  stopRecording: SessionOwner['stopRecording'] = async session => this.#engine.stopRecording(session);
  replayed: SessionOwner['replayed'] = async session => this.#engine.replayed(session);
}

type Served = Pick<NativeImage, 'window' | 'mode' | 'collapse' | 'sourceTimeout' | 'onFailure'>;

/** How it is served. That something is replayed says the mode. */
function servingOf({ window, mode, collapse, sourceTimeout, onFailure }: Served): object {
  return { window, mode: mode === 'replay' ? 'windows' : mode, collapse, sourceTimeout, onFailure };
}

const NO_ANSWER = { code: 'ERR_UFFD_SYSTEM', message: 'the kernel gave no answer' };
