/**
 * What must be read: of every page of every guest, whatever is killed, replaced, held or broken meanwhile.
 *
 * - A page that its owner has discarded reads zero for ever after, and nothing else does.
 * - Every other page reads the image, or is poison where the policy is that and the source may have failed.
 * - Who touches a page waits only where the page may be missing, and its guest may be held or its source does not answer.
 * - Nobody dies but by a policy that says so.
 *
 * `maybe` is said only where two things really happen at once: a page that is touched while it is discarded, a source that is
 * mended while it is asked. What is certain is certain again as soon as they are over.
 */

import { PAGES, regionOf, wordOf, ZERO } from './image.js';

export type Policy = 'poison' | 'kill' | 'hold';
export const POLICIES: readonly Policy[] = ['poison', 'kill', 'hold'];

/** Where a guest's bytes come from, and what happens when they do not. */
export interface Kind {
  source: 'file' | 'js';
  policy: Policy;
}

type Sure = 'no' | 'maybe' | 'yes';

/** A source: the file of a policy, one that never breaks, or what a Node answers for. */
export type Source = { of: 'file'; policy: Policy } | { of: 'spare' } | { of: 'js'; node: number };

/**
 * - `good`: what is asked for comes.
 * - `slow`: nothing comes until it is good again.
 * - `failing`: what is asked for fails.
 * - `unsure`: it fails, or is waited for: another daemon gives its Node the time to connect again.
 */
type Health = 'good' | 'slow' | 'failing' | 'unsure';

interface Page {
  /** Discards that have begun, and that are over. */
  begun: number;
  over: number;
  present: Sure;
  /** Accesses that have begun. */
  touched: number;
}

/** A page that is being touched, or that was. */
export interface Access {
  readonly guest: Guest;
  readonly page: number;
  readonly how: 'look' | 'peek';
  /** As the page was when it began. */
  readonly before: Page;
  /** It cannot give bytes: nobody may bring any now. */
  blocked: boolean;
  /** It can only be poison. */
  doomed: boolean;
}

/** Pages that are being discarded. */
export interface Discard {
  readonly guest: Guest;
  readonly pages: readonly number[];
  /** How often each was touched before, and whether it was being touched. */
  readonly before: ReadonlyMap<number, { touched: number; busy: boolean }>;
}

/** A process whose memory is served. */
export class Guest {
  readonly pages: Page[] = Array.from({ length: PAGES }, () => ({
    begun: 0,
    over: 0,
    present: 'no',
    touched: 0,
  }));
  readonly pending = new Set<Access>();
  /** Regions that a source in JavaScript may have brought, and the daemon may have kept. */
  readonly brought = new Set<number>();
  held: Sure = 'no';
  /** Its source may have failed where it was needed. */
  mayFail = false;
  /** Its session is over: poison was read. */
  failed = false;
  /** It was killed by whoever plays this. */
  killed = false;
  alive = true;
  source: Source;

  constructor(
    readonly name: string,
    readonly kind: Kind,
    node: number,
  ) {
    this.source = kind.source === 'js' ? { of: 'js', node } : { of: 'file', policy: kind.policy };
  }

  page(number: number): Page {
    const page = this.pages[number];
    if (page === undefined) throw new Error(`there is no page ${number}`);
    return page;
  }

  /** A source in JavaScript is asked for a whole region, and those who began with one have windows as large. */
  bring(region: number): void {
    this.brought.add(region);
    for (const [number, page] of this.pages.entries()) {
      if (regionOf(number) === region && page.present === 'no' && page.begun === 0) page.present = 'maybe';
    }
  }

  /** Whether an access needs nobody: the page was there and has stayed. */
  isThere({ page, before }: Access): boolean {
    return before.present === 'yes' && this.page(page).begun === before.begun;
  }
}

