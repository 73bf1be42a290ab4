/** The thread of a {@link workerSource}: loads the module and answers for it. */

import { parentPort, workerData } from 'node:worker_threads';

import { type CallbackSettings, type FetchPages, openCallback } from './callback-source.js';
import type { WorkerSourceMessage } from './worker-source.js';

const given = workerData as { url: string; settings: CallbackSettings; workerData: unknown };

async function start(): Promise<WorkerSourceMessage> {
  try {
    const module = (await import(given.url)) as { fetchPages?: unknown; setup?: unknown };
    if (typeof module.fetchPages !== 'function') throw new TypeError('it exports no function `fetchPages`');
    if (typeof module.setup === 'function')
      await (module.setup as (data: unknown) => unknown)(given.workerData);
    return { handle: openCallback(module.fetchPages as FetchPages, given.settings).handle };
  } catch (error) {
    return { error };
  }
}

void start().then(message => parentPort?.postMessage(message));
// Nothing else keeps this thread alive while it waits to be asked.
setInterval(() => {}, 2 ** 31 - 1);
