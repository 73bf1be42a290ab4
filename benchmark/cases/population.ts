import { MiB } from 'userfaultfd';

import type { Case, Placement, Row } from '../harness/case.js';
import { inC, ours, serving, type Work } from '../harness/handlers.js';
import { sparseImage } from '../harness/image.js';
import type { Run } from '../harness/run.js';

const sizeOf = (run: Run): number => (run.quick ? 64 : 256) * MiB;
const data = (run: Run): Work => ({ image: run.image(sizeOf(run)) });
const zeros = (run: Run): Work => ({ image: sparseImage(sizeOf(run)) });
const fill = ours({ server: { mode: 'fill' } });
const populate = ours({ populate: 'before' });
const row = (what: string, how: string, placement: Placement = 'two CPUs'): Row => ({
  name: placement === 'two CPUs' ? `fill-${what}` : `fill-${what}-not-pinned`,
  placement,
  figure: 'fill',
  unit: 'ms',
  ours: `fill, ${what}`,
  floor: `C ${how}`,
  // Where there is a second CPU.
  rivals: [`populate(), ${what}`, ...(placement === 'two CPUs' ? [] : ['C in two halves'])],
  ratio: 'times',
  goal: { atLeast: 0.97 },
});

/** Nobody faults. */
export const population: Case = {
  name: 'population',
  about:
    'all of a process filled before its first fault, from a file in the page cache, and from memory; pinned to one CPU, and to none',
  contenders: {
    'fill, data': serving(fill, data),
    'populate(), data': serving(populate, data),
    'fill, memory': serving(ours({ buffered: true, server: { mode: 'fill' } }), data),
    'populate(), memory': serving(ours({ buffered: true, populate: 'before' }), data),
    'C bulk COPY': serving(inC('bulk'), data),
    'C in two halves': serving(inC('halves'), data),
    'fill, zeros': serving(fill, zeros),
    'populate(), zeros': serving(populate, zeros),
    'C ZEROPAGE': serving(inC('zero'), zeros),
  },
  rows: [
    row('data', 'bulk COPY'),
    row('memory', 'bulk COPY'),
    row('zeros', 'ZEROPAGE'),
    row('data', 'bulk COPY', 'not pinned'),
    row('memory', 'bulk COPY', 'not pinned'),
  ],
};
