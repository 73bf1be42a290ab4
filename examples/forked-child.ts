/**
 * Follows a process into its children: memory that was missing when it forked is filled for each of them apart.
 *
 *     node out/examples/forked-child.js
 */

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { createServer, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import process from 'node:process';
import { createInterface } from 'node:readline';
import { setTimeout } from 'node:timers/promises';

import { type FaultCallbacks, receiveFds, Userfaultfd } from 'userfaultfd';

import { PEER } from './support/peer.js';

const PAGE = 4096;
/** UFFD_FEATURE_EVENT_FORK; needs CAP_SYS_PTRACE. */
const EVENT_FORK = '0x2';

/** Answers the faults of one process with its name, and those of its children with theirs. */
function answers(name: number, ended: (name: number) => void): FaultCallbacks {
  let children = 0;
  return {
    fault: fault => fault.copy(Buffer.alloc(PAGE, name)),
    forked: child => child.createHandler(answers(name * 10 + (children += 1), ended)),
    closed: () => ended(name),
  };
}

async function main(): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), 'userfaultfd-'));
  const server = createServer({ pauseOnConnect: true }).listen(join(folder, 's'));
  await once(server, 'listening');
  const peer = spawn(join(dirname(PEER), 'userfaultfd-faulter'), [join(folder, 's'), EVENT_FORK]);
  const [socket] = (await once(server, 'connection')) as [Socket];
  // oxlint-disable-next-line no-underscore-dangle -- Node has no public name for it
  const { fd } = (socket as unknown as { _handle: { fd: number } })._handle;
  const { fds } = await receiveFds(fd);
  const lines = createInterface({ input: peer.stdout });
  const ask = async (command: string): Promise<number> => {
    peer.stdin.write(`1 ${command}\n`);
    const [line] = (await once(lines, 'line')) as [string];
    return Number(line.split(' ')[2]);
  };

  const gone: number[] = [];
  const handler = Userfaultfd.adopt(fds[0] ?? -1).createHandler(answers(1, name => gone.push(name)));
  const start = await ask('map 3');
  await ask(`register ${start} ${3 * PAGE} 1`);
  process.stdout.write(`the process reads ${await ask(`load ${start}`)} in its first page\n`);
  process.stdout.write(`its first child reads ${await ask(`fork ${start + PAGE}`)} in the second\n`);
  process.stdout.write(`its second child reads ${await ask(`fork ${start + 2 * PAGE}`)} in the third\n`);
  process.stdout.write(`the process itself reads ${await ask(`load ${start + PAGE}`)} there\n`);
  peer.kill();
  const { reason } = await handler.closed;
  while (gone.length < 3) await setTimeout(10);
  process.stdout.write(`handlers ended: ${gone.toSorted((a, b) => a - b).join(' ')} (${reason})\n`);
  socket.destroy();
  server.close();
  rmSync(folder, { recursive: true });
}

await main();
