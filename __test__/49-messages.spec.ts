// Messages to the byte, and what happens where descriptors run out: nothing that a kernel does to order.

import { execFileSync } from 'node:child_process';
import { closeSync, constants, openSync, writeSync } from 'node:fs';
import { constants as system } from 'node:os';
import { join } from 'node:path';
import process from 'node:process';

import test, { type ExecutionContext } from 'ava';
import { EventBatch, type Userfaultfd } from 'userfaultfd';

import { make, PAGE } from './helpers/faults.js';
import { canRun, folder } from './helpers/serving.js';

/** A userfaultfd whose descriptor has become a pipe behind its back, and the other end of that. */
function readingPipe(
  t: ExecutionContext,
  options: Parameters<typeof make>[1] = {},
): { uffd: Userfaultfd; write: (bytes: Buffer) => void } | undefined {
  const uffd = make(t, options);
  if (!uffd) return undefined;
  const path = join(folder(t), 'fifo');
  execFileSync('mkfifo', [path]);
  const keeper = openSync(path, 'r+');
  t.teardown(() => closeSync(keeper));
  const { fd } = uffd;
  closeSync(fd);
  // The lowest free number is the one that was just closed.
  t.is(openSync(path, constants.O_RDONLY | constants.O_NONBLOCK), fd);
  return { uffd, write: bytes => void writeSync(keeper, bytes) };
}

/** `struct uffd_msg`: the kind in byte 0, three words from byte 8 on. */
function message(kind: number, ...words: bigint[]): Buffer {
  const bytes = Buffer.alloc(32);
  bytes[0] = kind;
  words.forEach((word, index) => bytes.writeBigUInt64LE(word, 8 + 8 * index));
  return bytes;
}

test('messages of every kind have the fields of their kind', t => {
  const made = readingPipe(t, { require: ['thread-id'] });
  if (!made) return;
  const { uffd, write } = made;
  const at = 0x7fff_ffff_f000n;
  write(
    Buffer.concat([
      message(0x12, 0n, at, 7n),
      message(0x12, 3n, at, 8n),
      message(0x12, 5n, at, 0n),
      message(0x14, at, 0x1000n, 0x3000n),
      message(0x15, 0x1000n, 0x2000n),
      message(0x16, 0x2000n, 0x5000n),
      message(0x77),
    ]),
  );
  const batch = new EventBatch(16);

  t.is(uffd.readEvents(batch), 7);

  t.deepEqual(
    [...batch],
    [
      { type: 'fault', address: at, kind: 'missing', write: false, threadId: 7 },
      { type: 'fault', address: at, kind: 'write-protect', write: true, threadId: 8 },
      { type: 'fault', address: at, kind: 'minor', write: true },
      { type: 'remap', from: at, to: 0x1000n, length: 0x3000 },
      { type: 'remove', start: 0x1000n, end: 0x2000n },
      { type: 'unmap', start: 0x2000n, end: 0x5000n },
      { type: 'unknown', event: 0x77 },
    ],
  );
  t.deepEqual(batch.page(0), { address: at, length: PAGE });
  t.throws(() => batch.kind(3), { code: 'ERR_INVALID_ARG_VALUE', message: /message 3 .* it is a remap/ });
});

test('what is no message is an error, after which reading goes on', t => {
  const made = readingPipe(t);
  if (!made) return;
  const { uffd, write } = made;
  const batch = new EventBatch();

  write(Buffer.concat([message(0x16, 0n, 0x1000n), Buffer.alloc(8)]));
  t.throws(() => uffd.readEvents(batch), { code: 'ERR_UFFD_PROTOCOL', message: /whole messages/ });
  t.is(uffd.readEvents(batch), 1);
  t.is(batch.type(0), 'unmap');
  t.is(uffd.readEvents(batch), 0);
});

test('the end of a file is an error', t => {
  const uffd = make(t);
  if (!uffd) return;
  const { fd } = uffd;
  closeSync(fd);
  t.is(openSync('/dev/null', 'r'), fd);

  t.throws(() => uffd.readEvents(new EventBatch()), { code: 'ERR_UFFD_PROTOCOL', message: /at its end/ });
});

test('where descriptors run out that is said, and nothing else breaks', t => {
  if (!canRun(t)) return;
  const program = join(import.meta.dirname, 'fixtures', 'exhausted.js');
  const command = `ulimit -n 64; exec "$0" "$1"`;
  const output = execFileSync('sh', ['-c', command, process.execPath, program], {
    encoding: 'utf8',
    timeout: 30_000,
  });

  const { EMFILE } = system.errno;
  const failed = { code: 'ERR_UFFD_SYSTEM', kind: 'Userfaultfd', errno: EMFILE };
  t.deepEqual(JSON.parse(output), {
    release: { code: 'ERR_UFFD_CLONE', kind: 'Clone', errno: EMFILE },
    create: failed,
    factory: ['syscall', failed],
    copy: PAGE,
    afterwards: 'done',
  });
});
