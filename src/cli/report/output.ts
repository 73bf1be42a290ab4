/** Where a report is written: not over something else, and whole or not at all. */

import { renameSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { basename, dirname, extname, join } from 'node:path';
import process from 'node:process';

import { UffdError } from '../../errors.js';
import { argumentError } from '../../validate.js';

const KINDS = { '.html': 'page', '.svg': 'picture' } as const;
type Kind = (typeof KINDS)[keyof typeof KINDS];

/** What to draw, by the name of the file; refuses a name of anything else, and a file that is about to be read. */
export function kindOf(output: string, inputs: readonly string[]): Kind {
  const ending = extname(output).toLowerCase();
  const kind = Object.entries(KINDS).find(([known]) => known === ending)?.[1];
  if (kind === undefined) {
    throw refused(`Expected \`--output\` to end in .html (a page) or .svg (a picture), got '${output}'`);
  }
  const input = inputs.find(file => isSameFile(file, output));
  if (input !== undefined) {
    throw refused(`Expected \`--output\` to be another file than the recording ${input}, got '${output}'`);
  }
  return kind;
}

function refused(message: string): Error {
  return argumentError(TypeError, 'ERR_INVALID_ARG_VALUE', message);
}

/** By what it is, not by its name: links lead to the same file. */
function isSameFile(one: string, other: string): boolean {
  const [first, second] = [one, other].map(path => statSync(path, { bigint: true, throwIfNoEntry: false }));
  return first !== undefined && first.dev === second?.dev && first.ino === second.ino;
}

/** What was there before stays until all of it is written. */
export function writeWhole(output: string, content: string): void {
  const beside = join(dirname(output), `.${basename(output)}.${process.pid}`);
  try {
    writeFileSync(beside, content, { flag: 'wx' });
    renameSync(beside, output);
  } catch (error) {
    rmSync(beside, { force: true });
    throw notWritten(output, error as NodeJS.ErrnoException);
  }
}

function notWritten(
  output: string,
  { code = '', errno, syscall, message }: NodeJS.ErrnoException,
): UffdError {
  const hint =
    code === 'ENOENT'
      ? `There is no folder ${dirname(output)}: make it, or name another one with --output.`
      : `Name a file with --output that this user may write.`;
  return new UffdError('ERR_UFFD_SYSTEM', `${output} could not be written: ${message.split(',')[0]}`, {
    hint,
    ...(errno === undefined ? {} : { errno: -errno }),
    ...(syscall === undefined ? {} : { syscall }),
  });
}
