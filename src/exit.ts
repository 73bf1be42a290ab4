import process from 'node:process';

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
  alive.delete(one);
  if (alive.size === 0) process.off('exit', abandonAll);
}
