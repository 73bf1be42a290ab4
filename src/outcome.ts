import { constants } from 'node:os';
import { getSystemErrorName } from 'node:util';

import { UffdError, type UffdErrorCode } from './errors.js';

const { EAGAIN, EBADF, EBUSY, EEXIST, ENODATA, ENOENT, ESRCH, ESTALE, EPERM, EPROTO } = constants.errno;

/** @hidden The error of an operation that gave `-errno` after `done` bytes. */
export function errorOf(syscall: string, errno: number, done: number): UffdError {
  const [code, text] = meaning(syscall, errno, done);
  return new UffdError(code, `${syscall}: ${text}${done > 0 ? ` (after ${done} bytes)` : ''}`, {
    errno,
    syscall,
    done,
  });
}

function meaning(syscall: string, errno: number, done: number): [UffdErrorCode, string] {
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
    case ESTALE:
      return [
        'ERR_UFFD_STALE',
        'the fault cannot be answered any more: it was, or its memory went, or its time is up',
      ];
    case EPERM:
      return ['ERR_UFFD_NOT_PERMITTED', 'not permitted'];
    case EBUSY:
      // Of reading; operations on pages have it for memory that is in use otherwise.
      if (syscall !== 'read') break;
      return ['ERR_UFFD_IN_USE', 'a fault handler has the messages of this userfaultfd'];
    case ENODATA:
      return ['ERR_UFFD_PROTOCOL', 'the descriptor is at its end, which no userfaultfd has'];
    case EPROTO:
      return ['ERR_UFFD_PROTOCOL', 'what was read is not whole messages'];
    default:
      break;
  }
  return ['ERR_UFFD_SYSTEM', getSystemErrorName(-errno)];
}

/** @hidden */
export const errno: typeof constants.errno = constants.errno;