/** All that is known. */
export class Model {
  readonly guests: Guest[] = [];
  /** Whose files are broken. */
  readonly broken = new Set<Policy>();
  /** How many Nodes there were, and the state of the last. */
  node = 1;
  nodeAlive = true;
  /** It is known to have reached the daemon that is there now. */
  nodeReached = true;
  js: 'good' | 'slow' | 'failing' = 'good';
  /** Nodes for which a daemon may wait that has not seen them die. */
  readonly awaited = new Set<number>();
  /** What has happened, by name. */
  readonly done: string[] = [];
  /** Daemons that were ended. */
  deaths = 0;

  get alive(): Guest[] {
    return this.guests.filter(guest => guest.alive);
  }

  /** The guest that a number stands for. */
  guest(number: number): Guest | undefined {
    const { alive } = this;
    return alive[number % alive.length];
  }

  health({ source }: Guest): Health {
    if (source.of === 'spare') return 'good';
    if (source.of === 'file') return this.broken.has(source.policy) ? 'failing' : 'good';
    if (source.node === this.node && this.nodeAlive) return this.js;
    return this.awaited.has(source.node) ? 'unsure' : 'failing';
  }

  /** Somebody touches a page from now on. */
  touch(guest: Guest, number: number, how: Access['how']): Access {
    const page = guest.page(number);
    const access: Access = { guest, page: number, how, before: { ...page }, blocked: false, doomed: false };
    page.touched += 1;
    // Somebody else may have got it already, of whom that is not known yet.
    const others = [...guest.pending].some(
      other => other.page === number && !(other.blocked || other.doomed),
    );
    const missing = page.present === 'no' && !others;
    guest.pending.add(access);
    const wanted = missing && page.begun === 0;
    if (guest.failed) access.doomed = wanted && !guest.brought.has(regionOf(number));
    else if (missing && guest.held === 'yes') access.blocked = true;
    else if (wanted && !guest.brought.has(regionOf(number))) {
      const health = this.health(guest);
      if (health === 'slow') access.blocked = true;
      else if (health === 'failing' && guest.kind.policy !== 'poison') access.blocked = true;
      else if (health === 'failing' && guest.held === 'no') access.doomed = true;
    }
    this.look();
    return access;
  }

  /** What follows from how things are now, for everybody who waits. */
  look(): void {
    for (const guest of this.alive) {
      if (guest.failed || guest.held === 'yes') continue;
      const health = this.health(guest);
      for (const access of guest.pending) {
        if (access.before.over > 0 || guest.isThere(access)) continue;
        if (health !== 'good' && health !== 'slow') {
          guest.mayFail = true;
          if (guest.kind.policy === 'hold') guest.held = 'maybe';
        }
        const whole = guest.source.of === 'js' || guest.kind.source === 'js';
        if (health !== 'failing' && whole) guest.bring(regionOf(access.page));
      }
    }
  }

  /** Whether an access that has not ended may go on waiting. */
  mayWait(access: Access): boolean {
    const { guest } = access;
    if (guest.isThere(access)) return false;
    if (guest.held !== 'no') return true;
    if (guest.failed || access.before.over > 0) return false;
    const health = this.health(guest);
    return health === 'slow' || health === 'unsure';
  }

  /** What an access has read; throws where that cannot be. */
  read(access: Access, word: string): void {
    const { guest, before } = access;
    const page = guest.page(access.page);
    const told = `${guest.name}: page ${access.page} reads ${word}`;
    guest.pending.delete(access);
    if (word === 'poisoned') {
      const gone = before.over > 0 || guest.isThere(access);
      if (gone || !guest.mayFail || guest.kind.policy !== 'poison')
        throw new Error(`${told}: who poisoned it?`);
      guest.failed = true;
      return;
    }
    if (access.blocked) throw new Error(`${told} although nobody may bring it now`);
    if (word === ZERO) {
      if (page.begun === 0) throw new Error(`${told}, but was not discarded`);
    } else if (word === 'mixed' && access.how === 'peek' && before.over === 0 && page.begun > 0) {
      // Its loads are one after the other, and the page was discarded between two of them.
    } else if (word !== wordOf(access.page)) {
      throw new Error(`${told} instead of ${wordOf(access.page)}`);
    } else if (before.over > 0) {
      throw new Error(`${told} although it was discarded`);
    } else if (access.doomed) {
      throw new Error(`${told} although its source has failed`);
    }
    page.present = page.begun === before.begun ? 'yes' : 'maybe';
  }

