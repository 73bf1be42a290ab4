import { fromNative, UffdError } from './errors.js';
import { native } from './native.js';
import { argumentError, got, validateInteger, validateOptions } from './validate.js';

/** @hidden */
export function validateSignal(signal: unknown): AbortSignal | undefined {
  if (signal === undefined || signal instanceof AbortSignal) return signal;
  throw argumentError(
    TypeError,
    'ERR_INVALID_ARG_TYPE',
    `Expected \`options.signal\` to be an AbortSignal, ${got(signal)}`,
  );
}

/**
 * Waits until a process has exited (pidfd_open(2), Linux 5.3): at once where it has already. The process is pinned by the
 * call: its number may be reused without harm from then on.
 *
 * @param pid Of a process that was alive, or not reaped, when its number became known.
 * @param options `signal`: ends the waiting with its reason.
 * @throws {@linkcode UffdError} `ERR_UFFD_SYSTEM`
 */
export async function onExit(pid: number, options: { signal?: AbortSignal } = {}): Promise<void> {
  validateInteger('pid', pid, 1, 2 ** 31 - 1);
  validateOptions('options', options, ['signal']);
  const signal = validateSignal(options.signal);
  signal?.throwIfAborted();
  const pinned = open(pid);
  if (!pinned) return;
  for (;;) {
    const { error, ready } = await pinned.wait();
    if (error) throw fromNative(error);
    signal?.throwIfAborted();
    if (ready) return;
  }
}

function open(pid: number): ReturnType<ReturnType<typeof native>['NativeProcess']['open']> {
  try {
    return native().NativeProcess.open(pid);
  } catch (cause) {
    if (cause instanceof UffdError) throw cause;
    throw new UffdError('ERR_UFFD_SYSTEM', `pidfd_open: ${String(cause)}`, { syscall: 'pidfd_open', cause });
  }
}
