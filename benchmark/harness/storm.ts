/** `crates/pager/benches/storm.rs`: the pager inside of its own process, and threads of that which fault. */

import { MiB } from 'userfaultfd';

import type { Contender } from './case.js';
import { printing } from './inside.js';
import { bench, type Part } from './tools.js';

/** What it is told. */
export interface Storm {
  threads: number;
  sessions?: number;
  /** Filled from a file. Default: from memory. */
  file?: boolean;
  how?: 'own' | 'recorded';
  without?: Part;
}

/** The figure is `ns`: nanoseconds a fault. */
export const storm = ({ threads, sessions = 1, file = false, how = 'own', without }: Storm): Contender =>
  printing(
    run => {
      const image = file ? run.image(64 * MiB).path : '-';
      return [bench('storm', without), threads, run.quick ? 2 : 5, sessions, image, how].map(String);
    },
    ['ns'],
    64 * MiB,
    true,
  );
