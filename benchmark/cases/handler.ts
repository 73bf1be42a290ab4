import { MiB } from 'userfaultfd';

import type { Case, Contender, Goal, Placement, Row } from '../harness/case.js';
import { type Handler, inC, serving, type Work } from '../harness/handlers.js';
import { uniformImage } from '../harness/image.js';
import { inside } from '../harness/inside.js';

const KINDS = {
  main: 'callback',
  batch: 'batches',
  worker: 'loop of a worker',
  fallback: 'notified by a thread',
  promise: 'promise',
  defer: 'put off first',
} as const;
type Kind = keyof typeof KINDS;
const kinds = Object.keys(KINDS) as Kind[];

/** Shares of C's faults a second, for one thread and for eight. */
const GOALS: { readonly [kind in Kind]?: readonly [number, number?] } = {
  main: [0.85],
  batch: [0.85, 0.75],
  worker: [0.9, 0.8],
  fallback: [0.6],
};

const inJavaScript =
  (kind: Kind): Handler =>
  (socket, image) =>
    inside('handling', socket, image, kind);
/** What runs first makes it warm: a function that was never called is not compiled yet. */
const work = (threads: number) => (): Work => ({
  image: uniformImage(128 * MiB),
  before: `limit=16384 threads=${threads}`,
  touch: `offset=${64 * MiB} threads=${threads}`,
});
const named = (name: string, threads: number): string =>
  `${name}, ${threads} thread${threads > 1 ? 's' : ''}`;
const contenders: Record<string, Contender> = {};
for (const threads of [1, 8]) {
  contenders[named('C', threads)] = serving(inC('drain'), work(threads));
  for (const kind of kinds)
    contenders[named(KINDS[kind], threads)] = serving(inJavaScript(kind), work(threads));
}

for (const threads of [1, 8]) {
  const held = (): Work => ({ ...work(threads)(), hold: 'uffd-guard' });
  contenders[named('callback, unguarded', threads)] = serving(inJavaScript('main'), held);
}

const row = (
  kind: Kind,
  threads: number,
  placement: Placement,
  figure: 'rate' | 'p99',
  goal?: Goal,
): Row => ({
  name: `handler-${kind}-${threads}-${placement.toLowerCase().replace(' ', '-')}${figure === 'p99' ? '-p99' : ''}`,
  placement,
  figure,
  unit: figure === 'rate' ? 'faults/s' : 'us',
  ours: named(KINDS[kind], threads),
  floor: named('C', threads),
  ratio: 'share',
  ...(goal === undefined ? {} : { goal }),
});

const rows = ([1, 8] as const).flatMap(threads =>
  (['two CPUs', 'one CPU'] as const).flatMap(placement =>
    kinds.flatMap(kind => {
      const share = GOALS[kind]?.[threads === 1 ? 0 : 1];
      const rate = share === undefined ? undefined : { atLeast: share };
      const late = threads === 1 && ['main', 'batch', 'worker'].includes(kind) ? { atMost: 1.5 } : undefined;
      return [row(kind, threads, placement, 'rate', rate), row(kind, threads, placement, 'p99', late)];
    }),
  ),
);

/** What the guard costs that looks after handlers: against its thread being stopped. */
const guard = (threads: number): Row => ({
  ...row('main', threads, 'one CPU', 'rate', { atLeast: 0.97 }),
  name: `handler-guard-${threads}-one-cpu`,
  floor: named('callback, unguarded', threads),
});

/** Where no source can bring the bytes. */
export const handler: Case = {
  name: 'handler',
  about: "another process's faults, each answered by JavaScript with one page, against the same loop in C",
  rounds: [2, 1],
  contenders,
  rows: [...rows, guard(1), guard(8)],
};
