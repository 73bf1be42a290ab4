/** Transparent huge pages, as the kernel tells of them. */

import { readFileSync } from 'node:fs';

import { MiB } from 'userfaultfd';

export const HUGE: number = 2 * MiB;

/** KiB of transparent huge pages that a process has in this range. */
export function hugeIn(pid: number, start: bigint, length: number): number {
  let [inside, sum] = [false, 0];
  for (const line of readFileSync(`/proc/${pid}/smaps`, 'utf8').split('\n')) {
    const mapping = /^([0-9a-f]+)-([0-9a-f]+) /.exec(line);
    if (mapping) {
      const [from, to] = [BigInt(`0x${mapping[1]}`), BigInt(`0x${mapping[2]}`)];
      inside = from < start + BigInt(length) && to > start;
    }
    if (inside) sum += Number(/^AnonHugePages: +(\d+) kB/.exec(line)?.[1] ?? 0);
  }
  return sum;
}

/** Whole huge pages between these addresses. */
export function blocksIn(start: bigint, length: number): number {
  const huge = BigInt(HUGE);
  return Number((start + BigInt(length)) / huge - (start + huge - 1n) / huge);
}
