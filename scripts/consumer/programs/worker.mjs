import { Worker } from 'node:worker_threads';

const worker = new Worker(new URL('fault.mjs', import.meta.url));
worker.once('error', error => {
  throw error;
});
worker.once('exit', status => {
  process.exitCode = status;
});
