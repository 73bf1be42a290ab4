/** What a case is: contenders that do the same work, and rows that compare their figures. */

import type { Run } from './run.js';

/** What one contender came to in one run. */
export interface Measured {
  /** By name, each in the unit of the rows that show it. */
  figures: Readonly<Record<string, number>>;
  /** What the work came to; has to be the same of every contender that tells it (a checksum). */
  result?: string;
}

/** Measures once, in processes of its own. */
export type Contender = (run: Run) => Promise<Measured>;

/** Where the threads run: the faulting ones on the first CPU and the handler on the second; both on the second; not pinned. */
export type Placement = 'two CPUs' | 'one CPU' | 'not pinned';

/** What the ratio must be. */
export type Goal = { readonly atLeast: number } | { readonly atMost: number };

/** One line of the report. */
export interface Row {
  /** Unique: what `--case` takes, and `case` in the output. */
  readonly name: string;
  readonly placement: Placement;
  /** Which of the figures. */
  readonly figure: string;
  readonly unit: string;
  /** The contender that is this package; with others of its ways in `rivals`. */
  readonly ours: string;
  /** What it is measured against; the goal is about this one. */
  readonly floor: string;
  /** Others to compare with. */
  readonly rivals?: readonly string[];
  /** How they are compared: `'share'` is ours / theirs, `'times'` theirs / ours. */
  readonly ratio: 'share' | 'times';
  /** Absent: reported only. */
  readonly goal?: Goal;
}

/** One file in `cases/`. */
export interface Case {
  /** `--case` takes it for all of its rows. */
  readonly name: string;
  /** One sentence. */
  readonly about: string;
  readonly contenders: Readonly<Record<string, Contender>>;
  readonly rows: readonly Row[];
  /** Rounds of a full run, of a quick one. Default: 5 and 1. */
  readonly rounds?: readonly [number, number];
}
