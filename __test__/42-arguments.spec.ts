// Wrong arguments: each throws an error that names the argument, before anything is done.

import process from 'node:process';

import test from 'ava';
import {
  DeadUffdChecker,
  EventBatch,
  MemoryMapping,
  MiB,
  onExit,
  receiveFds,
  registerRegions,
  sendFds,
  unregisterRegions,
  Userfaultfd,
  UserfaultfdFactory,
} from 'userfaultfd';

import { mapped, PAGE, pageOf, registered } from './helpers/faults.js';
import { canRun, reserveHugePages } from './helpers/serving.js';

/** For what a type checker would refuse: assignable to everything. */
type Loose = never;

interface Row {
  readonly what: string;
  readonly code: string;
  readonly names: RegExp;
  readonly act: (uffd: Userfaultfd, mapping: MemoryMapping) => unknown;
}

const TYPE = 'ERR_INVALID_ARG_TYPE';
const VALUE = 'ERR_INVALID_ARG_VALUE';
const RANGE = 'ERR_OUT_OF_RANGE';

/** Every operation that takes a range first, with whatever else it needs. */
const OPERATIONS: Record<string, (uffd: Userfaultfd, range: Loose, mapping: MemoryMapping) => unknown> = {
  register: (uffd, range) => uffd.register(range, { modes: ['missing'] }),
  unregister: (uffd, range) => uffd.unregister(range),
  copy: (uffd, range) => uffd.copy(range, pageOf(1)),
  tryCopy: (uffd, range) => uffd.tryCopy(range, pageOf(1)),
  zero: (uffd, range) => uffd.zero(range),
  tryZero: (uffd, range) => uffd.tryZero(range),
  poison: (uffd, range) => uffd.poison(range),
  tryPoison: (uffd, range) => uffd.tryPoison(range),
  continue: (uffd, range) => uffd.continue(range),
  tryContinue: (uffd, range) => uffd.tryContinue(range),
  move: (uffd, range, mapping) => uffd.move(range, mapping.range(0, PAGE)),
  tryMove: (uffd, range, mapping) => uffd.tryMove(range, mapping.range(0, PAGE)),
  writeProtect: (uffd, range) => uffd.writeProtect(range),
  tryWriteProtect: (uffd, range) => uffd.tryWriteProtect(range),
  wake: (uffd, range) => uffd.wake(range),
  tryWake: (uffd, range) => uffd.tryWake(range),
};

