/** The drawings of a report, as SVG. Colours come from the page (`currentColor` and variables), so that they fit light and dark. */

import type { HeatMap, LatencyBin } from './model.js';
import { bytes, faultCount, milliseconds } from './units.js';

export const WIDTH = 960;
export const LEFT = 150;
/** Below a drawing, for what is written at its axis. */
export const BOTTOM = 46;
const HEAT_HEIGHT = 400;
/** Room for a label, also where its letters are large. */
const LABEL = 130;
const BAR_HEIGHT = 220;

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

/** Faults by place in the image (upwards) and time. */
export function heatMap({ columns, rows, cells, most, duration }: HeatMap, imageSize: number): string {
  const width = (WIDTH - LEFT) / columns;
  const height = (HEAT_HEIGHT - BOTTOM) / rows;
  const drawn = cells.flatMap((count, at) => {
    if (count === 0) return [];
    const x = LEFT + (at % columns) * width;
    const y = Math.floor(at / columns) * height;
    // By its logarithm: one fault is to be seen beside a thousand.
    const heat = Math.log1p(count) / Math.log1p(most);
    return [
      `<rect x="${x.toFixed(1)}" y="${y.toFixed(1)}" width="${width.toFixed(2)}" height="${height.toFixed(2)}" fill="${HEAT}" fill-opacity="${(0.15 + 0.85 * heat).toFixed(2)}"><title>${faultCount(count)}</title></rect>`,
    ];
  });
  const bottom = HEAT_HEIGHT - BOTTOM;
  return [
    `<rect x="${LEFT}" y="0" width="${WIDTH - LEFT}" height="${bottom}" fill="none" stroke="currentColor" stroke-opacity="0.3"/>`,
    ...drawn,
    label(LEFT - 8, 30, bytes(imageSize), 'end'),
    label(LEFT - 8, bottom / 2, bytes(imageSize / 2), 'end'),
    label(LEFT - 8, bottom, '0', 'end'),
    timeAxis(bottom, duration),
  ].join('\n');
}

/** How many faults took how long. */
export function histogram(latencies: readonly LatencyBin[]): string {
  const bottom = BAR_HEIGHT - BOTTOM;
  const most = Math.max(1, ...latencies.map(({ count }) => count));
  const width = (WIDTH - LEFT) / Math.max(1, latencies.length);
  const every = Math.ceil(latencies.length / 5);
  return [
    ground(bottom),
    ...latencies.map(({ from, to, count }, at) => {
      // One fault beside a million is to be seen.
      const height = count === 0 ? 0 : Math.max(2, (count / most) * (bottom - 16));
      const title = `${milliseconds(from)} to ${to === Infinity ? 'more' : milliseconds(to)}: ${count}`;
      return column(LEFT + at * width + 1, Math.max(1, width - 2), bottom - height, height, BAR, title);
    }),
    ...latencies.flatMap(({ from }, at) =>
      at % every === 0 && (latencies.length - at) * width >= LABEL
        ? [label(LEFT + at * width, bottom + 34, milliseconds(from), 'start')]
        : [],
    ),
    label(LEFT - 8, 30, String(most), 'end'),
    label(LEFT - 8, bottom, '0', 'end'),
  ].join('\n');
}

export const FONT = 'font: 15px system-ui, sans-serif; fill: currentColor;';

/** A drawing for a page: as wide as that. */
export function drawing(content: string, height: number, title: string): string {
  return `<svg viewBox="0 0 ${WIDTH} ${height}" role="img" aria-label="${escape(title)}"><style>text { ${FONT} }</style>\n${content}\n</svg>`;
}

export const heights: { heat: number; bars: number } = { heat: HEAT_HEIGHT, bars: BAR_HEIGHT };
