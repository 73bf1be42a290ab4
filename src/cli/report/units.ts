/** Numbers for people. */

import { GiB, KiB, MiB } from '../../units.js';

export function bytes(count: number): string {
  if (count >= GiB) return `${(count / GiB).toFixed(1)} GiB`;
  if (count >= MiB) return `${(count / MiB).toFixed(1)} MiB`;
  return count >= KiB ? `${(count / KiB).toFixed(0)} KiB` : `${count} B`;
}

export function milliseconds(time: number): string {
  if (time === 0) return '0';
  if (time < 0.9995) return `${Number((time * 1000).toPrecision(3))} µs`;
  return time < 999.5 ? `${Number(time.toPrecision(3))} ms` : `${Number((time / 1000).toPrecision(3))} s`;
}

export function faultCount(count: number): string {
  return count === 1 ? '1 fault' : `${count} faults`;
}