const RANGES: [string, string, RegExp, (mapping: MemoryMapping) => unknown][] = [
  ['no range', TYPE, /`range`/, () => undefined],
  ['a number', TYPE, /`range`/, () => 4096],
  ['an unaligned offset', RANGE, /`range.offset`/, mapping => ({ mapping, offset: 1, length: PAGE })],
  ['an unaligned length', RANGE, /`range.length`/, mapping => ({ mapping, offset: 0, length: PAGE + 1 })],
  ['nothing', RANGE, /`range.length`/, mapping => ({ mapping, offset: 0, length: 0 })],
  ['a negative offset', RANGE, /`range.offset`/, mapping => ({ mapping, offset: -PAGE, length: PAGE })],
  ['a fraction', RANGE, /`range.offset`/, mapping => ({ mapping, offset: 0.5, length: PAGE })],
  ['more than the mapping', RANGE, /`range`/, mapping => ({ mapping, offset: 0, length: 64 * PAGE })],
  ['an overflow', RANGE, /`range/, mapping => ({ mapping, offset: 2 ** 52, length: 2 ** 53 - PAGE })],
  ['a mapping that is none', TYPE, /`range.mapping`/, () => ({ mapping: {}, offset: 0, length: PAGE })],
  ['an address that is a number', TYPE, /`range.address`/, () => ({ address: 4096, length: PAGE })],
  ['an unaligned address', RANGE, /`range.address`/, () => ({ address: 4097n, length: PAGE })],
  ['an address behind the last', RANGE, /`range.address`/, () => ({ address: 2n ** 63n, length: PAGE })],
  ['a negative address', RANGE, /`range.address`/, () => ({ address: -4096n, length: PAGE })],
  ['a misspelt property', VALUE, /`lenght`/, () => ({ address: 4096n, lenght: PAGE })],
];

for (const [operation, act] of Object.entries(OPERATIONS)) {
  test(`${operation} refuses ranges that are none, by name`, t => {
    const made = registered(t, 4);
    if (!made) return;
    const { uffd, mapping } = made;
    for (const [what, code, names, range] of RANGES) {
      t.throws(() => act(uffd, range(mapping) as Loose, mapping), { code, message: names }, what);
    }
    const closed = MemoryMapping.anonymous(PAGE);
    const range = closed.range();
    closed.close();
    t.throws(() => act(uffd, range as Loose, mapping), { code: 'ERR_UFFD_USE_AFTER_CLOSE' });
    t.deepEqual(mapping.residency(), ['absent', 'absent', 'absent', 'absent'], 'nothing was done');
    uffd.close();
    t.throws(() => act(uffd, mapping.range(2 * PAGE, PAGE) as Loose, mapping), {
      code: 'ERR_UFFD_USE_AFTER_CLOSE',
    });
  });
}

test('ranges that are not whole huge pages are refused by every operation', t => {
  if (!canRun(t) || !reserveHugePages(t, 2)) return;
  const made = registered(t, 1);
  if (!made) return;
  const { uffd, mapping } = made;
  const huge = mapped(t, MemoryMapping.anonymous(4 * MiB, { pages: 2 * MiB }));
  for (const [operation, act] of Object.entries(OPERATIONS)) {
    for (const [offset, length, names] of [
      [PAGE, 2 * MiB, /`range.offset`.*2097152/],
      [0, PAGE, /`range.length`.*2097152/],
      [2 * MiB, 2 * MiB + PAGE, /`range.length`/],
    ] as const) {
      const range = { mapping: huge, offset, length } as Loose;
      t.throws(() => act(uffd, range, mapping), { code: RANGE, message: names }, operation);
    }
  }
  t.throws(() => huge.range(PAGE), { code: RANGE, message: /`offset`/ });
  t.throws(() => huge.discardSync(0, PAGE), { code: RANGE, message: /`length`/ });
});

/** Everything that takes options, with options that are to be refused. */
const WITH_OPTIONS: Record<string, (options: Loose, uffd: Userfaultfd, mapping: MemoryMapping) => unknown> = {
  'Userfaultfd.create': options => Userfaultfd.create(options),
  'factory.create': options => {
    const factory = UserfaultfdFactory.syscallOnly();
    try {
      return factory.create(options);
    } finally {
      factory.close();
    }
  },
  'MemoryMapping.anonymous': options => MemoryMapping.anonymous(1, options),
  'MemoryMapping.memfd': options => MemoryMapping.memfd(1, options),
  'MemoryMapping.file': options => MemoryMapping.file('/dev/null', options),
  register: (options, uffd, mapping) => uffd.register(mapping.range(), options),
  copy: (options, uffd, mapping) => uffd.copy(mapping.range(0, PAGE), pageOf(1), options),
  tryCopy: (options, uffd, mapping) => uffd.tryCopy(mapping.range(0, PAGE), pageOf(1), options),
  zero: (options, uffd, mapping) => uffd.zero(mapping.range(), options),
  tryZero: (options, uffd, mapping) => uffd.tryZero(mapping.range(), options),
  poison: (options, uffd, mapping) => uffd.poison(mapping.range(), options),
  tryPoison: (options, uffd, mapping) => uffd.tryPoison(mapping.range(), options),
  continue: (options, uffd, mapping) => uffd.continue(mapping.range(), options),
  tryContinue: (options, uffd, mapping) => uffd.tryContinue(mapping.range(), options),
  move: (options, uffd, mapping) => uffd.move(mapping.range(0, PAGE), mapping.range(PAGE, PAGE), options),
  tryMove: (options, uffd, mapping) =>
    uffd.tryMove(mapping.range(0, PAGE), mapping.range(PAGE, PAGE), options),
  writeProtect: (options, uffd, mapping) => uffd.writeProtect(mapping.range(), options),
  tryWriteProtect: (options, uffd, mapping) => uffd.tryWriteProtect(mapping.range(), options),
  waitSync: (options, uffd) => uffd.waitSync(new EventBatch(), options),
  wait: async (options, uffd) => uffd.wait(options),
  events: async (options, uffd) => uffd.events(options).next(),
  close: (options, uffd) => uffd.close(options),
  populate: async (options, _, mapping) => mapping.populate(0, PAGE, options),
  writtenPages: (options, _, mapping) => mapping.writtenPages(options),
  registerRegions: (options, uffd, mapping) =>
    registerRegions([{ uffd, ranges: [mapping.range()] }], options),
  sendFds: async options => sendFds(0, [0], pageOf(1), options),
  receiveFds: async options => receiveFds(0, options),
  onExit: async options => onExit(process.pid, options),
};

for (const [method, act] of Object.entries(WITH_OPTIONS)) {
  test(`${method} refuses misspelt options and options that are none`, async t => {
    const made = registered(t, 2);
    if (!made) return;
    const { uffd, mapping } = made;
    const wrong = [
      [{ wakee: true }, { code: VALUE, message: /`wakee` in `options`/ }],
      [null, { code: TYPE, message: /`options`/ }],
      [7, { code: TYPE, message: /`options`/ }],
      [[], { code: TYPE, message: /`options`/ }],
    ] as const;
    for (const [options, expected] of wrong) {
      // Both forms: a promise that is rejected, or an error that is thrown.
      await t.throwsAsync(async () => act(options as Loose, uffd, mapping), expected);
    }
    t.false(uffd.closed);
    t.deepEqual(mapping.residency(), ['absent', 'absent'], 'nothing was done');
  });
}

const ROWS: Row[] = [
  {
    what: 'no modes',
    code: VALUE,
    names: /options.modes/,
    act: (u, m) => u.register(m.range(), { modes: [] }),
  },
  {
    what: 'a mode that is none',
    code: VALUE,
    names: /options.modes\[0\]/,
    act: (u, m) => u.register(m.range(), { modes: ['wp'] as Loose }),
  },
  {
    what: 'no options',
    code: TYPE,
    names: /options/,
    act: (u, m) => u.register(m.range(), undefined as Loose),
  },
  {
    what: 'an ioctl that is none',
    code: VALUE,
    names: /requireIoctls\[0\]/,
    act: (u, m) => u.register(m.range(), { modes: ['missing'], requireIoctls: ['zero'] as Loose }),
  },
  {
    what: 'an address of this process',
    code: VALUE,
    names: /`range`.*MemoryMapping/,
    act: (u, m) => u.register({ address: m.address, length: PAGE }, { modes: ['missing'] }),
  },
  {
    what: 'a misspelt option of copy',
    code: VALUE,
    names: /`wakes`/,
    act: (u, m) => u.copy(m.range(0, PAGE), pageOf(1), { wakes: true } as Loose),
  },
  {
    what: 'an option of another operation',
    code: VALUE,
    names: /`writeProtect`/,
    act: (u, m) => u.zero(m.range(0, PAGE), { writeProtect: true } as Loose),
  },
  {
    what: 'an option of the wrong type',
    code: TYPE,
    names: /`options.wake`/,
    act: (u, m) => u.tryZero(m.range(0, PAGE), { wake: 'no' } as Loose),
  },
  {
    what: 'onPresent that is none',
    code: VALUE,
    names: /`options.onPresent`/,
    act: (u, m) => u.zero(m.range(0, PAGE), { onPresent: 'ignore' } as Loose),
  },
  {
    what: 'no source',
    code: TYPE,
    names: /`source`/,
    act: (u, m) => u.copy(m.range(0, PAGE), undefined as Loose),
  },
  {
    what: 'a source of another length',
    code: RANGE,
    names: /`source`.*4096/,
    act: (u, m) => u.copy(m.range(0, PAGE), pageOf(1, 2)),
  },
  {
    what: 'a source range of another length',
    code: RANGE,
    names: /`source`/,
    act: (u, m) => u.tryCopy(m.range(0, PAGE), { address: m.address, length: 8 }),
  },
  {
    what: 'a detached source',
    code: RANGE,
    names: /`source`/,
    act: (u, m) => {
      const bytes = new Uint8Array(PAGE);
      structuredClone(bytes.buffer, { transfer: [bytes.buffer] });
      u.copy(m.range(0, PAGE), bytes);
    },
  },
  {
    what: 'an overlapping move',
    code: RANGE,
    names: /`source`/,
    act: (u, m) => u.move(m.range(0, 2 * PAGE), m.range(PAGE, 2 * PAGE)),
  },
  {
    what: 'a move of another length',
    code: RANGE,
    names: /`source`/,
    act: (u, m) => u.tryMove(m.range(0, PAGE), m.range(PAGE, 2 * PAGE)),
  },
  { what: 'no batch', code: TYPE, names: /`batch`/, act: u => u.readEvents([] as Loose) },
  {
    what: 'a timeout below zero',
    code: RANGE,
    names: /`options.timeout`/,
    act: u => u.waitSync(new EventBatch(), { timeout: -1 }),
  },
  {
    what: 'closing by another word',
    code: VALUE,
    names: /`options.waiting`/,
    act: u => u.close({ waiting: 'kill' } as Loose),
  },
  { what: 'a batch of nothing', code: RANGE, names: /`capacity`/, act: () => new EventBatch(0) },
  {
    what: 'a misspelt feature',
    code: VALUE,
    names: /require\[0\]/,
    act: () => Userfaultfd.create({ require: ['fork'] as Loose }),
  },
  {
    what: 'a misspelt option of create',
    code: VALUE,
    names: /`required`/,
    act: () => Userfaultfd.create({ required: [] } as Loose),
  },
  {
    what: 'faults that are none',
    code: VALUE,
    names: /`options.faults`/,
    act: () => Userfaultfd.create({ faults: 'kernel' } as Loose),
  },
  { what: 'a descriptor below zero', code: RANGE, names: /`fd`/, act: () => Userfaultfd.adopt(-1) },
  { what: 'a device below zero', code: RANGE, names: /`fd`/, act: () => UserfaultfdFactory.fromDevice(-1) },
  { what: 'an empty mapping', code: RANGE, names: /`length`/, act: () => MemoryMapping.anonymous(0) },
  {
    what: 'a length that is a string',
    code: TYPE,
    names: /`length`/,
    act: () => MemoryMapping.memfd('1' as Loose),
  },
  {
    what: 'pages of a size that is none',
    code: RANGE,
    names: /`options.pages`/,
    act: () => MemoryMapping.anonymous(1, { pages: 3_000_000 }),
  },
  {
    what: 'pages of a kind that is none',
    code: VALUE,
    names: /`options.pages`/,
    act: () => MemoryMapping.anonymous(1, { pages: 'huge' as Loose }),
  },
  { what: 'a file that is none', code: TYPE, names: /`file`/, act: () => MemoryMapping.file({} as Loose) },
  {
    what: 'reading behind the end',
    code: RANGE,
    names: /`length`/,
    act: (_, m) => m.readSync(0, new Uint8Array(65 * PAGE)),
  },
  { what: 'writing no view', code: TYPE, names: /`bytes`/, act: (_, m) => m.writeSync(0, 'text' as Loose) },
  { what: 'discarding parts of pages', code: RANGE, names: /`length`/, act: (_, m) => m.discardSync(0, 5) },
  { what: 'a range from inside a page', code: RANGE, names: /`offset`/, act: (_, m) => m.range(5, PAGE) },
  {
    what: 'scanning for no pages',
    code: RANGE,
    names: /`options.maxPages`/,
    act: (_, m) => m.writtenPages({ maxPages: 0 }),
  },
  {
    what: 'targets that are no list',
    code: TYPE,
    names: /`targets`/,
    act: () => registerRegions({} as Loose, { modes: ['missing'] }),
  },
  {
    what: 'a target without a userfaultfd',
    code: TYPE,
    names: /`targets\[0\]`/,
    act: () => unregisterRegions([{ uffd: 3, ranges: [] }] as Loose),
  },
  {
    what: 'a range among targets',
    code: RANGE,
    names: /`targets\[0\].ranges\[1\]/,
    act: (u, m) =>
      registerRegions([{ uffd: u, ranges: [m.range(), { mapping: m, offset: 3, length: PAGE }] }], {
        modes: ['missing'],
      }),
  },
  {
    what: 'checking what is no userfaultfd',
    code: TYPE,
    names: /`uffd`/,
    act: () => new DeadUffdChecker().isDead({} as Loose),
  },
];

test('every other argument that is wrong is named, and nothing is done', t => {
  const made = registered(t, 4);
  if (!made) return;
  const { uffd } = made;
  const mapping = mapped(t, MemoryMapping.anonymous(4 * PAGE));
  for (const { what, code, names, act } of ROWS) {
    t.throws(() => act(uffd, made.mapping), { code, message: names }, what);
  }
  t.deepEqual(made.mapping.residency(), ['absent', 'absent', 'absent', 'absent']);
  t.is(uffd.waitingThreads(), 0);
  t.is(mapping.length, 4 * PAGE);
});
