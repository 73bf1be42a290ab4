/** The drawings of a report, as SVG. Colours come from the page (`currentColor` and variables), so that they fit light and dark. */

import type { HeatMap, LatencyBin } from './model.js';
import { bytes, faultCount, milliseconds } from './units.js';

export const WIDTH = 960;
export const LEFT = 150;
/** Below a drawing, for what is written at its axis. */
export const BOTTOM = 46;
/** Above a drawing, for what its axis counts and its colours mean. */
export const LEGEND = 48;
const HEAT_HEIGHT = 440;
/** Room for a label, also where its letters are large. */
const LABEL = 130;
const BAR_HEIGHT = 240;
const SWATCH = 22;

/** Text that may stand in SVG and HTML. */
export function escape(text: string): string {
  return text
    .replaceAll('&', '&amp;')
    .replaceAll('<', '&lt;')
    .replaceAll('>', '&gt;')
    .replaceAll('"', '&quot;');
}

export function label(x: number, y: number, text: string, anchor = 'middle'): string {
  return `<text x="${x}" y="${y}" text-anchor="${anchor}">${escape(text)}</text>`;
}

/** What the axis at the left counts, and how far it goes. */
export function countAxis(bottom: number, most: number): string {
  return [
    label(LEFT - 8, 30, 'faults', 'end'),
    label(LEFT - 8, LEGEND + 14, String(most), 'end'),
    label(LEFT - 8, bottom, '0', 'end'),
  ].join('\n');
}

/** What a colour means; the line of these is above the drawing. */
export function named(x: number, colour: string, text: string, opacity = 1): string {
  return `<rect x="${x}" y="8" width="${SWATCH}" height="${SWATCH}" fill="${colour}" fill-opacity="${opacity.toFixed(2)}"/>${label(x + SWATCH + 8, 30, text, 'start')}`;
}

/** What stands below a drawing whose width is all of the time. */
export function timeAxis(bottom: number, duration: number): string {
  return [
    label(LEFT, bottom + 34, '0', 'start'),
    label((WIDTH + LEFT) / 2, bottom + 34, milliseconds(duration / 2)),
    label(WIDTH, bottom + 34, milliseconds(duration), 'end'),
  ].join('\n');
}

/** The line on which columns stand. */
export function ground(bottom: number): string {
  return `<line x1="${LEFT}" x2="${WIDTH}" y1="${bottom}" y2="${bottom}" stroke="currentColor" stroke-opacity="0.3"/>`;
}

/** A column; `title` says what it is. */
export function column(
  x: number,
  width: number,
  top: number,
  height: number,
  colour: string,
  title: string,
): string {
  const [left, y, w, h] = [x, top, width, height].map(value => value.toFixed(1));
  return `<rect x="${left}" y="${y}" width="${w}" height="${h}" fill="${colour}"><title>${escape(title)}</title></rect>`;
}

export const HEAT = 'var(--heat, #d9480f)';
export const BAR = 'var(--bar, #1971c2)';

/** How strong the colour of so many faults is. By its logarithm: one fault is to be seen beside a thousand. */
const strength = (count: number, most: number): number =>
  0.15 + (0.85 * Math.log1p(count)) / Math.log1p(most);

/** Some counts from one to the most there are, as far from each other as their colours. */
function shades(most: number): number[] {
  if (most === 0) return [];
  const [from, to] = [Math.log1p(1), Math.log1p(most)];
  const steps = [0, 1 / 3, 2 / 3, 1].map(share => Math.round(Math.expm1(from + share * (to - from))));
  return [...new Set(steps)];
}

/** Faults by place in the image (upwards) and time. */
export function heatMap({ columns, rows, cells, most, duration }: HeatMap, imageSize: number): string {
  const bottom = HEAT_HEIGHT - BOTTOM;
  const width = (WIDTH - LEFT) / columns;
  const height = (bottom - LEGEND) / rows;
  const drawn = cells.flatMap((count, at) => {
    if (count === 0) return [];
    const x = LEFT + (at % columns) * width;
    const y = LEGEND + Math.floor(at / columns) * height;
    return [
      `<rect x="${x.toFixed(1)}" y="${y.toFixed(1)}" width="${width.toFixed(2)}" height="${height.toFixed(2)}" fill="${HEAT}" fill-opacity="${strength(count, most).toFixed(2)}"><title>${faultCount(count)}</title></rect>`,
    ];
  });
  return [
    `<rect x="${LEFT}" y="${LEGEND}" width="${WIDTH - LEFT}" height="${bottom - LEGEND}" fill="none" stroke="currentColor" stroke-opacity="0.3"/>`,
    ...drawn,
    label(LEFT - 8, 30, 'faults', 'end'),
    ...shades(most).map((count, at) =>
      named(LEFT + at * ((WIDTH - LEFT) / 4), HEAT, String(count), strength(count, most)),
    ),
    label(LEFT - 8, LEGEND + 30, bytes(imageSize), 'end'),
    label(LEFT - 8, (LEGEND + bottom) / 2, bytes(imageSize / 2), 'end'),
    label(LEFT - 8, bottom, '0', 'end'),
    timeAxis(bottom, duration),
  ].join('\n');
}

/** From where to where it goes. */
const span = ({ from, to }: LatencyBin): string =>
  to === Infinity ? `${milliseconds(from)} or more` : `${milliseconds(from)} to ${milliseconds(to)}`;

/** How many faults took how long. */
export function histogram(latencies: readonly LatencyBin[]): string {
  const bottom = BAR_HEIGHT - BOTTOM;
  const most = Math.max(1, ...latencies.map(({ count }) => count));
  const width = (WIDTH - LEFT) / Math.max(1, latencies.length);
  const every = Math.ceil(latencies.length / 5);
  const tail = latencies.at(-1);
  return [
    ground(bottom),
    ...latencies.map((bin, at) => {
      const { count } = bin;
      // One fault beside a million is to be seen.
      const height = count === 0 ? 0 : Math.max(2, (count / most) * (bottom - LEGEND));
      const title = `${span(bin)}: ${faultCount(count)}`;
      return column(LEFT + at * width + 1, Math.max(1, width - 2), bottom - height, height, BAR, title);
    }),
    // Where columns begin, and where the last one ends.
    ...latencies.flatMap(({ from }, at) =>
      at % every === 0 && (latencies.length - at) * width >= 2 * LABEL
        ? [label(LEFT + at * width, bottom + 34, milliseconds(from), 'start')]
        : [],
    ),
    ...(tail
      ? [
          label(WIDTH, bottom + 34, tail.to === Infinity ? '…' : milliseconds(tail.to), 'end'),
          // In words, too: its column is the lowest, and what it stands for matters most.
          label(WIDTH, 30, `slowest: ${faultCount(tail.count)}, ${span(tail)}`, 'end'),
        ]
      : []),
    countAxis(bottom, most),
  ].join('\n');
}

export const FONT = 'font: 15px system-ui, sans-serif; fill: currentColor;';

/** A drawing for a page: as wide as that. */
export function drawing(content: string, height: number, title: string): string {
  return `<svg viewBox="0 0 ${WIDTH} ${height}" role="img" aria-label="${escape(title)}"><style>text { ${FONT} }</style>\n${content}\n</svg>`;
}

export const heights: { heat: number; bars: number } = { heat: HEAT_HEIGHT, bars: BAR_HEIGHT };
