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
import { askedToEnd } from './signals.js';

/** Options of the command line. */
export interface ServeOptions {
  socket: string;
  memory: string;
  onFailure: FailurePolicy;
  holdTimeout?: number;
  uid?: number;
  record?: string;
  replay?: string;
  pager?: string;
}

/** Milliseconds between two lines of progress. */
const INTERVAL = 1_000;

/**
 * Serves until a signal comes. Then every session meets the failure policy: what its VM still lacks is poisoned, or the VM is
 * killed. It is never left with zeros, nor waiting. With `hold`, a VM whose memory cannot be served waits, until SIGUSR2 lets all that
 * are held go on; when this is ended, what it lacks is poisoned. Further signals change nothing about that ({@link askedToEnd}).
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
  if (holdTimeout !== undefined) options.holdTimeout = holdTimeout;
  if (uid !== undefined) options.peer = { uid };
  // Before it listens: from then on somebody may depend on it. What SIGUSR2 does by default is to end it.
  const asked = askedToEnd();
  let resume = (): void => {};
  process.on('SIGUSR2', () => resume());
  const isOthers = pager !== undefined && pager !== SPAWN;
  const starting = startServer(options, pager);
  const first = await (isOthers ? Promise.race([starting, asked]) : starting);
  if (typeof first === 'string') {
    // Nobody depends on this program: what the daemon has begun for it goes on, and is found by who is started next.
    process.stderr.write(`${first}: the daemon at ${pager} has not answered\n`);
    process.exit(1);
  }
  const { server, daemon } = first;
  const log: Log = process.stdout.isTTY ? new TerminalLog(process.stdout) : new JsonLog(process.stdout);
  log.listening(server.socketPath, memory, daemon);
  const unwritten = follow(server, log);
  resume = () => void goOn(server, log);
  const timer = setInterval(() => log.progress(server.sessions), INTERVAL);
  const signal = await Promise.race([asked, once(server, 'close').then(() => undefined)]);
  clearInterval(timer);
  resume = () => {};
  if (signal === undefined) throw lost(daemon);
  if (daemon && isOthers && signal !== 'SIGINT') {
    log.left(signal, server.sessions.length);
    daemon.disconnect();
    return statusOf(unwritten());
  }
  const applied = onFailure === 'kill' ? 'kill' : 'poison';
  log.ending(signal, server.sessions.length, applied);
  await (applied === 'kill' ? server.giveUp() : server.close({ rest: applied }));
  await daemon?.close();
  log.ended();
  return statusOf(unwritten());
}

/** Why each of them was not written has been told as its session ended. */
function statusOf(unwritten: number): number {
  if (unwritten === 0) return 0;
  process.stderr.write(`recordings that could not be written: ${unwritten}\n`);
  return 1;
}

/** In the place of a path: a daemon of this command's own. */
const SPAWN = 'spawn';

async function daemonOf(pager: string | undefined): Promise<PagerClient | undefined> {
  if (pager === undefined) return undefined;
  return pager === SPAWN ? PagerClient.spawn() : PagerClient.connect(pager);
}

interface Started {
  server: FirecrackerServer;
  daemon: PagerClient | undefined;
}

async function startServer(options: FirecrackerServerOptions, pager: string | undefined): Promise<Started> {
  const daemon = await daemonOf(pager);
  if (daemon === undefined) return { server: await serveFirecracker(options), daemon };
  try {
    return { server: await serveFirecracker({ ...options, pager: daemon }), daemon };
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

/** Tells what happens. Gives how many recordings could not be written so far. */
function follow(server: FirecrackerServer, log: Log): () => number {
  let unwritten = 0;
  server.on('session', session => {
    log.started(session);
    void session.closed.then(end => {
      if (session.stats().recording?.state === 'failed') unwritten += 1;
      log.finished(session, end);
    });
  });
  server.on('held', (session, hold) => log.held(session, hold));
  server.on('rejected', rejection => log.rejected(rejection));
  return () => unwritten;
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
