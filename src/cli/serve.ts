/** `userfaultfd serve`: the Firecracker pager without a program around it. */

import { once } from 'node:events';
import process from 'node:process';

import { type FirecrackerServer, serveFirecracker } from '../firecracker.js';
import type { FirecrackerServerOptions } from '../firecracker-options.js';
import { UffdError } from '../errors.js';
import { PagerClient } from '../pager-client.js';
import type { FailurePolicy } from '../policy.js';
import { explain } from './explain.js';
import { JsonLog, type Log, TerminalLog } from './serve-log.js';

/** Options of the command line. */
export interface ServeOptions {
  socket: string;
  memory: string;
  onFailure: FailurePolicy;
  holdTimeout?: string;
  uid?: string;
  record?: string;
  replay?: string;
  pager?: string;
}

/** Milliseconds between two lines of progress. */
const INTERVAL = 1_000;

/**
 * Serves until a signal comes. Then every session meets the failure policy: what its VM still lacks is poisoned, or the VM is
 * killed. It is never left with zeros, nor waiting. With `hold`, a VM whose memory cannot be served waits, until SIGUSR2 lets all that
 * are held go on; when this is ended, what it lacks is poisoned. A second signal does not wait for the end of that.
 *
 * By a daemon that somebody else has started, only SIGINT ends what is served. SIGTERM and SIGHUP, by which a service is restarted and
 * a terminal closed, end this program and nothing else: started again, it goes on where it was.
 *
 * Gives the exit status.
 */
export async function serve({
  socket,
  memory,
  onFailure,
  holdTimeout,
  uid,
  record,
  replay,
  pager,
}: ServeOptions): Promise<number> {
  const options: FirecrackerServerOptions = { socketPath: socket, memory, onFailure };
  if (record !== undefined) options.record = record;
  if (replay !== undefined) options.replay = replay;
  if (holdTimeout !== undefined) options.holdTimeout = Number(holdTimeout);
  if (uid !== undefined) options.peer = { uid: Number(uid) };
  // Before it listens: from then on somebody may depend on it.
  const asked = signalled();
  const daemon = await daemonOf(pager);
  const server = await startServer(options, daemon);
  const log: Log = process.stdout.isTTY ? new TerminalLog(process.stdout) : new JsonLog(process.stdout);
  log.listening(server.socketPath, memory, daemon);
  follow(server, log);
  const resume = (): void => void goOn(server, log);
  process.on('SIGUSR2', resume);
  const timer = setInterval(() => log.progress(server.sessions), INTERVAL);
  const signal = await Promise.race([asked, once(server, 'close').then(() => undefined)]);
  clearInterval(timer);
  process.off('SIGUSR2', resume);
  if (signal === undefined) throw lost(daemon);
  if (daemon && pager !== SPAWN && signal !== 'SIGINT') {
    log.left(signal, server.sessions.length);
    daemon.disconnect();
    return 0;
  }
  log.ending(signal, server.sessions.length, onFailure);
  await (onFailure === 'kill' ? server.giveUp() : server.close({ rest: 'poison' }));
  await daemon?.close();
  log.ended();
  return 0;
}

/** In the place of a path: a daemon of this command's own. */
const SPAWN = 'spawn';

async function daemonOf(pager: string | undefined): Promise<PagerClient | undefined> {
  if (pager === undefined) return undefined;
  return pager === SPAWN ? PagerClient.spawn() : PagerClient.connect(pager);
}

async function startServer(
  options: FirecrackerServerOptions,
  daemon: PagerClient | undefined,
): Promise<FirecrackerServer> {
  if (daemon === undefined) return serveFirecracker(options);
  try {
    return await serveFirecracker({ ...options, pager: daemon });
  } catch (error) {
    await daemon.close();
    throw error;
  }
}

/** Nobody has asked for the end. */
function lost(daemon: PagerClient | undefined): UffdError {
  const what = daemon ? `the daemon at ${daemon.socketPath} is gone, or has` : 'the pager has';
  return new UffdError('ERR_UFFD_PAGER_LOST', `${what} closed the server`);
}

function follow(server: FirecrackerServer, log: Log): void {
  server.on('session', session => {
    log.started(session);
    void session.closed.then(end => log.finished(session, end));
  });
  server.on('held', (session, hold) => log.held(session, hold));
  server.on('rejected', rejection => log.rejected(rejection));
}

/** Whatever made sessions fail is over, says the one who has sent the signal. */
async function goOn(server: FirecrackerServer, log: Log): Promise<void> {
  await Promise.all(
    server.sessions.map(async session => {
      if (session.held === undefined) return;
      try {
        await session.resume();
        log.resumed(session);
      } catch (error) {
        process.stderr.write(`${explain(error)}\n`);
      }
    }),
  );
}

/** The first of the signals that ask a program to end. Only the first is taken: the next one ends it as it always did. */
async function signalled(): Promise<NodeJS.Signals> {
  const controller = new AbortController();
  const { signal } = controller;
  const first = await Promise.race(
    (['SIGINT', 'SIGTERM', 'SIGHUP'] as const).map(async name => {
      await once(process, name, { signal });
      return name;
    }),
  );
  controller.abort();
  return first;
}
