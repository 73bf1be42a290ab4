/**
 * The examples in the documents: each `ts` block has a name, in a comment before it (`<!-- snippet: NAME -->`), and a setting
 * here, in which it runs. What stands in the block is what runs; only the strings in `replace` are other ones.
 */

import { randomBytes } from 'node:crypto';
import { existsSync, symlinkSync, truncateSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import { once } from 'node:events';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import { setTimeout } from 'node:timers/promises';

import type { ExecutionContext } from 'ava';
import * as userfaultfd from 'userfaultfd';

import { Peer } from '../../examples/support/peer.js';
import { FakeFirecracker } from './firecracker.js';
import { IMAGE_SIZE } from './serving.js';

/** What a snippet finds when it runs. */
interface Scene {
  /** What it takes to be there without saying so. */
  globals?: Record<string, unknown>;
  /** What goes on beside it. */
  meanwhile?: () => Promise<void>;
  /** What has to be true afterwards; `said` is what it has printed. */
  finish?: (said: string) => Promise<void> | void;
}

/** Where a snippet belongs. */
export interface Setting {
  /** Declarations of the globals. */
  types?: string;
  /** What is run behind it, in its scope. */
  append?: string;
  /** Strings of the snippet that are other ones here, in the folder that it gets. */
  replace?: Record<string, string>;
  prepare: (folder: string) => Promise<Scene> | Scene;
}

const { GiB, MiB } = userfaultfd;
const PAGE = 4096;
const TYPES = "type Uffd = typeof import('userfaultfd');";
const names = (...list: string[]): string =>
  list.map(name => `declare const ${name}: Uffd['${name}'];`).join('\n');

function image(path: string, size: number = IMAGE_SIZE): void {
  writeFileSync(path, randomBytes(size));
}

function must(condition: boolean, what: string): void {
  if (!condition) throw new Error(`not so: ${what}`);
}

/** Only what helpers take of a test: the process ends with the snippet. */
function loose(): ExecutionContext {
  return { teardown() {} } as unknown as ExecutionContext;
}

/** A VM that connects when somebody listens, reads all of its memory, and exits. */
async function visit(socket: string): Promise<void> {
  const signal = AbortSignal.timeout(10_000);
  while (!existsSync(socket)) await setTimeout(10, undefined, { signal });
  const peer = new Peer(['--socket', socket, '--region', `${IMAGE_SIZE}`]);
  await peer.ready();
  await peer.ask('touch');
  await peer.exit();
}

/** Bytes of a file behind HTTP, with ranges. */
async function webServer(size: number): Promise<{ url: string; asked: () => number }> {
  let requests = 0;
  const server = createServer((request, response) => {
    const [, from = '', to = ''] = /^bytes=(\d+)-(\d+)$/.exec(request.headers.range ?? '') ?? [];
    requests += 1;
    response.writeHead(206, { 'content-range': `bytes ${from}-${to}/${size}` });
    response.end(Buffer.alloc(Number(to) - Number(from) + 1, 9));
  }).listen(0, '127.0.0.1');
  await once(server, 'listening');
  return { url: `http://127.0.0.1:${(server.address() as AddressInfo).port}/`, asked: () => requests };
}

/** A handler's surroundings, and a fault for it. */
const handled: Omit<Setting, 'prepare'> = {
  append: `
    const [byte] = await mapping.read(2 * 4096, 1);
    if (byte !== 9) throw new Error(\`the page has \${byte}\`);`,
};
const page = (): Uint8Array => new Uint8Array(PAGE).fill(9);
const ignore = (): void => {};

const ONE_VISIT = `
  const session = await server.accept({ timeout: 10_000 });
  await session.closed;
  await server.close();`;

/** A Firecracker whose VM runs for a moment. */
const restored: Setting = {
  replace: {
    '/run/firecracker.socket': 'firecracker.socket',
    '/snapshots/vm.state': 'vm.state',
    '/snapshots/vm.mem': 'vm.mem',
  },
  async prepare(folder) {
    image(join(folder, 'vm.mem'));
    writeFileSync(join(folder, 'vm.state'), '');
    const firecracker = await FakeFirecracker.start(loose());
    symlinkSync(firecracker.apiSocket, join(folder, 'firecracker.socket'));
    // It runs for a moment, and ends.
    const { onLoad } = firecracker;
    firecracker.onLoad = async (request, socket) => {
      const answer = await onLoad(request, socket);
      void setTimeout(200).then(() => firecracker.exit());
      return answer;
    };
    return { finish: said => must(/faults: \d/.test(said), said) };
  },
};

/** A daemon in which a program that has ended has left a server, and a process that it serves. */
async function left(folder: string): Promise<Peer> {
  const { PagerClient, serveFirecracker } = userfaultfd;
  const daemon = await PagerClient.spawn({ socketPath: join(folder, 'pager.sock') });
  process.once('exit', () => {
    for (const pid of [daemon.holderPid, daemon.daemonPid]) if (pid) process.kill(pid, 'SIGKILL');
  });
  const first = await PagerClient.connect(daemon.socketPath);
  const [socketPath, memory] = [join(folder, 'vm.sock'), join(folder, 'snapshot.mem')];
  image(memory);
  await serveFirecracker({ pager: first, socketPath, memory });
  const peer = new Peer(['--socket', socketPath, '--region', `${IMAGE_SIZE}`]);
  await peer.ready();
  first.disconnect();
  return peer;
}

/** Memory of this program that is to be served. */
const OWN = `
  declare const pager: import('userfaultfd').Pager;
  declare const mapping: import('userfaultfd').MemoryMapping;
  declare const source: import('userfaultfd').PageSource;`;
function own(): Record<string, unknown> {
  const { bufferSource, MemoryMapping, Pager } = userfaultfd;
  const mapping = MemoryMapping.anonymous(1 * MiB);
  return { pager: Pager.create(), mapping, source: bufferSource(new Uint8Array(1 * MiB).fill(7)) };
}

export const SETTINGS: Record<string, Setting> = {
  record: {
    types: OWN,
    append: 'await session.close(); await pager.close();',
    replace: { 'run.trace': 'run.trace' },
    prepare: () => ({
      globals: own(),
      finish: said => must(/^1 \[ \{ offset: 503808, length: 4096 \} \]$/m.test(said), said),
    }),
  },
  replay: {
    types: OWN,
    append: 'await session.close(); await pager.close();',
    replace: { 'run.trace': 'run.trace' },
    async prepare(folder) {
      const { source } = own() as { source: userfaultfd.PageSource };
      const pager = userfaultfd.Pager.create();
      const mapping = userfaultfd.MemoryMapping.anonymous(1 * MiB);
      const session = await pager.serve(mapping, { source, record: join(folder, 'run.trace') });
      await mapping.read(0, 1);
      await session.close({ rest: 'zero' });
      await pager.close();
      return { globals: own(), finish: said => must(/installed: [1-9]\d*,[^]*done: true/.test(said), said) };
    },
  },
  failures: {
    types: `${OWN}\n${TYPES}\n${names('fileSource')}\ndeclare const spoil: () => void;`,
    append: `spoil();
  if ((await mapping.read(500_000, 1)).length !== 1) throw new Error('nothing was read');
  await session.close(); await pager.close(); console.log('went on');`,
    replace: { 'copy of the image': 'copy', image: 'image' },
    prepare: folder => {
      for (const name of ['image', 'copy']) image(join(folder, name));
      const spoil = (): void => truncateSync(join(folder, 'image'));
      return {
        globals: { ...own(), fileSource: userfaultfd.fileSource, spoil },
        finish: said => must(/^went on$/m.test(said), said),
      };
    },
  },
  'serve-firecracker': {
    replace: { '/run/sandbox/vm.sock': 'vm.sock', 'snapshot.mem': 'snapshot.mem' },
    prepare: folder => {
      image(join(folder, 'snapshot.mem'));
      return {
        meanwhile: async () => visit(join(folder, 'vm.sock')),
        finish: said => must(/^\d+ peer-exited undefined$/m.test(said), said),
      };
    },
  },
  'restore-firecracker': restored,
  'restore-firecracker-api': {
    ...restored,
    types: `${TYPES}\n${names('restoreFirecracker')}`,
    async prepare(folder) {
      const { restoreFirecracker } = userfaultfd;
      return {
        ...(await restored.prepare(folder)),
        globals: { restoreFirecracker },
        finish: said => must(/loaded: \d/.test(said), said),
      };
    },
  },
  'started-again': {
    types: `declare const watch: (session: import('userfaultfd').Session) => void;`,
    replace: {
      '/run/userfaultfd/pager.sock': 'pager.sock',
      '/run/vm.sock': 'vm.sock',
      'snapshot.mem': 'snapshot.mem',
    },
    async prepare(folder) {
      const peer = await left(folder);
      let watch: ((session: userfaultfd.Session) => void) | undefined;
      const watched = new Promise<userfaultfd.Session>(resolve => {
        watch = resolve;
      });
      return {
        globals: { watch },
        async finish() {
          const session = await watched;
          must(session.peer.pid === peer.pid, `${session.peer.pid} is ${peer.pid}`);
          await peer.exit();
        },
      };
    },
  },
  'image-per-process': {
    types: `${TYPES}
      ${names('serveFirecracker')}
      declare const lookUp: (pid: number, options: { signal: AbortSignal }) => Promise<{ memoryFile: string }>;`,
    append: ONE_VISIT,
    replace: { '/run/vm/pager.sock': 'pager.sock' },
    prepare(folder) {
      const memoryFile = join(folder, 'memory');
      image(memoryFile);
      const { serveFirecracker } = userfaultfd;
      let asked = 0;
      const lookUp = async (): Promise<object> => {
        asked += 1;
        return { memoryFile };
      };
      return {
        globals: { serveFirecracker, lookUp },
        meanwhile: async () => visit(join(folder, 'pager.sock')),
        finish: () => must(asked === 1, `asked ${asked} times`),
      };
    },
  },
  'kernel-object': {
    prepare: () => ({ finish: said => must(said.includes('<Buffer 07 07 07 07 07>'), said) }),
  },
  'memory-that-fills-itself': {
    types: 'declare const url: string;',
    append: "if (bytes[0] !== 9) throw new Error('other bytes'); await pager.close(); mapping.close();",
    async prepare() {
      const { url, asked } = await webServer(1 * GiB);
      return { globals: { url }, finish: () => must(asked() === 1, `${asked()} requests`) };
    },
  },
  'dirty-tracking': {
    types: `${TYPES}
      ${names('fileSource')}
      declare const pager: import('userfaultfd').Pager;
      declare const mapping: import('userfaultfd').MemoryMapping;
      declare const save: (offset: number, bytes: Uint8Array) => void;
      declare const start: () => void;`,
    append: 'await tracked.close(); await pager.close();',
    replace: { image: 'image' },
    prepare(folder) {
      image(join(folder, 'image'), 1 * MiB);
      const mapping = userfaultfd.MemoryMapping.anonymous(1 * MiB);
      const saved: number[] = [];
      const save = (offset: number, bytes: Uint8Array): void => void saved.push(offset, bytes.length);
      const { fileSource, Pager } = userfaultfd;
      return {
        globals: { fileSource, pager: Pager.create(), mapping, save },
        finish: () => must(saved.length === 0, 'nothing was written to'),
      };
    },
  },
  'fault-handler': {
    ...handled,
    types: `declare const pageAt: (offset: number | undefined) => Promise<Uint8Array>;
      declare const forget: (range: unknown) => void;
      declare const log: (...words: unknown[]) => void;`,
    prepare: () => ({ globals: { pageAt: async () => page(), forget: ignore, log: ignore } }),
  },
  'fault-handler-api': {
    types: `${TYPES}
      ${names('Userfaultfd')}
      declare const mapping: import('userfaultfd').MemoryMapping;
      declare const pageFor: (offset: number | undefined) => Uint8Array;
      declare const forget: (range: unknown) => void;
      declare const log: (...words: unknown[]) => void;`,
    prepare() {
      const { MemoryMapping, Userfaultfd } = userfaultfd;
      let ended: unknown;
      return {
        globals: {
          Userfaultfd,
          mapping: MemoryMapping.anonymous(1 * MiB),
          pageFor: page,
          forget: ignore,
          log: (reason: unknown) => (ended = reason),
        },
        finish: () => must(ended === 'closed', `it ended: ${String(ended)}`),
      };
    },
  },
  'overlay-per-process': {
    types: `${TYPES}
      ${names('fileSource', 'overlaySource', 'serveFirecracker')}
      declare const socketPath: string;
      declare const identityOf: (peer: unknown) => Promise<{ offset: number; data: Uint8Array }>;`,
    append: ONE_VISIT,
    replace: { '/snapshots/golden.mem': 'golden.mem' },
    prepare(folder) {
      image(join(folder, 'golden.mem'));
      const { fileSource, overlaySource, serveFirecracker } = userfaultfd;
      const socketPath = join(folder, 'vm.sock');
      let asked = 0;
      const identityOf = async (): Promise<object> => {
        asked += 1;
        return { offset: 8, data: new Uint8Array(16) };
      };
      return {
        globals: { fileSource, overlaySource, serveFirecracker, socketPath, identityOf },
        meanwhile: async () => visit(socketPath),
        finish: () => must(asked === 1, `asked ${asked} times`),
      };
    },
  },
};
