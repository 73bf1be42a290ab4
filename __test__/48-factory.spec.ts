// The factory: the device kept, handed on to a process without rights, and passed by a socket.

import { spawn } from 'node:child_process';
import { closeSync, openSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import process from 'node:process';
import { text } from 'node:stream/consumers';

import test from 'ava';
import { capabilities, UserfaultfdFactory } from 'userfaultfd';

import { canRun, resources } from './helpers/serving.js';

test('a factory keeps the device and can be handed on', t => {
  if (!canRun(t)) return;
  const factory = UserfaultfdFactory.open();
  const clone = factory.clone();
  const [fd] = factory.fds;
  factory.close();
  t.throws(() => factory.create(), { code: 'ERR_UFFD_USE_AFTER_CLOSE' });
  t.is(clone.fds.length, fd === undefined ? 0 : 1);
  t.is(clone.backend, fd === undefined ? 'syscall' : 'device');
  clone.create().close();
  clone.close();
});

test('whatever is wrong with the device, the system call is tried', t => {
  if (!canRun(t)) return;
  const wrong = UserfaultfdFactory.fromDevice(openSync('/dev/null', 'r'));
  t.teardown(() => wrong.close());

  const uffd = wrong.create();

  t.is(uffd.backend, 'syscall');
  uffd.close();
});

test('a process without rights creates from the device it was given, for the faults of the kernel, too', async t => {
  const { device, ptrace } = capabilities();
  const unprivileged = readFileSync('/proc/sys/vm/unprivileged_userfaultfd', 'utf8').trim();
  if (process.getuid?.() !== 0 || !device.readable || !ptrace || unprivileged !== '0') {
    t.log('skipped: needs root, the device, and vm.unprivileged_userfaultfd=0');
    t.pass();
    return;
  }
  const factory = UserfaultfdFactory.open();
  t.teardown(() => factory.close());
  const child = spawn(process.execPath, [join(import.meta.dirname, 'fixtures', 'jailed.js')], {
    stdio: ['ignore', 'pipe', 'inherit', ...factory.fds],
    timeout: 30_000,
    killSignal: 'SIGKILL',
  });

  const told = JSON.parse(await text(child.stdout as NonNullable<typeof child.stdout>)) as unknown;

  const whole = ['device', false, 7];
  t.deepEqual(told, {
    backends: [whole, whole, whole],
    late: 'syscall',
    refused: 'ERR_UFFD_NOT_PERMITTED',
    userModeOnly: true,
  });
});

test('a factory that takes a descriptor over closes it, one that refuses it does not', t => {
  const before = new Set(resources().fds);
  const fd = openSync('/dev/null', 'r');
  UserfaultfdFactory.fromDevice(fd).close();
  t.throws(() => closeSync(fd), { code: 'EBADF' });
  t.throws(() => UserfaultfdFactory.fromDevice(fd), { code: 'ERR_UFFD_SYSTEM' });
  t.deepEqual(
    resources().fds.filter(one => !before.has(one)),
    [],
  );
});
