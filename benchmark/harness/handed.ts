/** A userfaultfd as Firecracker hands it over, without the package's server. */

import { once } from 'node:events';
import { createServer, type Socket } from 'node:net';

import { receiveFds } from 'userfaultfd';

/** A stretch of memory, as it is told. */
export interface HandedRegion {
  base_host_virt_addr: number;
  size: number;
  offset: number;
}

/** What one process has handed over. */
export interface Handed {
  uffd: number;
  /** Where there is one. */
  memfd: number | undefined;
  regions: HandedRegion[];
}

/** One line for the program that drives this one. */
export const say = (event: object): void => void process.stdout.write(`${JSON.stringify(event)}\n`);

/** Listens, says so, and gives what the next process hands over. */
export async function listen(path: string): Promise<() => Promise<Handed>> {
  const server = createServer({ pauseOnConnect: true }).listen(path);
  await once(server, 'listening');
  say({ event: 'listening' });
  return async () => {
    const [socket] = (await once(server, 'connection')) as [Socket];
    // oxlint-disable-next-line no-underscore-dangle -- Node has no public name for it
    const { fd } = (socket as unknown as { _handle: { fd: number } })._handle;
    const { bytes, fds } = await receiveFds(fd, { maxFds: 2 });
    const rest = once(socket, 'data') as Promise<[Buffer]>;
    socket.resume();
    const regions = JSON.parse(`${bytes.toString()}${(await rest)[0].toString()}`) as HandedRegion[];
    return { uffd: fds[0] ?? -1, memfd: fds[1], regions };
  };
}
