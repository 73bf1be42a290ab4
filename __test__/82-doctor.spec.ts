// What keeps a userfaultfd from being had is really applied to a process; the doctor has to name it first.

import { spawnSync } from 'node:child_process';

import test from 'ava';
import { capabilities } from 'userfaultfd';

import { CONFINED, NO_DEVICE } from './helpers/confining.js';
import {
  AS_NOBODY,
  codes,
  collectFacts,
  diagnose,
  doctor,
  driver,
  hasDriver,
  isRoot,
  MAIN,
  withoutSysctl,
} from './helpers/doctor.js';

const NO_DRIVER = `${NO_DEVICE}; mount --bind /dev/null /proc/misc`;

test.serial('where everything is allowed the doctor finds nothing in the way, and ends with status 0', t => {
  if (!capabilities().usable || capabilities().faults !== 'all') {
    t.log('skipped: this user may not create a userfaultfd');
    t.pass();
    return;
  }

  const answer = doctor(t);

  t.like(answer, { status: 0, usable: true, roles: { pager: { problems: [] }, creator: { problems: [] } } });
});

test.serial('no device node: that is the first cause, and a pager does not mind', t => {
  if (!isRoot(t) || !hasDriver(t)) return;
  withoutSysctl(t);

  const answer = doctor(t, { setup: NO_DEVICE, wrappers: AS_NOBODY });

  t.deepEqual(codes(answer), ['device-missing', 'not-permitted']);
  t.like(answer, {
    status: 1,
    usable: false,
    roles: { pager: { usable: true }, creator: { userFaults: true } },
  });
  const [first] = answer.roles.creator.problems;
  t.true(first?.fix.some(way => way.includes(`mknod -m 0600 /dev/userfaultfd c 10 ${driver()}`)));
});

test.serial('the role of a pager is usable where that of a creator is not', t => {
  if (!isRoot(t)) return;
  withoutSysctl(t);

  const answer = doctor(t, { setup: NO_DEVICE, wrappers: AS_NOBODY, args: ['--role', 'pager'] });

  t.like(answer, { status: 0, usable: true });
  t.deepEqual(Object.keys(answer.roles), ['pager']);
});

test.serial('a device of mode 0600 of another user: its mode is the first cause', t => {
  if (!isRoot(t) || !hasDriver(t)) return;
  withoutSysctl(t);
  const setup = `${NO_DEVICE}; mknod -m 0600 /dev/userfaultfd c 10 ${driver()}`;

  const answer = doctor(t, { setup, wrappers: AS_NOBODY });

  t.deepEqual(codes(answer), ['device-mode', 'not-permitted']);
  t.regex(answer.roles.creator.problems[0]?.cause ?? '', /is mode 0600, owner 0, group 0: user nobody/);
  t.true(answer.roles.creator.problems[0]?.fix[1]?.startsWith('setfacl -m u:65534:r /dev/userfaultfd'));
});

test.serial('a device whose driver this kernel does not have is told as such', t => {
  if (!isRoot(t) || !hasDriver(t)) return;
  withoutSysctl(t);
  const setup = `${NO_DEVICE}; mknod -m 0666 /dev/userfaultfd c 10 254; mount --bind /dev/null /proc/misc`;

  const answer = doctor(t, { setup, wrappers: AS_NOBODY });

  t.deepEqual(codes(answer), ['device-driver', 'not-permitted']);
});

test.serial('the sysctl at 0, on a kernel without the device: the sysctl is the cause', t => {
  if (!isRoot(t)) return;
  withoutSysctl(t);

  const answer = doctor(t, { setup: NO_DRIVER, wrappers: AS_NOBODY });

  t.deepEqual(codes(answer), ['not-permitted']);
  const [{ cause, fix } = { cause: '', fix: [] }] = answer.roles.creator.problems;
  t.regex(cause, /vm\.unprivileged_userfaultfd is 0, and the process does not have CAP_SYS_PTRACE/);
  t.true(fix[0]?.startsWith('sysctl vm.unprivileged_userfaultfd=1'));
});

for (const [how, answer] of [
  ['EPERM', '1'],
  ['ENOSYS', '38'],
  ['death', 'kill'],
] as const) {
  test.serial(
    `a seccomp filter that answers with ${how} is the first cause where the privilege is there`,
    t => {
      if (!isRoot(t)) return;
      const { status, ...found } = doctor(t, { setup: NO_DEVICE, wrappers: [CONFINED, answer] });

      t.is(status, 1);
      t.is(found.roles.creator.problems[0]?.code, 'seccomp');
      t.false(found.roles.creator.userFaults);
      t.true(found.roles.pager.usable, 'it needs no such call');
    },
  );
}

test.serial('a seccomp filter is no cause where the device can be used', t => {
  if (!isRoot(t) || !hasDriver(t)) return;
  const setup = `${NO_DEVICE}; mknod -m 0600 /dev/userfaultfd c 10 ${driver()}`;

  t.like(doctor(t, { setup, wrappers: [CONFINED, '1'] }), { status: 0, usable: true });
});

