import process from 'node:process';
import { isMainThread } from 'node:worker_threads';

import { native } from './native.js';

/** What serves other processes. */
const serving = new Set<unknown>();

/**
 * From now on something serves other processes: signals that would end the program do so after the memory of these has met its
 * failure policy. Natively, and only where the program has no listeners of its own: those decide.
 */
export function keepFromSignals(one: unknown): void {
  const isFirst = serving.size === 0;
  serving.add(one);
  if (!isFirst) return;
  native().guardSignals(true);
  if (isMainThread) process.on('removeListener', rearm);
}

/** It does not any more. */
export function leaveToSignals(one: unknown): void {
  if (!serving.delete(one) || serving.size > 0) return;
  process.off('removeListener', rearm);
  native().guardSignals(false);
}

/**
 * The last listener of a signal has gone, and Node has left the default behind: its own listener for this came first. Who listens
 * once is removed before being called, and `signal-exit` removes itself before it raises the signal again.
 */
function rearm(event: string | symbol): void {
  if (typeof event === 'string' && event.startsWith('SIG') && process.listenerCount(event) === 0) {
    native().rearmSignals();
  }
}
