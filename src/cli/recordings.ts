/** `userfaultfd trace …` and `userfaultfd report`: what is in recordings of working sets. */

import { constants } from 'node:os';
import { basename } from 'node:path';
import process from 'node:process';

import colors from 'picocolors';

import { UffdError } from '../errors.js';
import { Trace } from '../trace.js';
import { htmlReport, rowsOf } from './report/html.js';
import { figuresOf } from './report/model.js';
import { kindOf, writeWhole } from './report/output.js';
import { svgReport } from './report/picture.js';
import { bytes, faultCount, milliseconds } from './report/units.js';

/** What to do about a recording that is not there: it is missed most by who looks before the session has ended. */
const NOT_THERE =
  'A recording has its name when its session has ended, or has stopped recording. Is the path right?';

/** Reads a recording that was named on the command line. */
async function read(file: string): Promise<Trace> {
  try {
    return await Trace.read(file);
  } catch (error) {
    if (!(error instanceof UffdError) || error.errno !== constants.errno.ENOENT) throw error;
    const { code, message, errno, syscall = 'open' } = error;
    throw new UffdError(code, message, { errno, syscall, hint: NOT_THERE });
  }
}

/** A recording, and what it is called. */
type Named = readonly [file: string, trace: Trace];

/** Places in one image are nothing in another. */
function requireSameImage([file, one]: Named, [otherFile, other]: Named): void {
  const isSame = one.identity === other.identity && one.imageSize === other.imageSize;
  if (isSame && one.pageSize === other.pageSize) return;
  const what = ({ identity, imageSize, pageSize }: Trace): string =>
    isSame ? `pages of ${bytes(pageSize)}` : `${identity.slice(0, 16)}, ${bytes(imageSize)}`;
  throw new UffdError(
    'ERR_UFFD_TRACE_IMAGE',
    `${otherFile} is of another ${isSame ? 'page size' : 'image'} (${what(other)}) than ${file} (${what(one)})`,
    { hint: '`userfaultfd trace show` says which image a recording is of.' },
  );
}

/**
 * Puts recordings of one image together: what any of them wanted, or what all of them did. `output` may be one of them: all
 * are read before, and it is written whole or not at all.
 */
export async function combine(how: 'merge' | 'intersect', files: string[], output: string): Promise<void> {
  const traces = await Promise.all(files.map(read));
  const named = traces.map((trace, index): Named => [files[index] ?? '', trace]);
  const [first] = named;
  if (first !== undefined) for (const other of named) requireSameImage(first, other);
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

/** Room for what a figure is called. */
const NAME = 42;

/** Says what is in a recording. */
export async function show(file: string, { json = false, faults = false }: ShowOptions): Promise<void> {
  const trace = await read(file);
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
    process.stdout.write(`${colors.dim(name.padEnd(NAME))}${value}\n`);
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
  const kind = kindOf(output, replayed === undefined ? [file] : [file, replayed]);
  const trace = await read(file);
  const before = replayed === undefined ? undefined : await read(replayed);
  if (replayed !== undefined && before) requireSameImage([file, trace], [replayed, before]);
  const figures = figuresOf(trace, before);
  writeWhole(
    output,
    kind === 'picture' ? svgReport(figures, rowsOf(figures)) : htmlReport(figures, basename(file)),
  );
  const { faulted, workingSet } = figures;
  const more = before ? `; working set with what was replayed: ${bytes(workingSet)}` : '';
  process.stdout.write(`${output}: ${faultCount(figures.faults)} brought ${bytes(faulted)}${more}\n`);
}
