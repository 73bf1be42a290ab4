import { MiB } from 'userfaultfd';

import type { Case, Row } from '../harness/case.js';
import { inC, ours, serving, type Work } from '../harness/handlers.js';
import { sparseImage } from '../harness/image.js';
import type { Run } from '../harness/run.js';

const sizeOf = (run: Run): number => (run.quick ? 64 : 256) * MiB;
const data = (run: Run): Work => ({ image: run.image(sizeOf(run)) });
const zeros = (run: Run): Work => ({ image: sparseImage(sizeOf(run)) });
const row = (what: string, how: string): Row => ({
  name: `populate-${what}`,
  placement: 'two CPUs',
  figure: 'fill',
  unit: 'ms',
  ours: `ours, ${what}`,
  floor: `C ${how}`,
  ratio: 'times',
  goal: { atLeast: 0.97 },
});

/** Nobody faults. */
export const population: Case = {
  name: 'population',
  about: 'all of a process filled before its first fault, from a file in the page cache',
  contenders: {
    'ours, data': serving(ours({ populate: 'before' }), data),
    'ours, fill': serving(ours({ server: { mode: 'fill' } }), data),
    'ours, from memory': serving(ours({ buffered: true, server: { mode: 'fill' } }), data),
    'C bulk COPY': serving(inC('bulk'), data),
    'ours, zeros': serving(ours({ populate: 'before' }), zeros),
    'C ZEROPAGE': serving(inC('zero'), zeros),
  },
  rows: [
    { ...row('data', 'bulk COPY'), rivals: ['ours, fill'] },
    { ...row('data', 'bulk COPY'), name: 'fill-from-memory', ours: 'ours, from memory' },
    row('zeros', 'ZEROPAGE'),
  ],
};
