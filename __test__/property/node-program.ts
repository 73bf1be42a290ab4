/**
 * A program that has a daemon serve, and may be killed: obeys lines `ID COMMAND WORDS...` (`helpers/commanded.ts`).
 *
 *     connect PATH                  to a daemon
 *     serve SOCKET FILE POLICY      listens for guests whose memory is a file
 *     ask SOCKET                    listens for guests whose memory is a source of this program
 *     next POLICY                   the policy of the next of those
 *     mode good|slow|failing        how those sources are from now on
 *     has PID PATIENCE              waits for a guest's session
 *     hold PID PATIENCE
 *     resume PID PATIENCE same|js|PATH
 *     upgrade
 *     sessions                      whose there are
 *     ends                          PID:REASON of those that have ended since it was asked last
 *     close                         no more servers
 */

import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';

import {
  callbackSource,
  type FailurePolicy,
  fileSource,
  type FirecrackerServer,
  KiB,
  PagerClient,
  type PageSource,
  serveFirecracker,
  type Session,
} from 'userfaultfd';

import { APART, imageBytes, PAGE, REGION_PAGES } from './image.js';

const bytes = imageBytes();
let connected: PagerClient | undefined;
let servers: FirecrackerServer[] = [];
/** How its sources are. */
const how = { mode: 'good' };
let next: FailurePolicy = 'poison';
let ends: string[] = [];
/** What was made for a process, to be closed with its session. */
const sources = new Map<number, PageSource[]>();
/** Reads that are kept while the source is slow. */
let parked: (() => void)[] = [];

function client(): PagerClient {
  if (connected === undefined) throw new Error('say `connect` first');
  return connected;
}

/** Bytes as this program has them; how it is decides what becomes of them. */
function source(): PageSource {
  const fetch = async (offset: number, length: number): Promise<Uint8Array> => {
    while (how.mode === 'slow') {
      await new Promise<void>(resolve => {
        parked.push(resolve);
      });
    }
    if (how.mode === 'failing') throw new Error('the source fails by command');
    return bytes.subarray(offset, offset + length);
  };
  return callbackSource(fetch, { size: bytes.length, chunk: APART, retries: 0, cacheBytes: 0 });
}

function madeFor(pid: number, made: PageSource): PageSource {
  sources.set(pid, [...(sources.get(pid) ?? []), made]);
  return made;
}

function watch(session: Session): void {
  const { pid } = session.peer;
  void session.closed.then(({ reason }) => {
    ends.push(`${pid}:${reason}`);
    for (const made of sources.get(pid) ?? []) made.close();
    sources.delete(pid);
  });
}

const sessions = (): Session[] => [client(), ...servers].flatMap(({ sessions: all }) => [...all]);

/** Waits for a session as long as it may take to be told. */
async function sessionOf(pid = '', patience = '0'): Promise<Session> {
  const deadline = performance.now() + Number(patience);
  while (true) {
    const found = sessions().find(({ peer }) => peer.pid === Number(pid));
    if (found) return found;
    if (performance.now() > deadline) throw new Error(`ABSENT no session of process ${pid} is known`);
    await sleep(2);
  }
}

const COMMANDS: Record<string, (...words: string[]) => Promise<unknown>> = {
  async connect(path = '') {
    connected = await PagerClient.connect(path);
    connected.sessions.forEach(watch);
    connected.on('session', watch);
  },
  async serve(socketPath = '', memory = '', onFailure = '') {
    const server = await serveFirecracker({
      pager: client(),
      socketPath,
      memory,
      onFailure: onFailure as FailurePolicy,
      window: PAGE,
    });
    server.on('session', watch);
    servers.push(server);
  },
  async ask(socketPath = '') {
    const server = await serveFirecracker({
      pager: client(),
      socketPath,
      memory: ({ peer }) => ({
        memory: madeFor(peer.pid, source()),
        onFailure: next,
        window: REGION_PAGES * 4 * KiB,
      }),
    });
    server.on('session', watch);
    servers.push(server);
  },
  async next(policy) {
    next = policy as FailurePolicy;
  },
  async mode(wanted = '') {
    how.mode = wanted;
    const waiting = parked;
    parked = [];
    for (const go of waiting) go();
  },
  has: sessionOf,
  async hold(pid, patience) {
    await (await sessionOf(pid, patience)).hold();
  },
  async resume(pid, patience, from = 'same') {
    const session = await sessionOf(pid, patience);
    if (from === 'same') await session.resume();
    else {
      const other = from === 'js' ? source() : fileSource(from);
      await session.resume({ source: madeFor(session.peer.pid, other) });
    }
  },
  async upgrade() {
    await client().upgrade();
  },
  async sessions() {
    return sessions()
      .map(({ peer }) => peer.pid)
      .join(' ');
  },
  async ends() {
    const told = ends.join(' ');
    ends = [];
    return told;
  },
  async close() {
    const closing = servers;
    servers = [];
    await Promise.all(closing.map(async server => server.close()));
  },
};

async function obey(line: string): Promise<void> {
  const [id, command = '', ...words] = line.split(' ');
  try {
    const answer = await COMMANDS[command]?.(...words);
    process.stdout.write(`${id} ok ${typeof answer === 'string' ? answer : ''}\n`);
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException;
    process.stdout.write(`${id} error ${code ?? ''} ${message.replaceAll('\n', ' ')}\n`);
  }
}

for await (const line of createInterface({ input: process.stdin })) void obey(line);
// Whoever commanded it is gone: what it has the daemon serve goes on.
process.exit(0);
