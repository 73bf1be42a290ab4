/** What is compared with what. */

import type { Figures, WorkName } from './works.js';

/** On which CPUs: what touches and what answers on one, or on one each. */
export type Placement = 'one CPU' | 'two CPUs';

export interface Row {
  readonly name: string;
  readonly title: string;
  /** Of the package. */
  readonly work: WorkName;
  readonly floor: WorkName;
  /** What each of them is, in words. */
  readonly words: readonly [ours: string, floor: string];
  /** What else does the same, by name; where, if not everywhere. */
  readonly others: Readonly<Record<string, { work: WorkName; placement?: Placement }>>;
  readonly placements: readonly Placement[];
  /** The figure that is compared; less is better. */
  readonly figure: keyof Omit<Figures, 'sum'>;
  /** Order in which pages are touched: 0 from the first to the last. */
  readonly seed: number;
}

const BOTH = ['one CPU', 'two CPUs'] as const;
const LOOP = 'native loop: poll, read, UFFDIO_COPY';

/** In the order in which they run. */
export const ROWS: readonly Row[] = [
  {
    name: 'page',
    title: 'Faults, each answered with one page that is in memory',
    work: 'page',
    floor: 'floor-answer',
    words: ['pager', LOOP],
    others: { 'native loop that never sleeps': { work: 'floor-spin', placement: 'two CPUs' } },
    placements: BOTH,
    figure: 'each',
    seed: 0,
  },
  {
    name: 'image',
    title: 'All pages of a file in the page cache, touched at random, until the last is there',
    work: 'pager',
    floor: 'floor-fill',
    words: ['pager, as it is by default', 'UFFDIO_COPY of all of it before anything is touched'],
    others: { 'native loop, a page a fault': { work: 'floor-answer' }, 'mmap of the file': { work: 'mmap' } },
    placements: BOTH,
    figure: 'total',
    seed: 11,
  },
  {
    name: 'handler',
    title: 'Faults, each answered by a JavaScript callback with one page',
    work: 'handler',
    floor: 'floor-answer',
    words: ['callback', LOOP],
    others: {},
    placements: BOTH,
    figure: 'each',
    seed: 0,
  },
  {
    name: 'call',
    title: 'A page copied by a call from JavaScript, no fault',
    work: 'call',
    floor: 'floor-call',
    words: ['tryCopy', 'UFFDIO_COPY'],
    others: {},
    placements: ['one CPU'],
    figure: 'each',
    seed: 0,
  },
];
