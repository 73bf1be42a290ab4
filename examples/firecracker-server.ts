/**
 * A Firecracker server for a folder of snapshots: each VM gets the image that was chosen for it, with bytes of its own over
 * it, and what it is told apart by. On SIGTERM no VM is taken any more, those that are there are served to their end.
 *
 *     node out/examples/firecracker-server.js SOCKET FOLDER
 *
 * `FOLDER/PID.mem` is the memory file of the VM that runs as process PID, else `FOLDER/default.mem` is.
 */

import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import process from 'node:process';

import { serveFirecracker, type Session } from 'userfaultfd';

import { whyNoUserfaultfd } from './support/machine.js';

/** Where the identity of a clone lies in its memory; both snapshots were made to have it there. */
const IDENTITY = { offset: 4096, length: 16 };

function say(line: string): void {
  process.stdout.write(`${line}\n`);
}

async function follow(session: Session): Promise<void> {
  const { pid } = session.peer;
  const { reason, error } = await session.closed;
  const { faults, bytesInstalled } = session.stats();
  say(`${pid} has ended (${error?.code ?? reason}): ${faults} faults brought ${bytesInstalled >> 10} KiB`);
}

async function main(socketPath: string, folder: string): Promise<void> {
  await using server = await serveFirecracker({
    socketPath,
    // Asked once for each VM; the VM waits, other VMs do not.
    memory: ({ peer }) => {
      const own = join(folder, `${peer.pid}.mem`);
      const identity = Buffer.alloc(IDENTITY.length);
      identity.write(`clone ${peer.pid}`);
      return {
        memory: existsSync(own) ? own : join(folder, 'default.mem'),
        overlays: [{ offset: IDENTITY.offset, data: identity }],
      };
    },
    onFailure: 'kill',
  });
  server.on('rejected', ({ error, peer }) =>
    say(`${peer?.pid ?? 'somebody'} was turned away: ${error.code}`),
  );
  server.on('session', session => {
    say(`${session.peer.pid} is served`);
    void follow(session);
  });
  say(`listening on ${server.socketPath}`);
  await once(process, 'SIGTERM');
  say(`no more VMs; ${server.sessions.length} to go`);
  await server.drain();
  say('closed');
}

const problem = whyNoUserfaultfd();
const [socketPath, folder] = process.argv.slice(2);
if (problem === undefined && socketPath !== undefined && folder !== undefined) {
  await main(socketPath, folder);
} else {
  process.stdout.write(`${problem ?? 'usage: firecracker-server.js SOCKET FOLDER'}\n`);
  process.exitCode = 1;
}
