/** `userfaultfd doctor`: what this machine, user and container can do, and what to do about what it cannot. */

import process from 'node:process';

import colors from 'picocolors';

import { diagnose, type Diagnosis, type Role, type RoleReport, ROLES } from './diagnose.js';
import { exhausted } from './exhaustion.js';
import type { Facts } from './facts.js';
import type { Problem } from './problems.js';
import { lookAround } from './surroundings.js';

/** Options of the command line. */
export interface DoctorOptions {
  json?: boolean;
  role?: Role;
}

const WORDS: { [role in Role]: string } = {
  pager: 'serve memory of other processes, which hand over their userfaultfd',
  creator: 'create a userfaultfd that sees all faults (a VMM such as Firecracker, or memory of its own)',
};

// With hardly a descriptor free Node cannot even read what tries: so that comes last, and that it cannot is an answer.
const seen = lookAround();
// oxlint-disable-next-line node/no-top-level-await -- a part of the program, which nobody requires
const collect = await import('./facts.js').then(
  ({ collectFacts }) => collectFacts,
  (error: unknown) => (facts: Facts) => ({ ...facts, outcomes: exhausted(error) }),
);

/** Gives the exit status: 0 where every role asked for can be had, else 1. */
export function doctor({ json = false, role }: DoctorOptions): number {
  const facts = collect(seen);
  const diagnosis = diagnose(facts);
  const roles = role === undefined ? ROLES : [role];
  const usable = roles.every(name => diagnosis[name].usable);
  process.stdout.write(json ? asJson(usable, roles, diagnosis, facts) : asText(roles, diagnosis, facts));
  return usable ? 0 : 1;
}

function asJson(usable: boolean, roles: readonly Role[], diagnosis: Diagnosis, facts: Facts): string {
  const reports = Object.fromEntries(roles.map(name => [name, diagnosis[name]]));
  return `${JSON.stringify({ usable, roles: reports, facts }, undefined, 2)}\n`;
}

function asText(roles: readonly Role[], diagnosis: Diagnosis, facts: Facts): string {
  const { kernel, platform, node, user, container } = facts;
  const where = container === undefined ? '' : `, in a container (${container})`;
  const lines = [`kernel ${kernel} (${platform}), Node ${node}, user ${user.name} (uid ${user.uid})${where}`];
  for (const role of roles) lines.push('', ...report(role, diagnosis[role]));
  return `${lines.join('\n')}\n`;
}

function report(role: Role, { usable, userFaults = false, problems, limits }: RoleReport): string[] {
  const mark = usable ? colors.green('yes ') : colors.red('no  ');
  const lines = [`${mark} ${colors.bold(role.padEnd(8))} ${WORDS[role]}`];
  for (const problem of problems) lines.push(...described(problem, colors.red('cause')));
  if (userFaults) {
    lines.push(
      `     ${colors.yellow('but  ')} faults of user mode can be seen: memory that only this program itself touches`,
    );
  }
  for (const limit of limits) lines.push(...described(limit, colors.yellow('limit')));
  return lines;
}

function described({ cause, fix }: Problem, word: string): string[] {
  return [
    `     ${word} ${cause}`,
    ...fix.map((way, index) => `           ${index === 0 ? 'fix:' : 'or: '} ${way}`),
  ];
}
