import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout } from 'node:timers/promises';

import { MiB } from 'userfaultfd';

import { Peer } from '../../examples/support/peer.js';
import type { Case, Contender, Measured, Row } from '../harness/case.js';
import { Child } from '../harness/child.js';
import { ours } from '../harness/handlers.js';
import type { Run } from '../harness/run.js';
import type { ServingOptions } from '../harness/serving.js';
import { CACHE, rival } from '../harness/tools.js';

const CLONES = 20;
const SIZE = 64 * MiB;
/** A quarter of its pages. */
const TOUCHED = SIZE / 4096 / 4;

/** MiB a process, of those with these ids. */
function memoryOf(pids: readonly number[]): Measured['figures'] {
  const mean = (name: string): number => {
    const kib = pids.map(pid => {
      const rollup = readFileSync(`/proc/${pid}/smaps_rollup`, 'utf8');
      return Number(new RegExp(`^${name}:\\s+(\\d+) kB`, 'm').exec(rollup)?.[1]);
    });
    return kib.reduce((sum, value) => sum + value, 0) / kib.length / 1024;
  };
  return { pss: mean('Pss'), rss: mean('Rss') };
}

/** So many clones that are served by one pager: what `use` makes of them, once each has touched its pages; and what is waited for when they have ended. */
async function touched<T>(
  run: Run,
  options: ServingOptions,
  clones: number,
  use: (pids: readonly number[]) => T,
  ended?: () => Promise<void>,
): Promise<T> {
  return run.inFolder(async folder => {
    const socket = join(folder, 's');
    const image = run.image(SIZE);
    const child = new Child(run.cpus.handler, ours({ ...options, peers: clones })(socket, image.path));
    const peers: Peer[] = [];
    try {
      await child.says();
      for (let clone = 0; clone < clones; clone += 1) {
        const peer = new Peer(['--socket', socket, '--region', `${SIZE}`]);
        peers.push(peer);
        await peer.ready();
        await child.says();
        await peer.ask('touch', 'order=random', 'seed=11', `limit=${TOUCHED}`);
      }
      return use(peers.map(({ pid }) => pid));
    } finally {
      for (const peer of peers) peer.kill();
      await Promise.all(peers.map(async peer => peer.ended));
      await ended?.();
      await child.end();
    }
  });
}

const served =
  (options: ServingOptions): Contender =>
  async run => ({ figures: await touched(run, options, CLONES, memoryOf) });

/** What another clone has touched is replayed to each: first, or while it touches that. */
const replaying =
  (options: ServingOptions): Contender =>
  async run => {
    const record = join(CACHE, `clone-${SIZE / MiB}MiB.trace`);
    const written = async (): Promise<void> => {
      for (let tries = 0; !existsSync(record) && tries < 5000; tries += 1) await setTimeout(1);
    };
    if (!existsSync(record)) {
      await touched(run, { window: 4096, server: { record } }, 1, () => {}, written);
    }
    return served({ ...options, server: { replay: record } })(run);
  };

/** Processes that map the file privately. */
async function mapped(run: Run): Promise<Measured> {
  const image = run.image(SIZE);
  const words = [rival('local-file'), image.path, 'mmap', 'random', `${TOUCHED}`];
  const children = Array.from({ length: CLONES }, () => new Child(run.cpus.handler, words));
  try {
    for (const child of children) await child.says();
    return { figures: memoryOf(children.map(({ pid }) => pid)) };
  } finally {
    for (const child of children) await child.end();
  }
}

const row = (figure: 'pss' | 'rss'): Row => ({
  name: `clones-${figure}`,
  placement: 'not pinned',
  figure,
  unit: 'MiB a clone',
  ours: 'on demand, windows',
  floor: 'private mapping of the file',
  rivals: ['on demand, page by page', 'replayed, then touched', 'replayed meanwhile', 'populated'],
  ratio: 'share',
});

/** What userfaultfd costs that a mapping does not: its pages are private. */
export const sharing: Case = {
  name: 'sharing',
  about: '20 clones of an image of 64 MiB that each touch a quarter of their pages at random: memory of each',
  rounds: [1, 1],
  contenders: {
    'on demand, windows': served({}),
    'on demand, page by page': served({ window: 4096 }),
    'replayed, then touched': replaying({ replayed: true }),
    'replayed meanwhile': replaying({}),
    populated: served({ populate: 'before' }),
    'private mapping of the file': mapped,
  },
  rows: [row('pss'), row('rss')],
};
