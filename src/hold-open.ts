import { LONGEST_TIMEOUT } from './limits.js';

/** @hidden Keeps the program alive until a promise is settled: what the native side tells does not by itself. */
export async function holdOpen<T>(promise: Promise<T>): Promise<T> {
  const hold = setInterval(() => {}, LONGEST_TIMEOUT);
  try {
    return await promise;
  } finally {
    clearInterval(hold);
  }
}
