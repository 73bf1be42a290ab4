import { argumentError, validateOneOf } from './validate.js';

/**
 * How the memory of a session is brought:
 *
 * - `'windows'`: what is touched, with a window around it.
 * - `'replay'`: what an earlier run wanted (`replay`), while no fault waits; apart from that as `'windows'`.
 * - `'fill'`: everything, at bulk speed, before anybody hears of the session. Faults are answered meanwhile. A session that ends before it is
 *   full is never heard of: who asked for it gets the error.
 * - `'huge-fill'`: the same into transparent huge pages (private memory of ordinary pages, from Linux 6.1 on). Another process is stopped
 *   meanwhile (SIGSTOP, then SIGCONT unless it was stopped before): nobody else may let it go on, and nothing that runs in the kernel
 *   for it (vhost, asynchronous I/O) may touch its memory. It needs the right to trace it, and CAP_SYS_NICE. Where it cannot be, it is
 *   a `'fill'`, and {@link Session.fallback} says why.
 */
export type RestoreMode = 'windows' | 'replay' | 'fill' | 'huge-fill';

const MODES = ['windows', 'replay', 'fill', 'huge-fill'] as const;

/** @hidden `replays`: whether there is something to replay, which says it all. */
export function readMode(name: string, mode: unknown, replays: boolean): RestoreMode {
  if (mode === undefined) return replays ? 'replay' : 'windows';
  const read = validateOneOf(name, mode, MODES);
  if ((read === 'replay') === replays) return read;
  throw argumentError(
    TypeError,
    'ERR_INVALID_ARG_VALUE',
    replays
      ? `Expected \`${name}\` to be 'replay' where a recording is given as \`replay\`, got '${read}'`
      : `Expected a recording as \`replay\` beside \`${name}\` of 'replay'`,
  );
}
