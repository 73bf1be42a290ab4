/** Memory of another process that is handed over without Firecracker's protocol: `userfaultfd-peer` sends its userfaultfd. */

import { once } from 'node:events';
import { closeSync } from 'node:fs';
import { createServer, type Server, type Socket } from 'node:net';
import { join } from 'node:path';

import type { ExecutionContext } from 'ava';
import { type AdoptRegion, pidfdOf, receiveFds, Userfaultfd } from 'userfaultfd';

import { Peer } from '../../examples/support/peer.js';
import { folder } from './serving.js';

/** A process that obeys commands, and what it has handed over. */
export interface Handed {
  peer: Peer;
  uffd: Userfaultfd;
  /** Of `--fd memfd`. */
  memfd: number | undefined;
  pidfd: number;
  regions: AdoptRegion[];
}

/** The descriptor of a socket, or of a server's. */
export const fdOf = (socket: Server | Socket): number =>
  // oxlint-disable-next-line no-underscore-dangle -- Node has no public name for it
  (socket as unknown as { _handle: { fd: number } })._handle.fd;

/** Starts a peer with these words for arguments. With `--fd memfd`, its regions say where they are in that. */
export async function handedOver(t: ExecutionContext, args: string): Promise<Handed> {
  const handed = await handOver(args, folder(t));
  const { peer, uffd, pidfd, memfd } = handed;
  t.teardown(async () => {
    peer.kill();
    await peer.ended;
  });
  t.teardown(() => [pidfd, memfd].forEach(fd => fd !== undefined && closeSync(fd)));
  return { ...handed, uffd: Userfaultfd.adopt(uffd) };
}

/** The same without a test, in a folder of the caller's: what it leaves is the caller's to end. */
export async function handOver(
  args: string,
  inFolder: string,
): Promise<Omit<Handed, 'uffd'> & { uffd: number }> {
  const path = join(inFolder, 'socket');
  const server = createServer({ pauseOnConnect: true }).listen(path);
  await once(server, 'listening');
  const connected = once(server, 'connection');
  // One byte is all that is sent beside the descriptors: what the regions are says its first line.
  const peer = new Peer(['--socket', path, '--json', '-', ...args.split(' ')]);
  const { regions: mapped } = await peer.ready();
  const [socket] = (await connected) as [Socket];
  const { fds } = await receiveFds(fdOf(socket), { maxFds: 2 });
  const [uffd, memfd] = fds as [number, number?];
  const pidfd = pidfdOf(fdOf(socket));
  socket.destroy();
  server.close();
  let memfdOffset = 0;
  const regions = mapped.map(({ base, size, offset }): AdoptRegion => {
    const region = { address: BigInt(base), length: size, sourceOffset: offset };
    const before = memfdOffset;
    memfdOffset += size;
    return memfd === undefined ? region : { ...region, memfdOffset: before };
  });
  return { peer, uffd, memfd, pidfd, regions };
}
