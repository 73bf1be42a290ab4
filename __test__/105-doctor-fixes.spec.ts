// What the doctor says to do is really done, as root in a mount namespace of its own: then the doctor finds nothing in the way.

import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, rmdirSync } from 'node:fs';
import { join } from 'node:path';

import test, { type ExecutionContext } from 'ava';

import { NO_DEVICE } from './helpers/confining.js';
import {
  type Answer,
  AS_NOBODY,
  codes,
  collectFacts,
  diagnose,
  doctor,
  driver,
  hasDriver,
  isRoot,
  MAIN,
  NOBODY,
  withoutSysctl,
} from './helpers/doctor.js';

/** What is to be typed: who has to, and what comes of it, stands behind a gap. */
const commandOf = (fix: string): string => fix.split(/ {3,}/)[0] ?? '';

/** The ways out of what is first in the way of creating one; `root` can take those which are commands. */
const fixesOf = ({ roles }: Answer): string[] => roles.creator.problems[0]?.fix ?? [];
const fixBy = (answer: Answer, word: string): string =>
  commandOf(fixesOf(answer).find(fix => fix.startsWith(word)) ?? `false ${word}`);

function canConfine(t: ExecutionContext): boolean {
  if (!isRoot(t) || !hasDriver(t)) return false;
  withoutSysctl(t);
  return true;
}

const SOLVED = { status: 0, usable: true, roles: { creator: { usable: true, problems: [] } } };

test.serial('device-missing: the node that is told is one that this user can use', t => {
  if (!canConfine(t)) return;
  const before = doctor(t, { setup: NO_DEVICE, wrappers: AS_NOBODY });
  t.is(codes(before)[0], 'device-missing');

  const after = doctor(t, { setup: `${NO_DEVICE}\n${fixBy(before, 'mknod')}`, wrappers: AS_NOBODY });

  t.like(after, SOLVED);
});

test.serial('device-missing: of root no more is told than the node', t => {
  if (!canConfine(t)) return;
  // Without the capability, which needs no device.
  const wrappers = ['setpriv', '--bounding-set=-sys_ptrace', '--inh-caps=-sys_ptrace'];
  const before = doctor(t, { setup: NO_DEVICE, wrappers });
  t.is(codes(before)[0], 'device-missing');
  t.notRegex(fixesOf(before).join('\n'), /chown/);

  t.like(doctor(t, { setup: `${NO_DEVICE}\n${fixBy(before, 'mknod')}`, wrappers }), SOLVED);
});

test.serial('device-driver: the node that is told instead is one that this user can use', t => {
  if (!canConfine(t)) return;
  const setup = `${NO_DEVICE}; mknod -m 0666 /dev/userfaultfd c 10 254`;
  const before = doctor(t, { setup, wrappers: AS_NOBODY });
  t.is(codes(before)[0], 'device-driver');

  t.like(doctor(t, { setup: `${setup}\n${fixBy(before, 'rm')}`, wrappers: AS_NOBODY }), SOLVED);
});

const CLOSED = (mode: string): string => `${NO_DEVICE}; mknod -m ${mode} /dev/userfaultfd c 10 ${driver()}`;

for (const mode of ['0600', '0060', '0000']) {
  test.serial(`device-mode ${mode}: the first way that is told gives the device to this user`, t => {
    if (!canConfine(t)) return;
    const before = doctor(t, { setup: CLOSED(mode), wrappers: AS_NOBODY });
    t.is(codes(before)[0], 'device-mode');

    const [first = ''] = fixesOf(before);
    const setup = `${CLOSED(mode)}\n${commandOf(first)}`;

    t.like(doctor(t, { setup, wrappers: AS_NOBODY }), SOLVED);
  });
}

test.serial('device-mode: so does the access list, where there is the program for it', t => {
  if (!canConfine(t)) return;
  if (spawnSync('setfacl', ['--version']).error) {
    t.log('skipped: setfacl is not installed');
    t.pass();
    return;
  }
  const before = doctor(t, { setup: CLOSED('0600'), wrappers: AS_NOBODY });
  const setup = `${CLOSED('0600')}\n${fixBy(before, 'setfacl')}`;

  t.like(doctor(t, { setup, wrappers: AS_NOBODY }), SOLVED);
});

