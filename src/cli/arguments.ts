/** Values of options: refused, with the option's name and status 2, where they are none. */

import { InvalidArgumentError } from 'commander';

/** Reads a whole number between two bounds, both included. In digits alone: nobody means 0 by `''`, and what is `1e3` or `010`? */
export function integer(least: number, most: number): (text: string) => number {
  return text => {
    const value = /^(?:0|[1-9]\d*)$/.test(text) ? Number(text) : Number.NaN;
    if (value >= least && value <= most) return value;
    throw new InvalidArgumentError(`Expected an integer from ${least} to ${most}.`);
  };
}

/** Reads a path, which may be of anything. */
export function path(text: string): string {
  if (text !== '') return text;
  throw new InvalidArgumentError('Expected a path.');
}
