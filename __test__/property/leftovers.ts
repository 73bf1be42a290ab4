/** What a daemon and its holder have, and have to give back. */

import { readFileSync } from 'node:fs';

import { ByHand } from '../helpers/by-hand.js';
import { openIn, until } from '../helpers/daemon.js';

/** Milliseconds: nobody waits longer, on a machine that is busy with other things. */
export const PATIENCE = 8000;

/** Who they are, and where they listen. */
export interface Daemon {
  path: string;
  daemon: number;
  holder: number;
}

/** Servers of Nodes that were killed go on, and are closed here; everything else has to be gone. */
export async function nothingIsLeft({ path, daemon, holder }: Daemon): Promise<void> {
  const hand = await ByHand.connect(path);
  for (const { id } of hand.hello['servers'] as { id: number }[]) {
    await hand.ask('firecracker.close', { server: id, rest: 'poison' });
  }
  const deadline = performance.now() + PATIENCE;
  while (true) {
    const { sessions, pending, servers } = (await hand.ask('hello', {
      protocol: 1,
      client: 'by hand',
      sessions: [],
    })) as Record<string, unknown[]>;
    const left = [sessions, pending, servers].map(list => list?.length ?? 0);
    if (left.every(count => count === 0)) break;
    if (performance.now() > deadline)
      throw new Error(`sessions, pending, servers are left: ${left.join(', ')}`);
  }
  hand.close();
  for (const pid of [daemon, holder]) {
    const kept = (): string[] => openIn(pid).filter(file => /\[userfaultfd\]|memfd/.test(file));
    await until(() => kept().length === 0, `process ${pid} has closed ${kept().join(', ')}`);
  }
}

/** What both have open. */
export const openOf = ({ daemon, holder }: Daemon): string[] =>
  [...openIn(daemon), ...openIn(holder)].toSorted();

/** What a process has, in words. */
export function footprintOf(pid: number): string {
  const status = readFileSync(`/proc/${pid}/status`, 'utf8');
  const kib = Number(/^VmRSS:\s+(\d+) kB/m.exec(status)?.[1] ?? 0);
  return `${openIn(pid).length} descriptors and ${(kib / 1024).toFixed(1)} MiB`;
}
