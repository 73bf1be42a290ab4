/** Numbers for people. */

import { GiB, KiB, MiB } from '../../units.js';

/** Of eight letters at most, up to a terabyte: there is room for so many beside a drawing on a telephone. */
export function bytes(count: number): string {
  if (count >= GiB) return `${short(count / GiB)} GiB`;
  if (count >= MiB) return `${short(count / MiB)} MiB`;
  return count >= KiB ? `${(count / KiB).toFixed(0)} KiB` : `${count} B`;
}

const short = (size: number): string => size.toFixed(size < 100 ? 1 : 0);

export function milliseconds(time: number): string {
  if (time === 0) return '0';
  if (time < 0.9995) return `${Number((time * 1000).toPrecision(3))} µs`;
  return time < 999.5 ? `${Number(time.toPrecision(3))} ms` : `${Number((time / 1000).toPrecision(3))} s`;
}

export function faultCount(count: number): string {
  return count === 1 ? '1 fault' : `${count} faults`;
}