test.serial('device-mode: so does the rule for udev, from the next login', t => {
  if (!canConfine(t)) return;
  const before = doctor(t, { setup: CLOSED('0600'), wrappers: AS_NOBODY });
  // An /etc of its own; and in udev's place a function that does what the rule says.
  const setup = `${CLOSED('0600')}
    cp -a /etc /dev/etc; mount --bind /dev/etc /etc; mkdir -p /etc/udev/rules.d
    getent group kvm > /dev/null || groupadd -r kvm
    udevadm() {
      rule=$(cat /etc/udev/rules.d/90-userfaultfd.rules)
      chgrp "$(echo "$rule" | sed 's/.*GROUP="\\([^"]*\\)".*/\\1/')" "$2"
      chmod "$(echo "$rule" | sed 's/.*MODE="\\([^"]*\\)".*/\\1/')" "$2"
    }
    ${fixBy(before, 'echo')}`;
  const login = ['setpriv', `--reuid=${NOBODY}`, `--regid=${NOBODY}`, '--init-groups'];

  t.like(doctor(t, { setup, wrappers: login }), SOLVED);
  t.is(codes(doctor(t, { setup, wrappers: AS_NOBODY }))[0], 'device-mode', 'and not before');
});

test('device-mode: who has no name is told of no group', t => {
  const denied = { ok: false as const, errno: 13 };
  const refused = { ok: false as const, errno: 1 };
  const { creator } = diagnose({
    ...collectFacts(),
    built: { sysctl: false, driver: 257 },
    device: { mode: 0o600, uid: 0, gid: 0 },
    ptrace: false,
    user: { uid: 1234, name: '1234' },
    outcomes: { device: denied, syscall: refused, user: { ok: true }, pidfd: { ok: true } },
  });

  t.is(creator.problems[0]?.code, 'device-mode');
  t.notRegex(creator.problems[0]?.fix.join('\n') ?? '', /kvm/);
});

test.serial('device-cgroup: a control group that does not list the device is the first cause', t => {
  if (!canConfine(t)) return;
  const devices = '/sys/fs/cgroup/devices';
  if (!existsSync(join(devices, 'devices.deny'))) {
    t.log('skipped: control groups of version 1 have no devices here; the next test simulates it');
    t.pass();
    return;
  }
  const group = join(devices, `userfaultfd-test-${process.pid}`);
  mkdirSync(group);
  // Whoever was in it has ended.
  t.teardown(() => rmdirSync(group));
  const setup = `${CLOSED('0666')}
    echo 'c 10:${driver()} rwm' > ${group}/devices.deny; echo $$ > ${group}/cgroup.procs`;

  const before = doctor(t, { setup, wrappers: AS_NOBODY });

  t.deepEqual(codes(before), ['device-cgroup', 'not-permitted']);
  // What systemd writes for it.
  t.true(fixesOf(before).includes('systemd: DeviceAllow=/dev/userfaultfd r'));
  const allowed = `${setup}\necho 'c 10:${driver()} r' > ${group}/devices.allow`;
  t.like(doctor(t, { setup: allowed, wrappers: AS_NOBODY }), SOLVED);
});

const REFUSED = { ok: false as const, errno: 1 };
const DENIED = { ok: false as const, errno: 13 };
const WORKS = { ok: true as const };
const NO_NODE = { ok: false as const, errno: 2 };

/** An ordinary user on a machine without container; what was answered is simulated. */
function simulated(outcomes: object, more: object = {}): { creator: Answer['roles']['creator'] } {
  const { device: _device, ...facts } = collectFacts() as object & { device?: object };
  return diagnose({
    ...facts,
    container: undefined,
    built: { sysctl: false },
    ptrace: false,
    seccomp: false,
    userNamespace: false,
    modules: [],
    outcomes: { pidfd: WORKS, ...outcomes },
    ...more,
  });
}

test('device-cgroup: EPERM of a device that may be read is not its mode (simulated)', t => {
  const device = { mode: 0o666, uid: 0, gid: 0 };

  const { creator } = simulated(
    { device: REFUSED, syscall: REFUSED, user: WORKS },
    { device, built: { sysctl: false, driver: 257 } },
  );

  t.deepEqual(
    creator.problems.map(({ code }) => code),
    ['device-cgroup', 'not-permitted'],
  );
  t.deepEqual(creator.problems[0]?.fix, ['systemd: DeviceAllow=/dev/userfaultfd r']);
});

