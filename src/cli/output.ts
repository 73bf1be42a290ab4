/** Where the command line writes to: whoever reads that may go away, or stop to read. */

import process from 'node:process';

import { explain } from './explain.js';

/** Milliseconds that a command which is over waits for a reader who has stopped to read. */
const GRACE = 1_000;

const STREAMS = [process.stdout, process.stderr];

/** Others depend on the command, whoever reads what it says. */
let outlives = false;
/** That nobody has the output any more was told. */
let told = false;

/**
 * Ends the command when nobody takes what it writes: without a word where the reader has gone (EPIPE; `| head` has what it wants), with
 * status 1 and the reason elsewhere (a full disk). Not the ones that {@link outlivingReaders} runs.
 */
export function endWithReaders(): void {
  for (const stream of STREAMS) {
    stream.on('error', (error: NodeJS.ErrnoException) => {
      if (!outlives) {
        if (error.code === 'EPIPE') process.exit();
        if (stream === process.stdout) process.stderr.write(`${explain(error)}\n`);
        process.exit(1);
      }
      if (told || stream === process.stderr) return;
      told = true;
      process.stderr.write(`What this says is lost (${error.message}); it goes on.\n`);
    });
  }
}

/** Runs a command that goes on when nobody reads what it says, and whose end does not wait for them. */
export async function outlivingReaders<T>(run: () => Promise<T>): Promise<T> {
  outlives = true;
  try {
    return await run();
  } finally {
    // What is written waits in this process, which Node would keep for that.
    setTimeout(() => {
      if (STREAMS.some(({ writableLength }) => writableLength > 0)) process.exit();
    }, GRACE).unref();
  }
}