test.serial(
  'in a container of an ordinary user both causes are told, first the one whose fix is enough',
  t => {
    if (!isRoot(t) || !hasDriver(t)) return;
    withoutSysctl(t);

    const answer = doctor(t, { setup: NO_DEVICE, wrappers: [...AS_NOBODY, CONFINED, '1'] });

    t.deepEqual(codes(answer), ['device-missing', 'seccomp', 'not-permitted']);
  },
);

test.serial('a kernel that shows no trace of userfaultfd was built without it', t => {
  if (!isRoot(t)) return;
  const setup = `${NO_DRIVER}; mount -t tmpfs tmpfs /proc/sys/vm; mount -t tmpfs tmpfs /boot
    [ ! -e /proc/config.gz ] || mount --bind /dev/null /proc/config.gz`;

  const answer = doctor(t, { setup, wrappers: [CONFINED, '38'] });

  t.deepEqual(codes(answer), ['kernel-without-userfaultfd']);
  t.regex(answer.roles.creator.problems[0]?.fix[0] ?? '', /CONFIG_USERFAULTFD=y/);
});

test.serial('too few descriptors for a pager are told with the room there is', t => {
  const { status, roles } = doctor(t, { wrappers: ['prlimit', '--nofile=40:40'], args: ['--role', 'pager'] });

  t.is(status, 1);
  t.is(roles.pager.problems[0]?.code, 'descriptors');
  t.regex(
    roles.pager.problems[0]?.cause ?? '',
    /RLIMIT_NOFILE is 40, the hard limit, and \d+ are open: room for \d sessions/,
  );
});

test.serial('RLIMIT_MEMLOCK takes nothing away, and is not blamed', t => {
  const without = doctor(t, { wrappers: ['prlimit', '--memlock=0:0'] });

  t.deepEqual(without.roles, doctor(t).roles);
});

test('no descriptor left is the only cause, whatever else is closed', t => {
  const facts = collectFacts();
  const full = { ok: false as const, errno: 24 };

  const { creator } = diagnose({
    ...facts,
    outcomes: { device: full, syscall: full, user: full, pidfd: full },
  });

  t.deepEqual(
    creator.problems.map(({ code }) => code),
    ['descriptors'],
  );
});

test('an old feature set limits both roles, and says which kernel has what is missing', t => {
  const facts = collectFacts();
  // What UFFDIO_API answers on Linux 5.4.
  const features = ['event-fork', 'event-remap', 'event-remove', 'missing-hugetlbfs', 'missing-shmem'];

  const { pager, creator } = diagnose({ ...facts, kernel: '5.4.0', features });

  for (const { limits } of [pager, creator]) {
    t.is(limits[0]?.code, 'feature');
    t.regex(limits[0]?.cause ?? '', /^kernel 5\.4\.0 does not have 'poison': .* killed instead$/);
    t.deepEqual(limits[0]?.fix, ['Linux 6.6 or newer']);
  }
});

test('a user namespace makes CAP_SYS_PTRACE worthless, and so says the doctor', t => {
  const facts = collectFacts();
  const refused = { ok: false as const, errno: 1 };
  const outcomes = {
    device: { ok: false as const, errno: 2 },
    syscall: refused,
    user: { ok: true as const },
    pidfd: { ok: true as const },
  };
  const { device: _device, ...rest } = facts;

  const { creator } = diagnose({
    ...rest,
    built: { sysctl: false },
    ptrace: true,
    userNamespace: true,
    outcomes,
  });

  t.deepEqual(
    creator.problems.map(({ code }) => code),
    ['not-permitted'],
  );
  t.regex(creator.problems[0]?.cause ?? '', /CAP_SYS_PTRACE of a user namespace does not count/);
});

test('elsewhere than on Linux the platform is the only cause', t => {
  const { pager, creator } = diagnose({ ...collectFacts(), platform: 'darwin-arm64' });

  for (const { usable, problems } of [pager, creator]) {
    t.false(usable);
    t.deepEqual(
      problems.map(({ code }) => code),
      ['platform'],
    );
  }
});

test('for people it is told in words, with the fix below the cause', t => {
  const { status, stdout } = spawnSync(
    'prlimit',
    ['--nofile=40:40', process.execPath, MAIN, 'doctor', '--role', 'pager'],
    { encoding: 'utf8', env: { ...process.env, NO_COLOR: '1' } },
  );

  t.is(status, 1);
  t.regex(stdout, /^kernel \S+ \(linux-\S+\), Node \S+, user \S+ \(uid \d+\)/);
  t.regex(stdout, /^no +pager/m);
  t.regex(stdout, /cause RLIMIT_NOFILE is 40.*\n +fix: \S.*nofile.*\n +or: {2}\S/);
});

test('what the command line cannot understand is refused with status 2 and its help', t => {
  for (const args of [
    ['doctor', '--role', 'king'],
    ['nonsense'],
    ['doctor', '--jsn'],
    ['serve', '--socket', '/x'],
  ]) {
    const { status, stderr } = spawnSync(process.execPath, [MAIN, ...args], { encoding: 'utf8' });
    t.is(status, 2, args.join(' '));
    t.regex(stderr, /^error: [^]*\n\nUsage: userfaultfd/, args.join(' '));
  }
});
