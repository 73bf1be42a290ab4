import type { NativeProcess } from '#native';

import { fromNative } from './errors.js';
import { native } from './native.js';
import { validateFd, validateInteger, validateOptions, wrongType } from './validate.js';

/** @hidden */
export function validateSignal(signal: unknown): AbortSignal | undefined {
  if (signal === undefined || signal instanceof AbortSignal) return signal;
  throw wrongType('options.signal', 'an AbortSignal', signal);
}

/**
 * Waits until a process has exited (pidfd_open(2), Linux 5.3): at once where it has already. The process is pinned by the
 * call: its number may be reused without harm from then on.
 *
 * @param process The number of a process that was alive, or not reaped, when its number became known; or a pidfd of it
 *   ({@link pidfdOf}), which stays the caller's.
 * @param options `signal`: ends the waiting with its reason.
 * @throws {@linkcode UffdError} `ERR_UFFD_SYSTEM`; EINVAL where `pidfd` is some other kind of file.
 */
export async function onExit(
  process: number | { readonly pidfd: number },
  options: { signal?: AbortSignal } = {},
): Promise<void> {
  const pinned = pin(process);
  validateOptions('options', options, ['signal']);
  const signal = validateSignal(options.signal);
  signal?.throwIfAborted();
  if (!pinned) return;
  for (;;) {
    const { error, ready } = await pinned.wait();
    if (error) throw fromNative(error);
    signal?.throwIfAborted();
    if (ready) return;
  }
}

/** `undefined` where it is gone already. */
function pin(process: number | { readonly pidfd: number }): NativeProcess | undefined {
  const { NativeProcess: Native } = native();
  const pinned =
    typeof process === 'object' && process !== null
      ? Native.ofPidfd(validateFd('process.pidfd', process.pidfd))
      : Native.open(validateInteger('process', process, 1, 2 ** 31 - 1));
  if (pinned.error?.code === 'ERR_UFFD_CLOSED') return undefined;
  if (pinned.error || !pinned.process) throw fromNative(pinned.error ?? NO_ANSWER);
  return pinned.process;
}

const NO_ANSWER = { code: 'ERR_UFFD_SYSTEM', message: 'the process could not be pinned' };
