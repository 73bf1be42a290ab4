// Wrong arguments: each throws an error that names the argument, before anything is done.

import test from 'ava';
import {
  DeadUffdChecker,
  EventBatch,
  MemoryMapping,
  registerRegions,
  unregisterRegions,
  Userfaultfd,
  UserfaultfdFactory,
} from 'userfaultfd';

import { mapped, PAGE, pageOf, registered } from './helpers/faults.js';

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