  /** Pages are discarded from now on: zeros may come, whoever holds what. */
  discard(guest: Guest, pages: readonly number[]): Discard {
    const before = new Map(
      pages.map(number => {
        const page = guest.page(number);
        page.begun += 1;
        const waiting = [...guest.pending].filter(access => access.page === number);
        for (const access of waiting) release(access);
        if (page.present === 'yes' || waiting.length > 0) page.present = 'maybe';
        return [number, { touched: page.touched, busy: waiting.length > 0 }];
      }),
    );
    return { guest, pages, before };
  }

  /** They are. */
  discarded({ guest, pages, before }: Discard): void {
    for (const number of pages) {
      const page = guest.page(number);
      const was = before.get(number);
      page.over += 1;
      page.present = was?.busy === false && was.touched === page.touched ? 'no' : 'maybe';
    }
  }

  /** A guest has ended by itself, or by a policy; throws where no policy says so. */
  died(guest: Guest, signal: string | null): void {
    guest.alive = false;
    const { policy } = guest.kind;
    const poisoned = [...guest.pending].some(({ how, before }) => how === 'peek' && before.over === 0);
    guest.pending.clear();
    if (guest.killed) return;
    const why =
      signal === 'SIGKILL' ? policy === 'kill' : signal === 'SIGBUS' && policy === 'poison' && poisoned;
    if (!guest.mayFail || !why) throw new Error(`${guest.name} died of ${signal}: whose policy was that?`);
  }

  /** The Node is gone, and everything that only it could bring. */
  nodeEnds(): void {
    this.nodeAlive = false;
    if (!this.nodeReached) this.awaited.add(this.node);
    this.look();
  }

  nodeBegins(): void {
    this.node += 1;
    this.nodeAlive = true;
    this.nodeReached = true;
    this.js = 'good';
  }

  /** The sources of the Node that is there are another way from now on. */
  setSource(mode: Model['js']): void {
    this.js = mode;
    for (const guest of this.alive) if (guest.source.of === 'js') guest.pending.forEach(release);
    this.look();
  }

  breakFile(policy: Policy, act: () => void): void {
    act();
    this.broken.add(policy);
    this.look();
  }

  mendFile(policy: Policy): void {
    this.broken.delete(policy);
    for (const { source, pending } of this.alive) {
      if (source.of === 'file' && source.policy === policy) pending.forEach(release);
    }
  }

  /** A guest is about to go on: until it is known to, it is served from either source. */
  resuming(guest: Guest, from: 'same' | 'js' | 'spare'): void {
    guest.pending.forEach(release);
    if (guest.held === 'yes') guest.held = 'maybe';
    this.look();
    const before = guest.source;
    guest.source = this.from(guest, from);
    this.look();
    guest.source = before;
  }

  resumed(guest: Guest, from: 'same' | 'js' | 'spare'): void {
    guest.source = this.from(guest, from);
    guest.held = 'no';
    this.look();
  }

  private from(guest: Guest, from: 'same' | 'js' | 'spare'): Source {
    if (from === 'same') return guest.source;
    return from === 'js' ? { of: 'js', node: this.node } : { of: 'spare' };
  }

  /** What a guest has to be resumed from so that it goes on; nothing where it does. */
  wayOn(guest: Guest): 'same' | 'js' | undefined {
    if (guest.failed) return undefined;
    const { source } = guest;
    if (source.of === 'js' && source.node !== this.node) return 'js';
    return guest.held === 'no' ? undefined : 'same';
  }

  /** Another daemon takes over: what only Nodes could bring that are gone is waited for. */
  daemonEnds(): void {
    this.deaths += 1;
    for (let node = 1; node <= this.node; node += 1) {
      if (node < this.node || !this.nodeAlive) this.awaited.add(node);
    }
    this.nodeReached = false;
    this.look();
  }
}

function release(access: Access): void {
  access.blocked = false;
  access.doomed = false;
}
