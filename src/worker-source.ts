import { once } from 'node:events';
import { Worker } from 'node:worker_threads';

import { type CallbackSourceOptions, readCallbackOptions } from './callback-source.js';
import { UffdError } from './errors.js';
import { LONGEST_TIMEOUT } from './limits.js';
import { type OpenSource, PageSource } from './sources.js';
import { validateInteger, validateOptions, wrongType } from './validate.js';

/** How a source on a thread of its own is asked. */
export interface WorkerSourceOptions extends CallbackSourceOptions {
  /** Given to the module's `setup` export, if it has one, before anything is asked; cloned. */
  workerData?: unknown;
  /** Milliseconds until the module is loaded. Default: 10,000. */
  startTimeout?: number;
}

/** What the thread says first. @hidden */
export type WorkerSourceMessage = { handle: number } | { error: unknown };

/**
 * {@link callbackSource} on a thread of its own: a module that exports the callback as `fetchPages`. Memory that is served from it
 * may be touched on every other thread: the bytes come although that one waits. The thread starts with the first session,
 * does not keep the process alive, and ends with {@link PageSource.close}.
 *
 * @param url The module, as for `new Worker`: usually `new URL('./source.js', import.meta.url)`.
 * @throws {@linkcode UffdError} `ERR_UFFD_SOURCE`, when it is opened: the module cannot be loaded, or exports no `fetchPages`.
 */
export function workerSource(url: URL, options: WorkerSourceOptions): PageSource {
  if (!(url instanceof URL)) {
    throw wrongType('url', 'a URL', url);
  }
  validateOptions('options', options, [
    'size',
    'chunk',
    'concurrency',
    'cacheBytes',
    'retries',
    'timeout',
    'workerData',
    'startTimeout',
  ]);
  const { workerData, startTimeout = 10_000, ...callback } = options;
  validateInteger('options.startTimeout', startTimeout, 1, LONGEST_TIMEOUT);
  const settings = readCallbackOptions(callback);
  return new PageSource(async () => start(url, { settings, workerData }, startTimeout), false);
}

async function start(url: URL, given: object, timeout: number): Promise<OpenSource> {
  const worker = new Worker(new URL('./worker-source-thread.js', import.meta.url), {
    workerData: { url: url.href, ...given },
  });
  worker.unref();
  const late = AbortSignal.timeout(timeout);
  let failure: unknown;
  try {
    const [message] = (await once(worker, 'message', { signal: late })) as [WorkerSourceMessage];
    if ('error' in message) throw message.error;
    // From now on its end is its sessions' matter: what it has not brought fails natively.
    worker.on('error', error => {
      failure = error;
    });
    return { handle: message.handle, failure: () => failure, close: () => void worker.terminate() };
  } catch (cause) {
    await worker.terminate();
    const why = late.aborted ? `it took longer than ${timeout} ms` : (cause as Error).message;
    throw new UffdError('ERR_UFFD_SOURCE', `the source ${url.href} could not be started: ${why}`, { cause });
  }
}
