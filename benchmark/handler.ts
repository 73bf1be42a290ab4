/**
 * What a fault costs that JavaScript answers, against the same loop in C: faults a second, and the median and 99th percentile of
 * one. The faults are those of another process, one page each, of one thread and of eight; everything pinned, on two CPUs and on
 * one. Each measurement has processes of its own, interleaved. `unguarded` is `main` with the guard's thread stopped (ptrace(2)).
 *
 *     node out/benchmark/handler.js [rounds] [kind,…]
 */

import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { createServer, type Socket } from 'node:net';
import { cpus, release, tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import process from 'node:process';
import { createInterface } from 'node:readline';
import { setImmediate, setTimeout } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { isMainThread, Worker, workerData } from 'node:worker_threads';

import { EventBatch, type FaultHandlerOptions, receiveFds, Userfaultfd } from 'userfaultfd';

import { PEER } from '../examples/support/peer.js';

const PAGE = 4096;
const PAGES = 4096;
const PASSES = 5;
/** Passes in front of them, in which the engine compiles what is called often; of the floor's, too. */
const WARMING = 4;
const KINDS = ['main', 'unguarded', 'batch', 'worker', 'fallback', 'promise', 'defer'] as const;
type Kind = (typeof KINDS)[number];
/** Shares of C's faults a second, for one thread and for eight. */
const GOALS: { readonly [kind in Kind]?: readonly [number, number?] } = {
  main: [0.85],
  batch: [0.85, 0.75],
  worker: [0.9, 0.8],
  fallback: [0.6],
};
const page = Buffer.alloc(PAGE, 1);
const here = fileURLToPath(import.meta.url);

/** Serves one peer, in this process. */
async function serve(kind: Kind, path: string): Promise<void> {
  const server = createServer({ pauseOnConnect: true }).listen(path);
  await once(server, 'listening');
  process.stdout.write('listening\n');
  const [socket] = (await once(server, 'connection')) as [Socket];
  // oxlint-disable-next-line no-underscore-dangle -- Node has no public name for it
  const { fd } = (socket as unknown as { _handle: { fd: number } })._handle;
  const { fds } = await receiveFds(fd);
  if (kind === 'worker') {
    void new Worker(here, { workerData: fds[0] });
    return;
  }
  const options: FaultHandlerOptions = kind === 'fallback' ? { notifyBy: 'thread' } : {};
  const uffd = Userfaultfd.adopt(fds[0] ?? -1);
  const deferred = new Set<bigint>();
  uffd.createHandler(
    {
      batch: { faults: (batch: { copy(bytes: Buffer): number }) => void batch.copy(page) },
      promise: { fault: async (fault: { copy(bytes: Buffer): boolean }) => fault.copy(page) },
      defer: {
        fault: (fault: { address: bigint; defer(): void; copy(bytes: Buffer): boolean }) => {
          if (deferred.delete(fault.address)) return fault.copy(page);
          deferred.add(fault.address);
          return fault.defer();
        },
      },
      main: { fault: (fault: { copy(bytes: Buffer): boolean }) => fault.copy(page) },
      unguarded: { fault: (fault: { copy(bytes: Buffer): boolean }) => fault.copy(page) },
      fallback: { fault: (fault: { copy(bytes: Buffer): boolean }) => fault.copy(page) },
    }[kind],
    options,
  );
}

/** In a worker that does nothing else. */
function loop(fd: number): void {
  const uffd = Userfaultfd.adopt(fd);
  const events = new EventBatch(64);
  const step = (): number => uffd.waitSync(events, { timeout: 100 });
  for (let count = step(); count >= 0; count = step()) {
    for (let index = 0; index < count; index += 1) uffd.tryCopy(events.page(index), page);
  }
}

interface Figures {
  rate: number;
  median: number;
  late: number;
}

const pinned = (cpu: number, command: string, ...args: string[]): ChildProcess =>
  spawn('taskset', ['-c', `${cpu}`, command, ...args], { stdio: ['pipe', 'pipe', 'inherit'] });

async function line(child: ChildProcess): Promise<string> {
  if (!child.stdout) throw new Error('a pipe is missing');
  const lines = createInterface({ input: child.stdout });
  const [text] = (await once(lines, 'line')) as [string];
  lines.close();
  return text;
}

const built = (name: string): string => {
  const cache = fileURLToPath(new URL('../../.cache', import.meta.url));
  mkdirSync(cache, { recursive: true });
  const source = fileURLToPath(new URL(`../../benchmark/floor/${name}.c`, import.meta.url));
  execFileSync('cc', ['-O2', '-o', join(cache, name), source]);
  return join(cache, name);
};

/** The thread of a process by its name, once it is there. */
async function threadOf(pid: number, name: string): Promise<string> {
  for (;;) {
    const threads = readdirSync(`/proc/${pid}/task`);
    const found = threads.find(
      thread => readFileSync(`/proc/${pid}/task/${thread}/comm`, 'utf8') === `${name}\n`,
    );
    if (found !== undefined) return found;
    await setTimeout(1);
  }
}

/** One handler, one peer. */
async function measure(
  handler: (path: string) => [string, ...string[]],
  threads: number,
  cpu: { faulter: number; handler: number },
  hold?: string,
): Promise<Figures> {
  const folder = mkdtempSync(join(tmpdir(), 'userfaultfd-'));
  const path = join(folder, 's');
  const serving = pinned(cpu.handler, ...handler(path));
  await line(serving);
  const peer = pinned(cpu.faulter, join(dirname(PEER), 'userfaultfd-faulter'), path, '0');
  const ask = async (text: string): Promise<number[]> => {
    const answer = line(peer);
    peer.stdin?.write(`1 ${text}\n`);
    const [, how, ...words] = (await answer).split(' ');
    if (how !== 'ok') throw new Error(words.join(' '));
    return words.map(Number);
  };
  let holding: ChildProcess | undefined;
  try {
    const [address] = await ask(`map ${PAGES}`);
    await ask(`register ${address} ${PAGES * PAGE} 1`);
    if (hold !== undefined) {
      const thread = await threadOf(serving.pid ?? -1, 'uffd-guard');
      holding = spawn(hold, [thread], { stdio: ['ignore', 'pipe', 'inherit'] });
      await line(holding);
    }
    const figures: Figures[] = [];
    for (let pass = -WARMING; pass < PASSES; pass += 1) {
      const [total = 0, median = 0, late = 0] = await ask(`bench ${address} ${PAGES} ${threads}`);
      if (pass >= 0) figures.push({ rate: (PAGES / total) * 1e9, median: median / 1e3, late: late / 1e3 });
      await ask(`discard ${address} ${PAGES * PAGE}`);
    }
    return {
      rate: middle(figures.map(one => one.rate)),
      median: middle(figures.map(one => one.median)),
      late: middle(figures.map(one => one.late)),
    };
  } finally {
    const ended = [once(peer, 'exit'), once(serving, 'exit')];
    peer.kill('SIGKILL');
    holding?.kill('SIGKILL');
    serving.kill('SIGKILL');
    await Promise.all(ended);
    rmSync(folder, { recursive: true });
  }
}

const middle = (values: number[]): number =>
  values.toSorted((a, b) => a - b)[values.length >> 1] ?? Number.NaN;

async function main(rounds: number, only: string | undefined): Promise<void> {
  const [floor, hold] = [built('handler'), built('hold')];
  process.stdout.write(
    `${cpus()[0]?.model ?? '?'}, ${cpus().length} CPUs, Linux ${release()}, Node ${process.version}\n`,
  );
  const kinds = KINDS.filter(kind => only === undefined || only.split(',').includes(kind));
  for (const threads of [1, 8]) {
    for (const cpu of [
      { faulter: 0, handler: 1 },
      { faulter: 1, handler: 1 },
    ]) {
      const floors: Figures[] = [];
      const figures = new Map<Kind, Figures[]>(kinds.map(kind => [kind, []]));
      for (let round = 0; round < rounds; round += 1) {
        floors.push(await measure(path => [floor, path], threads, cpu));
        for (const kind of kinds) {
          const command = (path: string): [string, ...string[]] => [
            process.execPath,
            here,
            'serve',
            kind,
            path,
          ];
          const held = kind === 'unguarded' ? hold : undefined;
          figures.get(kind)?.push(await measure(command, threads, cpu, held));
        }
        await setImmediate();
      }
      const place = `${threads} thread${threads > 1 ? 's' : ''}, CPUs ${cpu.faulter} and ${cpu.handler}`;
      const of = (list: Figures[], name: keyof Figures): number => middle(list.map(one => one[name]));
      process.stdout.write(
        `${place}: C ${of(floors, 'rate').toFixed(0)}/s, ${of(floors, 'median').toFixed(1)} us, p99 ${of(floors, 'late').toFixed(1)} us\n`,
      );
      for (const [kind, list] of figures) {
        const ratio = (name: keyof Figures): number =>
          middle(list.map((one, round) => one[name] / (floors[round]?.[name] ?? Number.NaN)));
        const goal = GOALS[kind]?.[threads === 1 ? 0 : 1];
        process.stdout.write(
          `  ${kind.padEnd(8)} ${ratio('rate').toFixed(2)} of C${goal === undefined ? '' : ` (goal ${goal})`}: ` +
            `${of(list, 'rate').toFixed(0)}/s, ${of(list, 'median').toFixed(1)} us, p99 ${ratio('late').toFixed(2)}x\n`,
        );
      }
      const [guarded, unguarded] = [figures.get('main'), figures.get('unguarded')];
      if (guarded && unguarded) {
        const shares = guarded.map((one, round) => one.rate / (unguarded[round]?.rate ?? Number.NaN));
        process.stdout.write(`  the guard costs ${((1 - middle(shares)) * 100).toFixed(1)} % (goal 3 %)\n`);
      }
    }
  }
}

const [command, argument, path] = process.argv.slice(2);
if (!isMainThread) loop(workerData as number);
else if (command === 'serve') await serve(argument as Kind, path ?? '');
else await main(Number(command ?? 5), argument);
