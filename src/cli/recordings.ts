/** `userfaultfd trace …` and `userfaultfd report`: what is in recordings of working sets. */

import { writeFileSync } from 'node:fs';
import { basename } from 'node:path';
import process from 'node:process';

import colors from 'picocolors';

import { Trace } from '../trace.js';
import { htmlReport, rowsOf } from './report/html.js';
import { figuresOf } from './report/model.js';
import { svgReport } from './report/picture.js';
import { bytes, milliseconds } from './report/units.js';

/** Puts recordings of one image together: what any of them wanted, or what all of them did. */
export async function combine(how: 'merge' | 'intersect', files: string[], output: string): Promise<void> {
  const traces = await Promise.all(files.map(async file => Trace.read(file)));
  for (const [index, { end }] of traces.entries()) {
    if (end === 'torn') process.stderr.write(`${files[index]}: torn; what could be read of it is used\n`);
  }
  const combined = await (how === 'merge' ? Trace.merge(traces) : Trace.intersect(traces));
  await combined.write(output);
  const size = combined.ranges().reduce((sum, { length }) => sum + length, 0);
  process.stdout.write(
    `${output}: ${bytes(size)} of ${bytes(combined.imageSize)}, of ${files.length} recordings\n`,
  );
}

/** Options of the command line. */
export interface ShowOptions {
  json?: boolean;
  faults?: boolean;
}

/** Says what is in a recording. */
export async function show(file: string, { json = false, faults = false }: ShowOptions): Promise<void> {
  const trace = await Trace.read(file);
  const figures = figuresOf(trace);
  if (json) {
    const { heat: _heat, growth: _growth, ...told } = figures;
    process.stdout.write(`${JSON.stringify({ ...told, ...(faults ? { list: [...trace] } : {}) })}\n`);
    return;
  }
  const rows = [
    ['recorded', figures.startedAt],
    ['the recording is', figures.end],
    ['image is known by', figures.identity],
  ];
  for (const [name = '', value = ''] of [...rows, ...rowsOf(figures)]) {
    process.stdout.write(`${colors.dim(name.padEnd(26))}${value}\n`);
  }
  if (!faults) return;
  process.stdout.write(
    `\n${'time'.padStart(10)}  ${'place'.padStart(14)}  ${'brought'.padStart(9)}  ${'latency'.padStart(9)}\n`,
  );
  for (const { time, offset, brought, latency, kind, write } of trace) {
    const words = [
      milliseconds(time).padStart(10),
      `0x${offset.toString(16)}`.padStart(14),
      bytes(brought.length).padStart(9),
      milliseconds(latency).padStart(9),
      write ? `${kind}, write` : kind,
    ];
    process.stdout.write(`${words.join('  ')}\n`);
  }
}

/** Options of the command line. */
export interface ReportOptions {
  output: string;
  replayed?: string;
}

/** Draws a recording, as a page or as a picture. */
export async function report(file: string, { output, replayed }: ReportOptions): Promise<void> {
  const trace = await Trace.read(file);
  const figures = figuresOf(trace, replayed === undefined ? undefined : await Trace.read(replayed));
  writeFileSync(
    output,
    output.endsWith('.svg') ? svgReport(figures, rowsOf(figures)) : htmlReport(figures, basename(file)),
  );
  process.stdout.write(`${output}: ${figures.faults} faults, working set ${bytes(figures.workingSet)}\n`);
}
