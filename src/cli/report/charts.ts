/** What happened over time: how what faults brought grew, and which faults a replay did not spare. */

import type { Figures, Misses } from './model.js';
import {
  BAR,
  BOTTOM,
  column,
  countAxis,
  ground,
  HEAT,
  label,
  LEFT,
  LEGEND,
  named,
  timeAxis,
  WIDTH,
} from './svg.js';
import { bytes, milliseconds } from './units.js';

const HEIGHT = 220;

/** The end of one of `count` equal stretches of the time. */
const endOf = (index: number, count: number, duration: number): string =>
  milliseconds(((index + 1) / count) * duration);

/** Bytes that faults had brought, each page counted once. */
export function growthChart({ growth, faulted, heat: { duration } }: Figures): string {
  const bottom = HEIGHT - BOTTOM;
  const width = (WIDTH - LEFT) / growth.length;
  const top = 16;
  return [
    ground(bottom),
    // One area: no edge of a column is to be seen.
    '<g shape-rendering="crispEdges">',
    ...growth.map((size, index) => {
      const height = (size / Math.max(1, faulted)) * (bottom - top);
      const title = `by ${endOf(index, growth.length, duration)}: ${bytes(size)}`;
      return column(LEFT + index * width, width + 0.6, bottom - height, height, BAR, title);
    }),
    '</g>',
    label(LEFT - 8, 30, bytes(faulted), 'end'),
    label(LEFT - 8, bottom, '0', 'end'),
    timeAxis(bottom, duration),
  ].join('\n');
}

/** Faults on what was replayed, below those on what was not. */
export function missChart({ late, missed }: Misses, duration: number): string {
  const bottom = HEIGHT - BOTTOM;
  const width = (WIDTH - LEFT) / late.length;
  const most = Math.max(1, ...late.map((count, index) => count + (missed[index] ?? 0)));
  const room = bottom - LEGEND;
  const drawn = late.flatMap((lates, index) => {
    const misses = missed[index] ?? 0;
    const x = LEFT + index * width + 1;
    const until = endOf(index, late.length, duration);
    const heights = [lates, misses].map(count => (count / most) * room);
    const [lower = 0, upper = 0] = heights;
    return [
      ...(lates > 0 ? [column(x, width - 2, bottom - lower, lower, BAR, `by ${until}: ${lates} late`)] : []),
      ...(misses > 0
        ? [column(x, width - 2, bottom - lower - upper, upper, HEAT, `by ${until}: ${misses} missed`)]
        : []),
    ];
  });
  const sum = (counts: readonly number[]): number => counts.reduce((all, count) => all + count, 0);
  return [
    ground(bottom),
    ...drawn,
    named(LEFT, BAR, `late: ${sum(late)}`),
    named((WIDTH + LEFT) / 2, HEAT, `missed: ${sum(missed)}`),
    countAxis(bottom, most),
    timeAxis(bottom, duration),
  ].join('\n');
}

export const chartHeight: number = HEIGHT;
