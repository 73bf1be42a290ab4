/** The real thing: a daemon with its holder, a Node that it serves for, and guests; all of them may be killed. */

import { mkdtempSync, rmSync, truncateSync, utimesSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

import { PagerClient } from 'userfaultfd';

import { Commanded } from '../helpers/commanded.js';
import { daemonOf, daemonsOf, heirOf, isAlive, killIfThere, until } from '../helpers/daemon.js';
import { FAULTER } from '../helpers/faulter.js';
import { APART, imageBytes, PAGE, PAGES, REGION_PAGES, REGIONS } from './image.js';
import { type Daemon, footprintOf, nothingIsLeft, openOf, PATIENCE } from './leftovers.js';
import { type Access, type Discard, Guest, type Kind, type Model, POLICIES, type Policy } from './model.js';

/** Sessions are told in this time. */
const TOLD = 5000;
/** Where it is not known whether there is one any more. */
const BRIEFLY = 1000;
/** In which a daemon waits for who may connect again. */
const RETURNING = 10_000;
/** So many deaths within 10 s are too many for one holder (32), with those that a sequence may add. */
const MOST_DEATHS = 16;
const STORM = 10_000;

const NODE_PROGRAM = join(import.meta.dirname, 'node-program.js');
const bytes = imageBytes();

/** Everything that runs; goes on through many sequences. */
export class Rig {
  readonly #folder = mkdtempSync(join(tmpdir(), 'userfaultfd-'));
  readonly #processes = new Map<Guest, { process: Commanded; address: number }>();
  readonly #running = new Map<Access | Discard, Promise<void>>();
  #node: Commanded;
  #spare: Commanded;
  #holder = 0;
  #lastKilled = 0;
  #deaths: number[] = [];
  #sockets = 0;
  #askSocket = '';
  #open = 0;
  #problem: Error | undefined;
  /** Sequences that were played. */
  played = 0;
  /** Daemons there were. */
  daemons = 0;

  private constructor() {
    for (const policy of [...POLICIES, 'spare'] as const) this.#write(policy);
    this.#node = this.#program();
    this.#spare = this.#program();
  }

  static async start(): Promise<Rig> {
    const rig = new Rig();
    await rig.#startDaemon();
    return rig;
  }

  get #path(): string {
    return join(this.#folder, 'pager.sock');
  }

  #file(policy: Policy | 'spare'): string {
    return join(this.#folder, policy);
  }

  #socket(of: string): string {
    return join(this.#folder, `${of}-${this.#sockets}.sock`);
  }

  #program(): Commanded {
    return new Commanded(process.execPath, [NODE_PROGRAM]);
  }

  async #startDaemon(): Promise<void> {
    const client = await PagerClient.spawn({ socketPath: this.#path });
    this.#holder = client.holderPid ?? 0;
    client.disconnect();
    this.#deaths = [];
    this.daemons += 1;
    await this.#node.ask('connect', this.#path);
    await until(() => daemonsOf(this.#holder).length === 2, 'the next daemon waits');
    this.#open = openOf(await this.#whole()).length;
  }

  /** The daemon that is there, or that is starting. */
  async #daemon(): Promise<number> {
    let found: number | undefined;
    await until(() => {
      found = daemonOf(this.#holder, this.#lastKilled);
      return found !== undefined;
    }, 'there is a daemon');
    return found ?? 0;
  }

  /** Throws what was seen in passing. */
  check(): void {
    if (this.#problem) throw this.#problem;
  }

  #note(error: unknown): void {
    this.#problem ??= error as Error;
  }

  /** Before a sequence: servers, and the first guests. */
  async begin(model: Model, kinds: readonly Kind[]): Promise<void> {
    const now = performance.now();
    this.#deaths = this.#deaths.filter(death => now - death < STORM);
    if (this.#deaths.length > MOST_DEATHS) await this.#anotherDaemon();
    this.#sockets += 1;
    for (const policy of POLICIES) {
      await this.#node.ask('serve', this.#socket(policy), this.#file(policy), policy);
    }
    await this.#ask();
    for (const kind of kinds) await this.startGuest(model, kind);
  }

  async #anotherDaemon(): Promise<void> {
    await this.#endDaemon();
    this.#node.letGo();
    await this.#node.ended;
    this.#takeSpare();
    await this.#startDaemon();
  }

  async #endDaemon(): Promise<void> {
    const client = await PagerClient.connect(this.#path);
    const { daemonPid, holderPid = 0 } = client;
    await client.shutdown();
    await until(() => !isAlive(daemonPid) && !isAlive(holderPid), 'the daemon and its holder have ended');
  }

  #takeSpare(): void {
    this.#node = this.#spare;
    this.#spare = this.#program();
  }

  async #ask(): Promise<void> {
    this.#askSocket = this.#socket(`ask-${this.#node.pid}`);
    await this.#node.ask('ask', this.#askSocket);
  }

  /** A process that hands over its memory; it is served when this resolves. */
  async startGuest(model: Model, kind: Kind): Promise<void> {
    const guest = new Guest(`${kind.source} ${kind.policy} ${model.guests.length}`, kind, model.node);
    const child = new Commanded(FAULTER, ['-', '0x8']);
    void child.ended.then(({ signal }) => {
      if (!guest.alive) return;
      try {
        model.died(guest, signal);
      } catch (error) {
        this.#note(error);
      }
    });
    const [address] = await child.ask('map', PAGES);
    await child.ask('register', Number(address), PAGES * PAGE, 1);
    this.#processes.set(guest, { process: child, address: Number(address) });
    model.guests.push(guest);
    const asks = kind.source === 'js';
    if (asks) await this.#node.ask('next', kind.policy);
    const socket = asks ? this.#askSocket : this.#socket(kind.policy);
    await child.ask('offer', socket, Number(address), REGIONS, REGION_PAGES, APART);
    if (model.nodeAlive) {
      await this.#node.ask('has', child.pid, TOLD);
      model.nodeReached = true;
    }
    // A handshake that nobody has put down yet is lost with the daemon: a page that comes says that it is.
    await this.#settleOne(model, this.touch(model, guest, 0, 'look'));
  }

  /** Has a guest touch a page; does not wait. */
  touch(model: Model, guest: Guest, page: number, how: Access['how']): Access {
    const access = model.touch(guest, page, how);
    this.#run(access, how, [this.#addressOf(guest, page)], ([word = '']) => model.read(access, word));
    return access;
  }

  /** Has a guest discard pages that lie behind each other; does not wait. */
  discard(model: Model, guest: Guest, pages: readonly number[]): Discard {
    const discard = model.discard(guest, pages);
    const range = [this.#addressOf(guest, pages[0] ?? 0), pages.length * PAGE];
    this.#run(discard, 'discard', range, () => model.discarded(discard));
    return discard;
  }

  #addressOf(guest: Guest, page: number): number {
    return (this.#processes.get(guest)?.address ?? 0) + page * PAGE;
  }

  #run(what: Access | Discard, command: string, words: number[], answered: (words: string[]) => void): void {
    const child = this.#processes.get(what.guest)?.process;
    const run = async (): Promise<void> => {
      let answer: string[] | undefined;
      try {
        answer = await child?.ask(command, ...words);
      } catch (error) {
        // Whose death it was is asked elsewhere.
        await child?.ended;
        if (what.guest.alive) this.#note(error);
      }
      try {
        if (answer && what.guest.alive) answered(answer);
      } catch (error) {
        this.#note(error);
      }
      this.#running.delete(what);
    };
    this.#running.set(what, run());
  }

  async #settleOne(model: Model, what: Access | Discard): Promise<void> {
    const late = new AbortController();
    const timer = setTimeout(() => late.abort(), PATIENCE);
    const over = new Promise<'late'>(resolve => {
      late.signal.addEventListener('abort', () => resolve('late'));
    });
    const ended = await Promise.race([this.#running.get(what), over]);
    clearTimeout(timer);
    if (ended === 'late') {
      const where = 'page' in what ? `page ${what.page}` : `the discard of ${what.pages.join(', ')}`;
      throw new Error(`${what.guest.name} waits for ${where} for more than ${PATIENCE} ms`);
    }
    this.check();
    // Of the kill that this was, nobody may have heard yet.
    if (!what.guest.alive) model.look();
  }

  /** Waits for everything that may not wait any longer. */
  async settle(model: Model, of: Iterable<Access | Discard> = [...this.#running.keys()]): Promise<void> {
    for (const what of of) {
      if (!this.#running.has(what)) continue;
      if ('page' in what && model.mayWait(what)) continue;
      await this.#settleOne(model, what);
    }
    this.check();
  }

  async killGuest(guest: Guest): Promise<void> {
    guest.killed = true;
    const child = this.#processes.get(guest)?.process;
    child?.kill();
    await child?.ended;
  }

  /** With its heir, or alone. */
  async killDaemon(model: Model, withHeir: boolean): Promise<void> {
    model.daemonEnds();
    this.#deaths.push(performance.now());
    while (!(await this.#killOne(withHeir)));
  }

  /** `false`: after an upgrade it may be the one before, which has ended by itself. */
  async #killOne(withHeir: boolean): Promise<boolean> {
    const pid = await this.#daemon();
    const heir = withHeir ? heirOf(pid) : undefined;
    this.#lastKilled = pid;
    if (!killIfThere(pid)) return false;
    if (heir !== undefined) killIfThere(heir);
    return true;
  }

  /** The daemon makes another one. */
  async killHeir(): Promise<void> {
    const heir = heirOf(await this.#daemon());
    if (heir !== undefined) killIfThere(heir);
  }

  async upgrade(model: Model): Promise<void> {
    model.daemonEnds();
    this.#deaths.push(performance.now());
    await this.#node.ask('upgrade');
    model.nodeReached = true;
  }

  async killNode(model: Model): Promise<void> {
    model.nodeEnds();
    this.#node.kill();
    await this.#node.ended;
  }

  async startNode(model: Model): Promise<void> {
    this.#takeSpare();
    await this.#node.ask('connect', this.#path);
    model.nodeBegins();
    await this.#ask();
  }

  async setSource(model: Model, mode: Model['js']): Promise<void> {
    model.setSource(mode);
    await this.#node.ask('mode', mode);
  }

  breakFile(model: Model, policy: Policy): void {
    model.breakFile(policy, () => truncateSync(this.#file(policy), 0));
  }

  mendFile(model: Model, policy: Policy): void {
    model.mendFile(policy);
    this.#write(policy);
  }

  /** As far as a file tells, nobody has written to it in between. */
  #write(policy: Policy | 'spare'): void {
    const file = this.#file(policy);
    writeFileSync(file, bytes);
    utimesSync(file, 1e9, 1e9);
  }

  async hold(model: Model, guest: Guest): Promise<void> {
    if (!(await this.#session(model, guest, 'hold'))) return;
    guest.held = 'yes';
  }

  async resume(model: Model, guest: Guest, from: 'same' | 'js' | 'spare'): Promise<void> {
    model.resuming(guest, from);
    const source = from === 'spare' ? this.#file('spare') : from;
    if (!(await this.#session(model, guest, 'resume', source))) return;
    model.resumed(guest, from);
  }

  /** Asks a session for something; `false` where it is over, by its policy. */
  async #session(model: Model, guest: Guest, command: string, ...words: string[]): Promise<boolean> {
    const pid = this.#processes.get(guest)?.process.pid ?? 0;
    const mayBeOver = guest.mayFail && guest.kind.policy !== 'hold';
    try {
      await this.#node.ask(command, pid, mayBeOver ? BRIEFLY : TOLD, ...words);
    } catch (error) {
      const over = /^(ERR_UFFD_USE_AFTER_CLOSE| ABSENT) /.test((error as Error).message);
      if (over && mayBeOver) return false;
      throw error;
    }
    model.nodeReached = true;
    return true;
  }

  /** After a sequence: everybody goes on, every page is compared, everybody ends, nothing is left. */
  async finish(model: Model): Promise<void> {
    if (!model.nodeAlive) await this.startNode(model);
    await this.setSource(model, 'good');
    for (const policy of model.broken) this.mendFile(model, policy);
    for (const guest of model.alive) {
      const from = model.wayOn(guest);
      if (from) await this.resume(model, guest, from);
    }
    await this.settle(model);
    for (const guest of model.alive) {
      const all = guest.pages.map((_, page) => this.touch(model, guest, page, 'look'));
      await this.settle(model, all);
    }
    if (this.#running.size > 0)
      throw new Error('somebody waits although nothing is held and all sources are good');
    await this.#compareSessions(model);
    await this.#endGuests(model);
    await this.#node.ask('close');
    await nothingIsLeft(await this.#whole());
    this.check();
    this.played += 1;
  }

  /** Sessions that cannot have failed are there, and the Node knows them. */
  async #compareSessions(model: Model): Promise<void> {
    for (const guest of model.alive.filter(({ mayFail }) => !mayFail)) {
      await this.#node.ask('has', this.#processes.get(guest)?.process.pid ?? 0, TOLD);
    }
    const ends = await this.#node.ask('ends');
    const byPid = new Map(
      [...this.#processes].map(
        ([
          guest,
          {
            process: { pid },
          },
        ]) => [pid, guest],
      ),
    );
    for (const [pid, reason = ''] of ends.filter(Boolean).map(end => end.split(':'))) {
      const guest = byPid.get(Number(pid));
      // Of a sequence before.
      if (guest === undefined) continue;
      const died = !guest.alive && reason === 'peer-exited';
      const failed = guest.mayFail && reason === 'source-failed';
      if (!died && !failed) throw new Error(`the session of ${guest.name} has ended: ${reason}`);
    }
  }

  async #endGuests(model: Model): Promise<void> {
    for (const [at, guest] of model.alive.entries()) {
      guest.killed = true;
      const child = this.#processes.get(guest)?.process;
      if (at % 2 === 0) child?.kill();
      else child?.letGo();
      await child?.ended;
    }
    this.#processes.clear();
  }

  async #whole(): Promise<Daemon> {
    return { path: this.#path, daemon: await this.#daemon(), holder: this.#holder };
  }

  /** What its processes have now, in words. */
  async footprint(): Promise<string> {
    const { daemon, holder } = await this.#whole();
    const [ours, theirs] = [footprintOf(this.#node.pid), footprintOf(daemon)];
    return `Node ${ours}, the daemon ${theirs}, its holder ${footprintOf(holder)}`;
  }

  /** Nothing is open but what was at first; a daemon waits for a while for Nodes that it has not seen die. */
  async compareOpen(): Promise<void> {
    const deadline = performance.now() + RETURNING + PATIENCE;
    let open = openOf(await this.#whole());
    while (open.length > this.#open) {
      if (performance.now() > deadline)
        throw new Error(`${open.join(', ')} are open where ${this.#open} were`);
      await sleep(50);
      open = openOf(await this.#whole());
    }
  }

  /** In order, when all is well; else by force. */
  async close(): Promise<void> {
    const children = [...this.#processes.values()].map(({ process: child }) => child);
    try {
      if (this.#problem === undefined && children.length === 0) {
        await this.#endDaemon();
      } else {
        process.kill(this.#holder, 'SIGSTOP');
        const daemon = await this.#daemon().catch(() => 0);
        process.kill(this.#holder, 'SIGKILL');
        if (daemon > 0) process.kill(daemon, 'SIGKILL');
      }
    } finally {
      const all = [...children, this.#node, this.#spare];
      for (const child of all) child.kill();
      await Promise.all(all.map(async child => child.ended));
      rmSync(this.#folder, { recursive: true, force: true });
    }
  }
}
