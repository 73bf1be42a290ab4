import type { NativeRegions, NativeTarget } from '#native';

import { fromNative } from './errors.js';
import { MODES, type RegisterMode } from './names.js';
import { native } from './native.js';
import type { MemoryRange } from './range.js';
import { modeBits, Userfaultfd } from './userfaultfd.js';
import { argumentError, got, validateNames, validateOptions, wrongType } from './validate.js';

/** A userfaultfd and ranges of the memory of its process. */
export interface RegionsTarget {
  /** With which they are registered. */
  uffd: Userfaultfd;
  /** Of one process: the one whose memory the userfaultfd is about. */
  ranges: readonly MemoryRange[];
}

/**
 * Registers many ranges with many userfaultfds (`UFFDIO_REGISTER`). Those whose process is gone are passed over.
 *
 * @returns The userfaultfds whose process is gone.
 * @throws {@linkcode UffdError} when a range is refused; what this call registered before is unregistered again.
 */
export function registerRegions(
  targets: readonly RegionsTarget[],
  options: { modes: readonly RegisterMode[] },
): Userfaultfd[] {
  validateOptions('options', options, ['modes']);
  const modes = modeBits(validateNames('options.modes', options.modes, MODES));
  const checked = check(targets);
  const dead = finish(targets, native().uffdRegisterRegions(checked, modes));
  for (const { uffd, ranges } of targets) ranges.forEach(range => uffd.noteRegistered(range));
  return dead;
}

/**
 * Unregisters many ranges of many userfaultfds (`UFFDIO_UNREGISTER`), and wakes who waits for them: what is missing reads
 * zero from then on. Those whose process is gone are passed over.
 *
 * @returns The userfaultfds whose process is gone.
 * @throws {@linkcode UffdError} when ranges were refused; all others are unregistered nevertheless.
 */
export function unregisterRegions(targets: readonly RegionsTarget[]): Userfaultfd[] {
  return finish(targets, native().uffdUnregisterRegions(check(targets)));
}

function check(targets: readonly RegionsTarget[]): NativeTarget[] {
  if (!Array.isArray(targets)) {
    throw wrongType('targets', 'an array', targets);
  }
  return targets.map((target: unknown, index) => {
    const name = `targets[${index}]`;
    validateOptions(name, target, ['uffd', 'ranges']);
    const { uffd, ranges } = target as RegionsTarget;
    if (!(uffd instanceof Userfaultfd) || !Array.isArray(ranges)) {
      throw argumentError(
        TypeError,
        'ERR_INVALID_ARG_TYPE',
        `Expected \`${name}\` to have a Userfaultfd as \`uffd\` and an array as \`ranges\`, ${got(target)}`,
      );
    }
    const pairs = ranges.flatMap((range: MemoryRange, at) => {
      const start = uffd.registrableStart(`${name}.ranges[${at}]`, range);
      return [start, range.length];
    });
    return { handle: uffd.handle(), ranges: pairs };
  });
}

function finish(targets: readonly RegionsTarget[], result: NativeRegions): Userfaultfd[] {
  if (result.error) throw fromNative(result.error);
  return result.dead.flatMap(index => targets[index]?.uffd ?? []);
}
