/** The page of a report: one file, nothing is loaded, no script runs. */

import { drawingsOf } from './drawings.js';
import type { Figures } from './model.js';
import { drawing, escape } from './svg.js';
import { bytes, milliseconds } from './units.js';

/** What the report says in words and numbers. */
export function rowsOf(figures: Figures): [name: string, value: string][] {
  const { latency, late, missed, faults, dropped, imageSize, brought, writes, duration } = figures;
  const rows: [string, string][] = [
    ['faults', `${faults}`],
    ['of these writes', `${writes}`],
    ...workingSetOf(figures),
    ['image', bytes(imageSize)],
    ['brought by faults, each time counted', bytes(brought)],
    ['time to the last fault', milliseconds(duration)],
    ['latency p50', milliseconds(latency.p50)],
    ['latency p90', milliseconds(latency.p90)],
    ['latency p99', milliseconds(latency.p99)],
    ['latency max', milliseconds(latency.max)],
  ];
  if (late !== undefined) rows.push(['late (replayed, but wanted before)', `${late}`]);
  if (missed !== undefined) rows.push(['missed (not in what was replayed)', `${missed}`]);
  if (dropped > 0) rows.push(['not recorded', `${dropped}`]);
  return rows;
}

/** Named for what it is: what a replay brought is no fault, and a recording does not have it. */
function workingSetOf({
  workingSet,
  faulted,
  replayed,
  imageSize,
}: Figures): [name: string, value: string][] {
  const share = imageSize === 0 ? 0 : (100 * workingSet) / imageSize;
  const size = `${bytes(workingSet)} (${share.toFixed(1)} %)`;
  if (replayed === undefined) return [['working set (pages that faults brought)', size]];
  return [
    ['working set, all that was replayed included', size],
    ['replayed', bytes(replayed)],
    ['pages that faults brought', bytes(faulted)],
  ];
}

const STYLE = `
:root { color-scheme: light dark; --ink: #212529; --paper: #fff; --dim: #5c636a; --heat: #d9480f; --bar: #1971c2; --line: #dee2e6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e9ecef; --paper: #16191d; --dim: #adb5bd; --heat: #ff922b; --bar: #4dabf7; --line: #343a40; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 1.5rem 0 .5rem; }
p { margin: 0; color: var(--dim); overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .75rem; margin: 1rem 0 0; }
dl div { border-top: 2px solid var(--line); padding-top: .25rem; }
dt { color: var(--dim); font-size: .85rem; } dd { margin: 0; font-weight: 600; }
svg { width: 100%; height: auto; display: block; }
@media (max-width: 30rem) { svg text { font-size: 30px !important; } dl { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
`;

/** Draws it. */
export function htmlReport(figures: Figures, title: string): string {
  const facts = rowsOf(figures)
    .map(([name, value]) => `<div><dt>${escape(name)}</dt><dd>${escape(value)}</dd></div>`)
    .join('\n');
  const drawings = drawingsOf(figures)
    .map(({ name, about, content, height }) => `<h2>${name}</h2>\n${drawing(content, height, about)}`)
    .join('\n');
  // Readable by programs; `<` cannot end the element.
  const data = JSON.stringify(figures).replaceAll('<', '\\u003c');
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>${escape(title)}: page faults</title>
<style>${STYLE}</style>
</head>
<body>
<h1>Page faults</h1>
<p>${escape(title)}, recorded ${escape(figures.startedAt)}; image ${escape(figures.identity.slice(0, 16))}; the recording is ${escape(figures.end)}</p>
<dl>
${facts}
</dl>
${drawings}
<script type="application/json" id="figures">${data}</script>
</body>
</html>
`;
}
