/**
 * The default windows (64 KiB, 256 KiB where faults are dense) and fixed ones of 64 KiB against the same pager limited to one page per fault: the whole of 256 MiB touched in random order, each
 * run in processes of its own, the two interleaved, for each placement this machine allows.
 *
 *     node out/benchmark/windows.js [rounds]
 */

import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { cpus, release, tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

import { KiB, MiB, serveFirecracker } from 'userfaultfd';

import { makeImage, sha256 } from '../examples/support/image.js';
import { allowedCpus } from '../examples/support/machine.js';
import { Peer } from '../examples/support/peer.js';

const SIZE = 256 * MiB;
const IMAGE = fileURLToPath(new URL('../../.cache/image-256MiB.bin', import.meta.url));

interface Placement {
  name: string;
  peer?: number;
  pager?: number;
  goal: number;
}

async function touchMs(
  window: number | undefined,
  { peer: cpu, pager }: Placement,
  expected: string,
): Promise<number> {
  const folder = mkdtempSync(join(tmpdir(), 'userfaultfd-'));
  const socketPath = join(folder, 's');
  const server = await serveFirecracker({
    socketPath,
    memory: IMAGE,
    ...(window === undefined ? {} : { window }),
    ...(pager === undefined ? {} : { cpu: pager }),
  });
  const pinned = cpu === undefined ? [] : ['--cpu', `${cpu}`];
  const peer = new Peer(['--socket', socketPath, '--region', `${SIZE}`, ...pinned]);
  try {
    await peer.ready();
    await server.accept({ timeout: 5000 });
    const touch = await peer.ask('touch', 'order=random', 'seed=11');
    if ((await peer.ask('hash')).sha256 !== expected) throw new Error('the content is wrong');
    return touch.total_ns / 1e6;
  } finally {
    peer.kill();
    await peer.ended;
    await server.close();
    rmSync(folder, { recursive: true, force: true });
  }
}

function median(values: number[]): number {
  return values.toSorted((a, b) => a - b)[values.length >> 1] ?? Number.NaN;
}

function spread(values: number[]): string {
  return `${median(values).toFixed(0)} ms (${Math.min(...values).toFixed(0)} to ${Math.max(...values).toFixed(0)})`;
}

const rounds = Number(process.argv[2] ?? 5);
makeImage(IMAGE, SIZE);
const expected = sha256(IMAGE);
const [first = 0, second] = allowedCpus();
const placements: Placement[] = [
  ...(second === undefined ? [] : [{ name: 'two CPUs, pinned', peer: first, pager: second, goal: 6 }]),
  { name: 'one CPU', peer: first, pager: first, goal: 3.5 },
  { name: 'not pinned', goal: 3.5 },
];
const commit = execFileSync('git', ['rev-parse', '--short', 'HEAD'], { encoding: 'utf8' }).trim();
console.log(
  `${cpus()[0]?.model ?? 'unknown CPU'}, ${cpus().length} CPUs, Linux ${release()}, Node ${process.version}, commit ${commit}`,
);
let reached = true;
for (const placement of placements) {
  const windows: number[] = [];
  const fixed: number[] = [];
  const single: number[] = [];
  // The first of each also brings memory from the host, and is not counted.
  for (let round = 0; round <= rounds; round += 1) {
    const one = await touchMs(4 * KiB, placement, expected);
    const some = await touchMs(64 * KiB, placement, expected);
    const many = await touchMs(undefined, placement, expected);
    if (round > 0) {
      single.push(one);
      fixed.push(some);
      windows.push(many);
    }
  }
  const ratio = median(single) / median(windows);
  reached &&= ratio >= placement.goal;
  console.log(
    `${placement.name}: page by page ${spread(single)}, 64 KiB ${spread(fixed)} = ${(median(single) / median(fixed)).toFixed(1)}x, ` +
      `default ${spread(windows)} = ${ratio.toFixed(1)}x (goal ${placement.goal}x)`,
  );
}
process.exitCode = reached ? 0 : 1;
