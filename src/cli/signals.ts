/** The signals that ask a program to end. */

import process from 'node:process';

const ENDING = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const;

/**
 * The first of them, as it was sent. Those after it do nothing, for as long as this process is there, and one of them is told: their default action
 * would end it while it deals with those whom it serves, and leave them waiting for ever. Two signals are nothing unusual: a service manager and a
 * terminal send one to a whole group of processes, and `npx`, which is in it, hands on its own.
 */
export async function askedToEnd(): Promise<NodeJS.Signals> {
  return new Promise(resolve => {
    let asked = 0;
    for (const name of ENDING) {
      process.on(name, () => {
        asked += 1;
        if (asked === 1) resolve(name);
        if (asked === 2) process.stderr.write(`${name}: it is ending already, which is not cut short\n`);
      });
    }
  });
}