// None can be had here: a policy that refuses would have to be loaded into the kernel.
for (const [name, outcome] of [
  ['selinux', DENIED],
  ['apparmor', REFUSED],
] as const) {
  test(`security-module: what ${name} refuses is not taken for a filter (simulated)`, t => {
    const outcomes = { device: NO_NODE, syscall: outcome, user: outcome };

    const ordinary = simulated(outcomes, { modules: ['capability', name] });
    const privileged = simulated(outcomes, { modules: ['capability', name], ptrace: true });
    const without = simulated(outcomes, { modules: ['capability', 'landlock'] });
    const filtered = simulated(outcomes, { modules: ['capability', name], seccomp: true });

    const found = [ordinary, privileged, without, filtered].map(({ creator }) =>
      creator.problems.map(({ code }) => code),
    );
    t.deepEqual(found, [
      ['security-module', 'not-permitted'],
      ['security-module'],
      ['syscall', 'not-permitted'],
      ['seccomp', 'not-permitted'],
    ]);
    const [{ cause, fix } = { cause: '', fix: [] }] = ordinary.creator.problems;
    t.regex(cause, new RegExp(`which the kernel itself does not.*\\(here: capability, ${name}\\)`));
    t.true(fix.some(way => way.toLowerCase().startsWith(name)));
  });
}

/** A shell of a container need not have the right to (CAP_SYS_RESOURCE), its root or not. */
function canRaise(): boolean {
  const raise = 'exec prlimit --pid $$ --nofile=65536:65536';
  return spawnSync('prlimit', ['--nofile=40:40', 'sh', '-c', raise]).status === 0;
}

test.serial('descriptors: what is told raises the hard limit, and is enough', t => {
  if (!isRoot(t)) return;
  const wrappers = ['prlimit', '--nofile=40:40', ...AS_NOBODY];
  const before = doctor(t, { wrappers, args: ['--role', 'pager'] });
  const [problem] = before.roles.pager.problems;
  t.is(problem?.code, 'descriptors');
  t.notRegex(problem?.fix.join('\n') ?? '', /ulimit -n/, 'no shell can raise the limit above the hard one');
  const told = commandOf(problem?.fix.find(fix => fix.startsWith('prlimit')) ?? 'false');

  if (!canRaise()) {
    t.log('skipped: that it helps; root may not raise a hard limit in this container');
    return;
  }
  // Here root is the shell itself; it goes on as who it was about.
  const setup = `prlimit --pid $$ --nofile=40:40\n${told.replace('PID', () => '$$')}`;
  const after = doctor(t, { setup, wrappers: AS_NOBODY, args: ['--role', 'pager'] });

  t.like(after, { status: 0, roles: { pager: { usable: true, problems: [] } } });
  t.false(after.roles.pager.limits.some(({ code }) => code === 'descriptors'));
});

test('with so few descriptors that hardly Node itself starts, the doctor names the limit', t => {
  const run = (limit: number, ...args: string[]): ReturnType<typeof spawnSync> =>
    spawnSync('prlimit', [`--nofile=${limit}:${limit}`, process.execPath, MAIN, ...args], {
      encoding: 'utf8',
      timeout: 60_000,
    });
  // How many that are is Node's to say: it opens about twenty before it runs anything, and several files at a time, so
  // that just above it is a matter of luck.
  let fewest = 12;
  while (fewest < 60 && run(fewest, '--version').status !== 0) fewest += 1;

  for (let limit = fewest + 3; limit < fewest + 13; limit += 1) {
    const { status, stdout, stderr } = run(limit, 'doctor', '--json');
    t.is(status, 1, `${limit}`);
    if (stdout === '') t.fail(`${limit} of ${fewest}: ${String(stderr)}`);
    const { roles } = JSON.parse(String(stdout)) as Answer;
    t.is(roles.pager.problems[0]?.code, 'descriptors', `${limit}`);
    t.regex(roles.pager.problems[0]?.cause ?? '', new RegExp(`^RLIMIT_NOFILE is ${limit}, the hard limit`));
    t.regex(roles.pager.problems[0]?.fix.join('\n') ?? '', /LimitNOFILE=65536/);
    // It was not even tried, and is not blamed on anything else.
    if (!roles.creator.usable) t.deepEqual(codes({ roles } as Answer), ['descriptors'], `${limit}`);
  }
});
