/** On which CPUs things run. */

import { allowedCpus } from '../../examples/support/machine.js';
import type { Placement } from './case.js';

/** CPU numbers; `undefined` is not pinned. */
export interface Cpus {
  faulter: number | undefined;
  handler: number | undefined;
}

const [first = 0, second] = allowedCpus();

/** The CPUs of a placement; `undefined` where this machine has too few. */
export function cpusOf(placement: Placement): Cpus | undefined {
  if (placement === 'not pinned') return { faulter: undefined, handler: undefined };
  if (placement === 'one CPU') return { faulter: second ?? first, handler: second ?? first };
  return second === undefined ? undefined : { faulter: first, handler: second };
}

/** In words. */
export function describe(placement: Placement): string {
  const cpus = cpusOf(placement);
  if (cpus?.faulter === undefined) return placement;
  return cpus.faulter === cpus.handler
    ? `${placement} (${cpus.faulter})`
    : `${placement} (faults on ${cpus.faulter}, answers on ${cpus.handler})`;
}

/** The command, on one CPU only, or on those of a list. */
export function pinned(cpu: number | string | undefined, command: readonly string[]): [string, ...string[]] {
  const words = cpu === undefined ? command : ['taskset', '-c', `${cpu}`, ...command];
  const [program, ...args] = words;
  if (program === undefined) throw new Error('an empty command');
  return [program, ...args];
}
