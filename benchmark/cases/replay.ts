import { existsSync } from 'node:fs';
import { join } from 'node:path';

import { fileSource, KiB, MemoryMapping, MiB, Pager } from 'userfaultfd';

import type { Case, Contender, Row } from '../harness/case.js';
import { output } from '../harness/child.js';
import { ours, serving, type Work } from '../harness/handlers.js';
import type { Run } from '../harness/run.js';
import { bench, CACHE } from '../harness/tools.js';

const PAGE = 4 * KiB;
const sizeOf = (run: Run): number => (run.quick ? 64 : 256) * MiB;

/** `crates/pager/benches/replay.rs`, which is its own faulting thread. Figures in ms; `faults`, `late`, `reads`. */
const working =
  (how: string, percent: number, cold: boolean): Contender =>
  async run => {
    const size = sizeOf(run);
    const file = cold ? [run.image(size).path] : [];
    const program = [bench('replay'), how, `${size / MiB}`, `${percent}`, ...file];
    return { figures: JSON.parse(await output(run.cpus.handler, program)) as Record<string, number> };
  };

const row = (name: string, figure: string, theirs: string, rivals: string[], goal?: number): Row => ({
  name,
  placement: 'not pinned',
  figure,
  unit: 'ms',
  ours: 'replay',
  floor: theirs,
  rivals,
  ratio: 'times',
  ...(goal === undefined ? {} : { goal: { atLeast: goal } }),
});

/** A source that has to be waited for. */
export const slowReplay: Case = {
  name: 'replay-slow',
  about: 'a quarter of the memory at random, from a source that takes half a millisecond for each request',
  contenders: {
    replay: working('replay', 25, false),
    'replay, then touched': working('before', 25, false),
    '64 KiB windows': working('windows', 25, false),
  },
  rows: [row('replay-slow-source', 'total', '64 KiB windows', ['replay, then touched'], 10)],
  // Nearly all of it is waiting for the source: no round differs from another by more than 6 %.
  rounds: [1, 1],
};

/** A disk. */
export const coldReplay: Case = {
  name: 'replay-cold',
  about:
    'a tenth of the memory at random, from a file that is not in the page cache: how long touching it takes',
  contenders: {
    replay: working('before', 10, true),
    'replay while it is touched': working('replay', 10, true),
    'on demand': working('page', 10, true),
    '64 KiB windows': working('windows', 10, true),
  },
  rows: [
    row('replay-cold-stall', 'touch', 'on demand', ['replay while it is touched', '64 KiB windows'], 10),
    row('replay-cold-total', 'total', 'on demand', ['replay while it is touched', '64 KiB windows']),
  ],
  rounds: [3, 1],
};

/** Three quarters are replayed; faults are taken in the last. */
const work = (run: Run): Work => ({
  image: run.image(sizeOf(run) * 2),
  touch: `order=random seed=5 offset=${(sizeOf(run) * 3) / 2} limit=${run.quick ? 300 : 1500}`,
  compare: false,
});

/** A recording of a run that has touched every second page of the first three quarters. */
async function recording(run: Run): Promise<string> {
  const size = sizeOf(run) * 2;
  const path = join(CACHE, `replayed-${size / MiB}MiB.trace`);
  if (existsSync(path)) return path;
  const pager = Pager.create();
  const mapping = MemoryMapping.anonymous(size);
  const source = fileSource(run.image(size).path);
  const session = await pager.serve(mapping, { source, record: path, window: PAGE });
  for (let offset = 0; offset < (size / 4) * 3; offset += 2 * PAGE) await mapping.read(offset, 1);
  await session.close({ rest: 'zero' });
  await pager.close();
  mapping.close();
  return path;
}

/** Demand comes first. */
export const demandInReplay: Case = {
  name: 'demand-replay',
  about: 'faults at random while a recording of other memory is replayed, against the same alone',
  contenders: {
    'while replaying': async run => serving(ours({ server: { replay: await recording(run) } }), work)(run),
    alone: serving(ours(), work),
  },
  rows: (['p99', 'median'] as const).map(figure => ({
    name: `demand-${figure}-replay`,
    placement: 'two CPUs' as const,
    figure,
    unit: 'us',
    ours: 'while replaying',
    floor: 'alone',
    ratio: 'share' as const,
    ...(figure === 'p99' ? { goal: { atMost: 1.2 } } : {}),
  })),
};
