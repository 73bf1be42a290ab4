import { getSystemErrorName } from 'node:util';

import { UffdError } from '../errors.js';

/** What to do about errors of files and sockets, by their names; where the error itself does not say it. */
const ADVICE: { readonly [name: string]: string | undefined } = {
  EACCES: 'This user may not do that: look at the permissions of the path and of each folder above it.',
  EADDRINUSE: 'Somebody listens there already: name another path.',
  ECONNREFUSED: 'Nobody listens there: has it ended, or not been started?',
  EDQUOT: "This user's share of the disk is used up: make room, or name a path on another disk.",
  EISDIR: 'A folder has that name: name a file in it.',
  ELOOP: 'A symbolic link leads back to itself: name the file it is to lead to.',
  EMFILE: 'This process may open no more files: raise the limit (`ulimit -n`).',
  ENAMETOOLONG: 'Name a shorter path.',
  ENOENT: 'Look at the path: the file, or the folder that it is to be in, does not exist.',
  ENOSPC: 'The disk is full: make room, or name a path on another disk.',
  ENOTDIR: 'Look at the path: something in it that should be a folder is a file.',
  EPERM: 'This user may not do that.',
  EROFS: 'That disk cannot be written to: name a path on another one.',
};

/** An error as a person needs it at a prompt: what it was, and what to do. Anything unexpected with its stack. */
export function explain(error: unknown): string {
  if (!(error instanceof Error && 'code' in error)) {
    return error instanceof Error ? (error.stack ?? error.message) : String(error);
  }
  const code = String(error.code);
  // Node's own of the system begin with it.
  const what = error.message.startsWith(`${code}: `) ? error.message : `${code}: ${error.message}`;
  const advice = (error instanceof UffdError ? error.hint : undefined) ?? ADVICE[nameOf(error)];
  return advice === undefined ? what : `${what}\n${advice}`;
}

/** What the system calls it; empty where it has nothing to do with it. */
function nameOf(error: Error): string {
  const { errno } = error as NodeJS.ErrnoException;
  // Node counts them downwards, the library as the system does.
  return errno === undefined || errno === 0 ? '' : getSystemErrorName(-Math.abs(errno));
}
