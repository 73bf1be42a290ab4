/** A report as one picture. */

import { drawingsOf } from './drawings.js';
import type { Figures } from './model.js';
import { escape, FONT, WIDTH } from './svg.js';

/** Around the drawings, and from the name of one to the drawing. */
const EDGE = 24;
const NAME = 14;

/** All of a report in one drawing. */
export function svgReport(figures: Figures, rows: readonly (readonly [string, string])[]): string {
  const table = rows.map(([name, value], at) => {
    const x = (at % 3) * (WIDTH / 3);
    const y = 60 + Math.floor(at / 3) * 44;
    return `<text x="${x}" y="${y}" opacity="0.7">${escape(name)}</text><text x="${x}" y="${y + 19}" style="font-weight: 600">${escape(value)}</text>`;
  });
  let y = 70 + Math.ceil(rows.length / 3) * 44;
  const drawings = drawingsOf(figures).map(({ name, content, height }) => {
    const drawn = `<text x="0" y="${y}">${escape(name)}</text>\n<g transform="translate(0 ${y + NAME})">\n${content}\n</g>`;
    y += height + 40;
    return drawn;
  });
  const height = y - 14;
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="-${EDGE} -12 ${WIDTH + 2 * EDGE} ${height}" color="#212529">
<style>text { ${FONT} }</style>
<rect x="-${EDGE}" y="-12" width="${WIDTH + 2 * EDGE}" height="${height}" fill="#fff"/>
<text x="0" y="24" style="font-size: 22px">Page faults</text>
${table.join('\n')}
${drawings.join('\n')}
</svg>
`;
}
