import { UffdError } from './errors.js';
import { native } from './native.js';
import { errno } from './outcome.js';

/** Reasons of the native side, by errno. */
const WHY_NONE: Record<number, string> = {
  [errno.E2BIG]: 'this runtime has none so large (Node 20: 4 GiB)',
  [errno.ENOSYS]: 'this runtime cannot make one over memory of its own (Node 22.23, 24 and 26 can)',
  [errno.EOPNOTSUPP]: 'this runtime allows no buffers over memory that is not its own',
};

/** @hidden */
export function noBuffer(shared: boolean, why: string, hint?: string): UffdError {
  const kind = shared ? 'SharedArrayBuffer' : 'ArrayBuffer';
  return new UffdError('ERR_UFFD_UNSUPPORTED', `no ${kind} can be made of the mapping: ${why}`, {
    hint: hint ?? 'read() and write() take offsets and have no such limit.',
  });
}

/** @hidden The whole of a mapping, by its handle, as a buffer. */
export function bufferOf(handle: number, shared: boolean): ArrayBuffer | SharedArrayBuffer {
  const buffer = native().memoryBuffer(handle, shared);
  if (typeof buffer === 'number') throw noBuffer(shared, WHY_NONE[-buffer] ?? `errno ${-buffer}`);
  return buffer;
}
