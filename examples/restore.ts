/**
 * Restores a 256 MiB memory image lazily into another process, and shows what that is worth.
 *
 * The other process plays Firecracker: it maps its memory, hands it over with a userfaultfd, and touches it in random
 * order. Each touch of a page that is not there stops the thread until the pager has brought the page.
 */

import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

import { KiB, MiB, serveFirecracker, type Session, type SessionStats } from 'userfaultfd';

import { makeImage, sha256 } from './support/image.js';
import { allowedCpus, whyNoUserfaultfd } from './support/machine.js';
import { Peer } from './support/peer.js';

const SIZE = 256 * MiB;
const PAGE = 4 * KiB;
const IMAGE = fileURLToPath(new URL('../../.cache/image-256MiB.bin', import.meta.url));
/** Out of address order, of no even size, as a guest's memory around its gaps is. */
const REGIONS = [
  '--region',
  `${96 * MiB + 5 * PAGE}`,
  '--region',
  `${SIZE - 96 * MiB - 5 * PAGE}`,
  '--reverse',
];
const FEWER_FAULTS = 12;

interface Restore {
  touchMs: number;
  firstMs: number;
  stats: SessionStats;
  residentBefore: number;
  sha256: string;
  removed: { pages: number; nonzero: number };
  different: number;
}

const say = (text = ''): boolean => process.stdout.write(`${text}\n`);

async function main(): Promise<boolean> {
  const problem = whyNoUserfaultfd();
  if (problem !== undefined) {
    say(problem);
    return false;
  }
  makeImage(IMAGE, SIZE);
  const expected = sha256(IMAGE);
  const cpus = allowedCpus();
  const [faulter = 0, pager = faulter] = cpus;
  const placement =
    cpus.length > 1 ? `two CPUs, pinned (process on ${faulter}, pager on ${pager})` : 'one CPU';
  const goal = cpus.length > 1 ? 6 : 3.5;
  say(`image      ${SIZE / MiB} MiB of this machine's programs, SHA-256 ${expected.slice(0, 16)}…`);
  say(`placement  ${placement}`);

  const folder = mkdtempSync(join(tmpdir(), 'userfaultfd-'));
  try {
    const restore = async (label: string, window?: number): Promise<Restore> =>
      restoreOnce({ label, window, socketPath: join(folder, 'vm.sock'), faulter, pager });
    // The first also brings memory from the host; the timed pair comes after.
    const shown = await restore('restoring');
    const readAllMs = readWholeFile();
    const pageByPage = await restore('page by page, to compare', PAGE);
    const windows = await restore('once more, memory warm');

    const runs = [shown, pageByPage, windows];
    const ratio = pageByPage.touchMs / windows.touchMs;
    const fewer = pageByPage.stats.faults / windows.stats.faults;
    const missing = runs.every(run => run.residentBefore === 0);
    const equal = runs.every(run => run.sha256 === expected && run.different === 0);
    const zeros = runs.every(run => run.removed.pages > 0 && run.removed.nonzero === 0);
    const fewEnough = fewer >= FEWER_FAULTS;
    say();
    say(
      `first access      after ${windows.firstMs.toFixed(2)} ms; reading the whole file first takes ${readAllMs.toFixed(0)} ms (page cache)`,
    );
    say(
      `whole image       ${windows.touchMs.toFixed(0)} ms in random order, ${(SIZE / MiB / (windows.touchMs / 1000)).toFixed(0)} MiB/s`,
    );
    say(
      `faults            ${windows.stats.faults}, ${(windows.stats.pagesInstalled / windows.stats.faults).toFixed(1)} pages each`,
    );
    say(`page by page      ${pageByPage.touchMs.toFixed(0)} ms and ${pageByPage.stats.faults} faults`);
    say(
      `64 KiB and more   ${ratio.toFixed(1)}x faster (goal on ${cpus.length > 1 ? 'two CPUs' : 'one CPU'}: ${goal}x, ${ratio >= goal ? 'reached' : 'NOT reached'}), 1/${fewer.toFixed(1)} of the faults`,
    );
    say();
    verdict(
      missing,
      `memory before the first touch: ${shown.residentBefore} of ${SIZE / PAGE} pages resident`,
    );
    verdict(equal, `SHA-256 of what the process read equals that of the image (${runs.length} restores)`);
    verdict(zeros, `${windows.removed.pages} pages given back as a balloon does, all read zero afterwards`);
    verdict(fewEnough, `at most 1/${FEWER_FAULTS} of the faults of page by page`);
    return missing && equal && zeros && fewEnough;
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

function verdict(holds: boolean, text: string): void {
  say(`${holds ? 'ok    ' : 'FAILED'} ${text}`);
}

async function restoreOnce(run: {
  label: string;
  window: number | undefined;
  socketPath: string;
  faulter: number;
  pager: number;
}): Promise<Restore> {
  const server = await serveFirecracker({
    socketPath: run.socketPath,
    memory: IMAGE,
    ...(run.window === undefined ? {} : { window: run.window }),
    cpu: run.pager,
  });
  const peer = new Peer(['--socket', run.socketPath, ...REGIONS, '--cpu', `${run.faulter}`]);
  try {
    const ready = await peer.ready();
    const session = await server.accept({ timeout: 5000 });
    const stop = showProgress(run.label, session);
    const touch = await peer.ask('touch', 'order=random', 'seed=7');
    stop();
    const hash = await peer.ask('hash');
    const stats = session.stats();
    const removed = await peer.ask('discard-random', 'seed=7', 'count=64', 'pages=33');
    const zeros = await peer.ask('zeros');
    const compare = await peer.ask('compare', IMAGE);
    await peer.exit();
    await session.closed;
    return {
      touchMs: touch.total_ns / 1e6,
      firstMs: touch.first_ns / 1e6,
      stats,
      residentBefore: ready.resident,
      sha256: hash.sha256,
      removed: { pages: removed.pages, nonzero: zeros.nonzero },
      different: compare.different,
    };
  } finally {
    peer.kill();
    await server.close();
  }
}

/** One line that is rewritten on a terminal, a new one each half second elsewhere. */
function showProgress(label: string, session: Session): () => void {
  const live = process.stdout.isTTY;
  const started = performance.now();
  const line = (): string => {
    const { bytesInstalled, faults } = session.stats();
    const done = Math.round((100 * bytesInstalled) / SIZE);
    return `${label}: ${done} % (${Math.round(bytesInstalled / MiB)} MiB), ${faults} faults, ${Math.round(performance.now() - started)} ms`;
  };
  const timer = setInterval(
    () => process.stdout.write(live ? `\r\x1b[K${line()}` : `${line()}\n`),
    live ? 50 : 500,
  );
  return () => {
    clearInterval(timer);
    process.stdout.write(live ? `\r\x1b[K${line()}\n` : `${line()}\n`);
  };
}

/** What has to happen before the first access without paging: milliseconds. */
function readWholeFile(): number {
  const started = performance.now();
  readFileSync(IMAGE);
  return performance.now() - started;
}

process.exitCode = (await main()) ? 0 : 1;
