import { closeSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';

import type { NativeNotice, NativeStats } from '#native';

import { Connection, lost, type Welcome } from './connection.js';
import type { UffdError } from './errors.js';
import { withResolvers } from './limits.js';
import type { PagingEngine } from './paging.js';
import type { ToldServer } from './daemon-server.js';
import type { ServerNotice } from './remote-server.js';
import { GONE, isUnknownMethod, lostNotice, sessionOf, statsOf, type Told, tooOld } from './remote-told.js';
import type { Session } from './session.js';
import type { Rest } from './policy.js';
import type { PageSource } from './sources.js';
import type { TraceSettings } from './trace-options.js';
import { isOfThisUser, type ToldRecording } from './remote-recordings.js';
import { RemoteRequests } from './remote-requests.js';
import { hasUpgraded } from './remote-upgrade.js';
import { RemoteSources } from './remote-sources.js';

/** Between attempts to reach a daemon again, in milliseconds. */
const PAUSE = 20;

/** Who gets what is told of one server, or of everything that belongs to none. @hidden */
export interface Inbox<Notice = NativeNotice> {
  notices: Notice[];
  notify: () => void;
}

/** What is known of a session of the daemon's. */
interface Known {
  server: number | undefined;
  stats?: NativeStats;
  held?: NativeNotice;
}

/**
 * Sessions of a daemon, seen from here. Connects again when the connection breaks while a daemon accepts: what ended
 * meanwhile is told then; what cannot be reached any more has lost its pager. @hidden
 */
export class RemoteEngine extends RemoteRequests implements PagingEngine {
  readonly isElsewhere = true;
  readonly sources: RemoteSources;
  readonly #path: string;
  readonly #token = Connection.token();
  readonly #patience: number;
  readonly #known = new Map<number, Known>();
  readonly #servers = new Map<number, Inbox<ServerNotice>>();
  readonly #own: Inbox = { notices: [], notify: () => {} };
  /** Told, and not looked at. */
  #told: Told[] = [];
  readonly #closing = new Map<number, () => void>();
  #connection: Connection | undefined;
  #reconnecting: Promise<void> | undefined;
  /** The last reconnecting, until the daemon knows the sources again. */
  #settled: Promise<void> = Promise.resolve();
  #losses = 0;
  #released = false;
  /** What the daemon has goes on without this: nothing of that is removed. */
  leaves = false;
  #scheduled = false;
  /** Who waits until the next daemon is reached. */
  readonly #upgrading = new Set<() => void>();
  welcome: Welcome | undefined;
  /** The holder is gone: nothing replaces the daemon when it dies. */
  onHolderLost: () => void = () => {};
  /** No daemon could be reached again. */
  onLost: () => void = () => {};
  /** Gives sessions that were found to the server that they came by. */
  handOver: (sessions: readonly number[]) => Session[] = () => [];

  constructor(path: string, patience: number) {
    super();
    this.#path = path;
    this.#patience = patience;
    this.sources = new RemoteSources(this);
  }

  /** Connects for the first time. */
  async connect(): Promise<void> {
    await this.#open();
  }

  /** Who hears of what belongs to no server of this client's. */
  set notify(notify: () => void) {
    this.#own.notify = notify;
    this.#schedule();
  }

  get reconnecting(): boolean {
    return this.#reconnecting !== undefined;
  }

  /** Asks; a request that can be repeated is, on the next connection. */
  async request(method: string, params: object, fds: readonly number[] = [], owned = true): Promise<Told> {
    await this.#reconnecting;
    if (this.#connection === undefined) {
      if (owned) for (const fd of fds) closeSync(fd);
      throw lost();
    }
    return this.#connection.request(method, params, fds, owned);
  }

  tell(method: string, params: object, fds: readonly number[] = []): void {
    if (this.#connection) this.#connection.tell(method, params, fds);
    else for (const fd of fds) closeSync(fd);
  }

  /** A request that means the same when it is made twice. */
  async repeated(method: string, params: object): Promise<Told> {
    while (true) {
      try {
        return await this.request(method, params);
      } catch (error) {
        const again = (error as UffdError).code === 'ERR_UFFD_PAGER_LOST' && !this.#released;
        if (!again) throw error;
        // Nothing to wait for: it could not be reached any more.
        if (this.#reconnecting === undefined) throw error;
      }
    }
  }

  /** Hears of a server of this client's from now on. */
  watchServer(id: number, notify: () => void): Inbox<ServerNotice> {
    const inbox: Inbox<ServerNotice> = { notices: [], notify };
    this.#servers.set(id, inbox);
    return inbox;
  }

  forgetServer(id: number): void {
    this.#servers.delete(id);
  }

  /** Sessions that were found are a server's from now on. */
  move(sessions: readonly number[], to: Inbox<ServerNotice>): void {
    this.#lookAtTold();
    this.#own.notify();
    for (const found of this.handOver(sessions)) {
      to.notices.push({ kind: 'found', found });
      // What was asked, and nobody has answered.
      const held = this.#known.get(found.id)?.held;
      if (held?.asks) to.notices.push(held);
    }
    if (to.notices.length > 0) to.notify();
  }

  /** The servers of the daemon; none of one that is too old to say. */
  async servers(): Promise<ToldServer[]> {
    try {
      const { servers } = await this.repeated('firecracker.list', {});
      return servers as ToldServer[];
    } catch (error) {
      if (isUnknownMethod(error)) return [];
      throw error;
    }
  }

  /** The server by which a session came. */
  serverOf(session: number): number | undefined {
    return this.#known.get(session)?.server;
  }

  /** Ends a server, and waits until it is closed. */
  async endServer(method: string, server: number, rest?: Rest): Promise<void> {
    const { promise, resolve } = withResolvers<void>();
    this.#closing.set(server, resolve);
    try {
      await this.repeated(method, { server, rest });
      await promise;
    } finally {
      this.#closing.delete(server);
    }
  }

  /** How sessions ended, as far as the daemon remembers. */
  async ends(): Promise<NativeNotice[]> {
    const { ends } = await this.repeated('session.ends', {});
    return ends as NativeNotice[];
  }

  takeNotices(): NativeNotice[] {
    this.#lookAtTold();
    return this.#own.notices.splice(0);
  }

  stats(session: number): NativeStats | null {
    const stats = this.#known.get(session)?.stats;
    return stats ? this.recordings.stats(session, stats) : null;
  }

  forget(session: number): NativeStats | null {
    const stats = this.stats(session);
    this.#known.delete(session);
    this.recordings.forget(session);
    return stats;
  }

  async open(source: PageSource): Promise<number> {
    return this.sources.open(source);
  }

  /** Refuses what the daemon would pass over in silence. */
  refuseTraces({ record, replay }: TraceSettings): void {
    const wanted = record !== undefined || replay !== undefined;
    if (wanted && this.welcome?.recordings === undefined) throw tooOld(this.#path);
  }

  /** This program ends: what the daemon serves goes on. */
  abandon(): void {}

  /** Resolves when a daemon has been reached that came after the one that was asked, and is of that executable. */
  async upgrade(executable: string): Promise<void> {
    while (true) {
      // One that is being replaced already takes no request, and the next one is not what was asked for.
      const losses = await this.#settle();
      try {
        // The daemon may have ended by itself between its answer and its end for another: nobody has heard of that then.
        if (await this.#upgradeThis(executable)) return;
      } catch (error) {
        // It died before it could say that it has heard: done twice, it comes to the same.
        if ((error as UffdError).code !== 'ERR_UFFD_PAGER_LOST' || losses === this.#losses) throw error;
      }
    }
  }

  async #upgradeThis(executable: string): Promise<boolean> {
    const { epoch } = await this.request('upgrade', { executable });
    // Who has answered: another is not reached before this is heard.
    const before = this.welcome?.pid;
    const { promise, resolve, reject } = withResolvers<void>();
    const reached = (): void => {
      if (this.welcome?.pid !== before) resolve();
    };
    this.#upgrading.add(reached);
    const late = setTimeout(() => reject(lost()), this.#patience);
    try {
      await promise;
    } finally {
      clearTimeout(late);
      this.#upgrading.delete(reached);
    }
    return hasUpgraded(this.welcome, epoch as number | undefined, executable);
  }

  /**
   * Waits until a connection is there and the daemon knows the sources again: one that dies while it is told of them takes its answers
   * along. How many connections were lost by then.
   */
  async #settle(): Promise<number> {
    let losses: number;
    do {
      losses = this.#losses;
      await this.#settled;
    } while (losses !== this.#losses);
    return losses;
  }

  /** Ends the daemon: nothing is to be reached again. Whether it has said that it does. */
  async shutDown(rest: Rest): Promise<boolean> {
    await this.#reconnecting;
    this.#released = true;
    const [asked] = await Promise.allSettled([this.#connection?.request('shutdown', { rest })]);
    return asked.status === 'fulfilled' && asked.value !== undefined;
  }

  /** Nobody hears of anything any more; what the daemon serves goes on. */
  release(): void {
    this.leaves ||= !this.#released;
    this.#released = true;
    this.#connection?.close();
    this.#connection = undefined;
    for (const inbox of this.#servers.values()) {
      inbox.notices.push({ kind: 'closed', at: Date.now() });
      inbox.notify();
    }
  }

  /** @hidden What a connection tells. */
  told(method: string, params: Told, on: Connection): void {
    if (method === 'notice') this.#hear(params);
    else if (method === 'stats') {
      for (const { id, stats } of params['sessions'] as { id: number; stats: Told }[]) {
        const known = this.#known.get(id);
        if (known) known.stats = statsOf(stats);
      }
    } else if (method === 'read') {
      void this.sources.read(params as unknown as Parameters<RemoteSources['read']>[0], on);
    } else if (method === 'recorded') this.#recorded(params as unknown as ToldRecording);
    else if (method === 'holder') this.onHolderLost();
  }

  /** It is this client's to write, or nobody's. */
  #recorded(told: ToldRecording): void {
    if (told.owner === this.#token || (!told.attended && isOfThisUser(told)))
      void this.recordings.bring(told);
  }

  /** @hidden The connection has ended. */
  lost(): void {
    this.#connection = undefined;
    if (this.#released || this.#reconnecting !== undefined) return;
    const reconnecting = this.#reconnect().finally(() => {
      // The connection may have been lost once more meanwhile.
      if (this.#reconnecting === reconnecting) this.#reconnecting = undefined;
    });
    this.#reconnecting = reconnecting;
    this.#settled = reconnecting;
    this.#losses += 1;
  }

  async #open(): Promise<void> {
    this.#lookAtTold();
    const hello = { client: this.#token, sessions: [...this.#known.keys()], sources: this.sources.numbers };
    let lostEarly = false;
    // What comes right behind the welcome is heard once there is a connection to answer on.
    let hear = (method: string, params: Told): void => void early.push([method, params]);
    const early: [string, Told][] = [];
    const listening = {
      told: (method: string, params: Told): void => hear(method, params),
      lost: (): void => {
        if (this.#connection === undefined) lostEarly = true;
        else this.lost();
      },
    };
    const { connection, welcome } = await Connection.open(this.#path, hello, listening);
    if (lostEarly) throw lost();
    this.#connection = connection;
    this.welcome = welcome;
    for (const told of (welcome.recordings ?? []) as unknown as ToldRecording[]) {
      if (told.owner === this.#token && !told.lost) void this.recordings.bring(told);
    }
    this.#compare(welcome);
    hear = (method, params) => this.told(method, params, connection);
    for (const [method, params] of early) hear(method, params);
  }

  async #reconnect(): Promise<void> {
    const until = performance.now() + this.#patience;
    while (!this.#released) {
      try {
        await this.#open();
        // Only now: what is repeated may need its source.
        const reopened = this.sources.reopen();
        this.#reconnecting = undefined;
        await reopened;
        for (const reached of this.#upgrading) reached();
        return;
      } catch (error) {
        const { code } = error as UffdError;
        const hopeless = code === 'ERR_UFFD_UNSUPPORTED' || code === 'ERR_UFFD_PEER_NOT_ALLOWED';
        if (hopeless || performance.now() > until) {
          this.#giveUp(error as UffdError);
          return;
        }
        await sleep(PAUSE, undefined, { ref: false });
      }
    }
  }

  /** What has begun and ended while nobody listened. */
  #compare(welcome: Welcome): void {
    const pending = new Set(welcome.pending ?? []);
    const alive = new Map(welcome.sessions.map(told => [told['id'] as number, told]));
    const ends = new Map(welcome.ends.map(told => [told['id'] as number, told]));
    for (const id of this.#known.keys()) {
      if (!alive.has(id) && !pending.has(id)) this.#hear(ends.get(id) ?? lostNotice(id, GONE));
    }
    for (const [id, { stats, server, held, ...session }] of alive) {
      const known = this.#known.get(id);
      if (known) known.stats = statsOf(stats as Told);
      else this.#hear({ kind: 'session', at: Date.now(), server, session: { ...session, stats } });
      if (held) this.#hear(held as Told);
      else if (known?.held) this.#hear({ kind: 'resumed', at: Date.now(), server, id });
    }
    this.#closeAllBut(new Set(welcome.servers.map(({ id }) => id)));
  }

  /** Servers of this client's that are none of the daemon's any more. */
  #closeAllBut(servers: ReadonlySet<number>): void {
    for (const id of [...this.#servers.keys(), ...this.#closing.keys()]) {
      if (!servers.has(id)) this.#hear({ kind: 'closed', at: Date.now(), server: id });
    }
  }

  #giveUp(error: UffdError): void {
    const why = {
      code: 'ERR_UFFD_PAGER_LOST',
      message: `no daemon could be reached any more: ${error.message}`,
    };
    this.#lookAtTold();
    for (const id of this.#known.keys()) this.#hear(lostNotice(id, why));
    this.#closeAllBut(new Set());
    this.onLost();
  }

  #hear(told: Told): void {
    this.#told.push(told);
    this.#schedule();
  }

  #lookAtTold(): void {
    for (const told of this.#told.splice(0)) this.#notice(told);
  }

  #notice(told: Told): void {
    const { server, stats, session, ...rest } = told;
    const notice = rest as unknown as NativeNotice;
    if (session !== undefined) {
      const { stats: counted, ...plain } = session as Told;
      notice.session = sessionOf(plain);
      if (notice.kind === 'session') {
        // Taken over by another daemon: for whoever has it here nothing has changed.
        if (this.#known.has(notice.session.id)) return;
        const known: Known = { server: (server ?? undefined) as number | undefined };
        if (counted) known.stats = statsOf(counted as Told);
        this.#known.set(notice.session.id, known);
      }
    }
    const known = this.#known.get(notice.id ?? -1);
    if (known && notice.kind === 'ended' && stats) known.stats = statsOf(stats as Told);
    if (known && notice.kind === 'held') known.held = notice;
    else if (known) delete known.held;
    if (notice.kind === 'rejected' && notice.id !== undefined) this.recordings.forget(notice.id);
    // Of a session that has ended while nobody was connected, only who knew it knows the server.
    const of = (known?.server ?? server ?? undefined) as number | undefined;
    const tell = (): void => {
      if (notice.kind === 'closed') this.#closing.get(of ?? -1)?.();
      const inbox = this.#servers.get(of ?? -1) ?? this.#own;
      inbox.notices.push(notice);
    };
    const before = this.recordings.before(notice.kind, notice.id, of);
    if (before === undefined) tell();
    else void before.then(tell).then(() => this.#schedule());
  }

  /** After whoever waits for an answer that came before has had it. */
  #schedule(): void {
    if (this.#scheduled) return;
    this.#scheduled = true;
    setImmediate(() => {
      this.#scheduled = false;
      this.#lookAtTold();
      for (const inbox of [this.#own, ...this.#servers.values()]) {
        if (inbox.notices.length > 0) inbox.notify();
      }
    });
  }
}
