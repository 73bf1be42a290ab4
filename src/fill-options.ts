import { validateOneOf } from './validate.js';

/**
 * How the memory of a session is brought:
 *
 * - `'windows'`: what is touched, with a window around it.
 * - `'fill'`: everything, at bulk speed, before anybody hears of the session. Faults are answered meanwhile. A session that ends before it is
 *   full is never heard of: who asked for it gets the error.
 * - `'huge-fill'`: the same into transparent huge pages (private memory of ordinary pages, from Linux 6.1 on). Another process is stopped
 *   meanwhile (SIGSTOP, then SIGCONT unless it was stopped before): nobody else may let it go on, and nothing that runs in the kernel
 *   for it (vhost, asynchronous I/O) may touch its memory. It needs the right to trace it, and CAP_SYS_NICE. Where it cannot be, it is
 *   a `'fill'`, and {@link Session.fallback} says why.
 */
export type RestoreMode = 'windows' | 'fill' | 'huge-fill';

const MODES = ['windows', 'fill', 'huge-fill'] as const;

/** @hidden */
export function readMode(name: string, mode: unknown = 'windows'): RestoreMode {
  return validateOneOf(name, mode, MODES);
}
