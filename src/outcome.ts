import { constants } from 'node:os';
import { getSystemErrorName } from 'node:util';

import { UffdError, type UffdErrorCode } from './errors.js';

const { EAGAIN, EBADF, EEXIST, ENODATA, ENOENT, ESRCH, EPERM, EPROTO } = constants.errno;

/** @hidden The error of an operation that gave `-errno` after `done` bytes. */
export function errorOf(syscall: string, errno: number, done: number): UffdError {
  const [code, text] = meaning(errno, done);
  return new UffdError(code, `${syscall}: ${text}${done > 0 ? ` (after ${done} bytes)` : ''}`, {
    errno,
    syscall,
    done,
  });
}

function meaning(errno: number, done: number): [UffdErrorCode, string] {
  switch (errno) {
    case EEXIST:
      return ['ERR_UFFD_PAGE_EXIST', 'a page is already present'];
    case ESRCH:
      return ['ERR_UFFD_CLOSED', 'the process of this userfaultfd is gone'];
    case EAGAIN:
      return done > 0
        ? ['ERR_UFFD_PARTIALLY_COPIED', 'the address space is changing, the rest was not done']
        : ['ERR_UFFD_CHANGING', 'the address space is changing; read the events and try again'];
    case ENOENT:
      return ['ERR_UFFD_NOT_REGISTERED', 'the range is not registered or leaves its mapping'];
    case EBADF:
      return ['ERR_UFFD_USE_AFTER_CLOSE', 'the userfaultfd is closed'];
    case EPERM:
      return ['ERR_UFFD_NOT_PERMITTED', 'not permitted'];
    case ENODATA:
      return ['ERR_UFFD_PROTOCOL', 'the descriptor is at its end, which no userfaultfd has'];
    case EPROTO:
      return ['ERR_UFFD_PROTOCOL', 'what was read is not whole messages'];
    default:
      return ['ERR_UFFD_SYSTEM', getSystemErrorName(-errno)];
  }
}

/** @hidden */
export const errno: typeof constants.errno = constants.errno;
