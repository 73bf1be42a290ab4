import process from 'node:process';

import { leaveToSignals, keepFromSignals } from './signals.js';

/** Something native that must not be left as it is when the program ends. */
interface Abandonable {
  abandon(): void;
}

const alive = new Set<Abandonable>();

function abandonAll(): void {
  for (const one of alive) one.abandon();
}

/**
 * Has `one` abandoned when the program ends without having closed it. `process.exit()` and uncaught exceptions do not
 * run the environment's cleanup hooks, but they do emit `'exit'`.
 */
export function abandonAtExit(one: Abandonable): void {
  if (alive.size === 0) process.on('exit', abandonAll);
  alive.add(one);
}

/** It has been closed. */
export function forgetAtExit(one: Abandonable): void {
  leaveToSignals(one);
  alive.delete(one);
  if (alive.size === 0) process.off('exit', abandonAll);
}

/** Has it abandoned also when a signal ends the program, or no more: it serves other processes, or not. */
export function servesOthers(one: Abandonable, serves: boolean): void {
  if (serves && alive.has(one)) keepFromSignals(one);
  else leaveToSignals(one);
}
