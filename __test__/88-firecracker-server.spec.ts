// examples/firecracker-server.ts, as Firecracker and a service manager meet it.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, renameSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';

import test, { type ExecutionContext } from 'ava';

import { Peer } from '../examples/support/peer.js';
import { canRun, folder, image, IMAGE_SIZE, PAGE } from './helpers/serving.js';

const SERVER = fileURLToPath(new URL('../examples/firecracker-server.js', import.meta.url));

async function connected(t: ExecutionContext, socket: string): Promise<Peer> {
  const peer = new Peer(['--socket', socket, '--region', `${IMAGE_SIZE}`]);
  t.teardown(async () => {
    peer.kill();
    await peer.ended;
  });
  await peer.ready();
  return peer;
}

test('examples/firecracker-server.ts serves clones with bytes of their own, and drains when it is told to end', async t => {
  if (!canRun(t)) return;
  const { path, bytes } = image(t);
  const images = join(dirname(path), 'images');
  mkdirSync(images);
  renameSync(path, join(images, 'default.mem'));
  const socket = join(folder(t), 'vm.sock');
  const server = spawn(process.execPath, [SERVER, socket, images], { stdio: ['ignore', 'pipe', 'inherit'] });
  const ended = once(server, 'close');
  t.teardown(() => server.kill('SIGKILL'));
  const lines = createInterface({ input: server.stdout })[Symbol.asyncIterator]();
  const next = async (): Promise<string> => String((await lines.next()).value);
  t.is(await next(), `listening on ${socket}`);

  const clones = [await connected(t, socket), await connected(t, socket)];

  t.deepEqual(
    [await next(), await next()],
    clones.map(({ pid }) => `${pid} is served`),
  );
  for (const clone of clones) {
    const { hex } = await clone.ask('read', PAGE, 16);
    t.is(Buffer.from(hex, 'hex').toString().replaceAll('\0', ''), `clone ${clone.pid}`);
    const { hex: shared } = await clone.ask('read', 9 * PAGE, 16);
    t.is(shared, bytes.subarray(9 * PAGE, 9 * PAGE + 16).toString('hex'));
  }
  server.kill('SIGTERM');
  t.is(await next(), 'no more VMs; 2 to go');
  for (const clone of clones) {
    const { hex } = await clone.ask('read', 500 * PAGE, 16);
    t.is(hex, bytes.subarray(500 * PAGE, 500 * PAGE + 16).toString('hex'), 'served to its end');
    await clone.exit();
    t.regex(
      await next(),
      new RegExp(`^${clone.pid} has ended \\(peer-exited\\): \\d+ faults brought \\d+ KiB$`),
    );
  }
  t.is(await next(), 'closed');
  t.deepEqual(await ended, [0, null]);
});
