import { createRequire } from 'node:module';
import process from 'node:process';
import { isMainThread } from 'node:worker_threads';

import type * as addon from '#native';

import { UffdError } from './errors.js';

/**
 * The calls of the inner loop, which the addon exports by hand: numbers in; bytes done out, or `-errno`. Words cross as bytes,
 * because Node-API asks a typed array for each type in turn, and for bytes nearly first. Addresses are whole pages, exact in a double. The low bits of `mode` are options, those from 8 on the logarithm of the page size.
 */
interface Calls {
  uffdCopy(handle: number, dst: number, source: Uint8Array, mode: number): number;
  uffdCopyPart(handle: number, dst: number, source: Uint8Array, from: number, mode: number): number;
  uffdCopyFrom(handle: number, dst: number, source: number, length: number, mode: number): number;
  uffdMove(handle: number, dst: number, source: number, length: number, mode: number): number;
  uffdZero(handle: number, start: number, length: number, mode: number): number;
  uffdZeroHuge(handle: number, start: number, length: number, mode: number): number;
  uffdPoison(handle: number, start: number, length: number, mode: number): number;
  uffdContinue(handle: number, start: number, length: number, mode: number): number;
  uffdWriteProtect(handle: number, start: number, length: number, mode: number): number;
  uffdWake(handle: number, start: number, length: number): number;
  /** Messages of four words, waited for for at most so many milliseconds (100 at most); how many. */
  uffdTakeEvents(handle: number, words: Uint8Array, milliseconds: number): number;
  /** Rows of four doubles; how many. */
  handlerTake(handler: number, rows: Uint8Array): number;
  /** Pairs of offset and length behind a first number, where it stopped; how many. */
  scanWrittenInto(
    handle: number,
    offset: number,
    length: number,
    protect: number,
    into: Float64Array,
  ): number;
  answerCopy(handler: number, id: number, source: Uint8Array, mode: number): number;
  answerCopyFrom(handler: number, id: number, source: number, length: number, mode: number): number;
  answerFault(handler: number, id: number, how: number, mode: number): number;
  deferFault(handler: number, id: number): number;
  /** Behind the rows there is a double for what came of each; how many were answered. */
  answerAllCopy(handler: number, rows: Uint8Array, count: number, source: Uint8Array, mode: number): number;
  answerAll(handler: number, rows: Uint8Array, count: number, how: number, mode: number): number;
}

type Binding = typeof addon & Calls;

let binding: Binding | undefined;

/**
 * The addon, loaded by the first use and not by the import: elsewhere than on Linux the package can be imported.
 *
 * @throws {@linkcode UffdError} `ERR_UFFD_UNSUPPORTED_PLATFORM`
 */
export function native(): Binding {
  return (binding ??= load());
}

function load(): Binding {
  const here = `${process.platform}-${process.arch}`;
  if (process.platform !== 'linux') {
    throw new UffdError(
      'ERR_UFFD_UNSUPPORTED_PLATFORM',
      `userfaultfd exists on Linux only, this is ${here}`,
      {
        hint: 'Import the package anywhere, but use it on Linux.',
      },
    );
  }
  try {
    const loaded = createRequire(import.meta.url)('#native') as Binding;
    // Workers have no word in how the program ends.
    if (isMainThread) process.on('exit', status => loaded.exitInSpiteOfFaults(status));
    // As a prototype it is an object of known properties to the engine, and not a dictionary to look names up in.
    return Object.create(loaded) as Binding;
  } catch (cause) {
    throw new UffdError(
      'ERR_UFFD_UNSUPPORTED_PLATFORM',
      `no binary of userfaultfd can be loaded on ${here}`,
      {
        cause,
        hint:
          'Install with optional dependencies (the binary is one of them), on the machine and with the libc it runs on; ' +
          'from a checkout, run `npm run build`.',
      },
    );
  }
}
