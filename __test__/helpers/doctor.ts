/** The doctor, of a process from which something was taken away. */

import { spawnSync } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

import type { ExecutionContext } from 'ava';

import { afterSetup } from './confining.js';

export const MAIN: string = fileURLToPath(new URL('../../../dist/src/cli/main.js', import.meta.url));
export const NOBODY = 65534;
export const AS_NOBODY: readonly string[] = [
  'setpriv',
  `--reuid=${NOBODY}`,
  `--regid=${NOBODY}`,
  '--clear-groups',
];
const SYSCTL = '/proc/sys/vm/unprivileged_userfaultfd';

export interface Problem {
  code: string;
  cause: string;
  fix: string[];
}

export interface Report {
  usable: boolean;
  userFaults?: boolean;
  problems: Problem[];
  limits: Problem[];
}

export interface Answer {
  status: number | null;
  usable: boolean;
  roles: { pager: Report; creator: Report };
}

/** Not public: the parts that a test can put together as no machine does. */
const part = async (name: string): Promise<unknown> =>
  import(new URL(`../../../dist/src/cli/doctor/${name}.js`, import.meta.url).href);

export const { diagnose } = (await part('diagnose')) as {
  diagnose: (facts: object) => { pager: Report; creator: Report };
};
export const { collectFacts } = (await part('facts')) as { collectFacts: () => { device?: object } };

/** Runs the doctor: `setup` in a mount namespace of its own, before `wrappers`. */
export function doctor(
  t: ExecutionContext,
  { setup = '', wrappers = [] as readonly string[], args = [] as readonly string[] } = {},
): Answer {
  const command = [...wrappers, process.execPath, MAIN, 'doctor', '--json', ...args];
  const [program = '', ...rest] = setup === '' ? command : afterSetup(setup, command);
  const { status, stdout, stderr } = spawnSync(program, rest, { encoding: 'utf8', timeout: 60_000 });
  if (!stdout.startsWith('{')) t.fail(`${status}: ${stdout}${stderr}`);
  return { status, ...(JSON.parse(stdout) as Omit<Answer, 'status'>) };
}

/** What is in the way of creating one, in the order told. */
export const codes = ({ roles }: Answer): string[] => roles.creator.problems.map(({ code }) => code);

export function isRoot(t: ExecutionContext): boolean {
  if (process.getuid?.() === 0) return true;
  t.log('skipped: only root can take these things away from a process');
  t.pass();
  return false;
}

/** The number of the device's driver. */
export function driver(): string {
  return /^\s*(\d+) userfaultfd$/m.exec(readFileSync('/proc/misc', 'utf8'))?.[1] ?? '';
}

/** For tests whose device is the only driver there is, or none. */
export function hasDriver(t: ExecutionContext): boolean {
  if (driver() !== '') return true;
  t.log('skipped: this kernel has no /dev/userfaultfd (before Linux 6.1)');
  t.pass();
  return false;
}

/** Nobody may see faults of the kernel by the system call alone, until the test ends. */
export function withoutSysctl(t: ExecutionContext): void {
  if (readFileSync(SYSCTL, 'utf8').trim() === '0') return;
  writeFileSync(SYSCTL, '0');
  t.teardown(() => writeFileSync(SYSCTL, '1'));
}
