import { validateOneOf } from './validate.js';

/**
 * How the memory of a session is brought:
 *
 * - `'windows'`: what is touched, with a window around it.
 * - `'fill'`: everything, at bulk speed, before anybody hears of the session. Faults are answered meanwhile. A session that ends before it is
 *   full is never heard of: who asked for it gets the error.
 */
export type RestoreMode = 'windows' | 'fill';

const MODES = ['windows', 'fill'] as const;

/** @hidden */
export function readMode(name: string, mode: unknown = 'windows'): RestoreMode {
  return validateOneOf(name, mode, MODES);
}
