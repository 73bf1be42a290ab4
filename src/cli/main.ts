#!/usr/bin/env node
/** The command line: `userfaultfd <command>`. Each command is loaded when it is called. */

import { readFileSync } from 'node:fs';
import process from 'node:process';

import { Command, Option } from 'commander';

import { LONGEST_TIMEOUT } from '../limits.js';
import { FAILURE_POLICIES } from '../policy.js';
import { integer, path } from './arguments.js';
import { ROLES } from './doctor/diagnose.js';
import type { BenchOptions } from './bench/command.js';
import type { DoctorOptions } from './doctor/command.js';
import type { ReportOptions, ShowOptions } from './recordings.js';
import type { ServeOptions } from './serve.js';
import { explain } from './explain.js';
import { endWithReaders, outlivingReaders } from './output.js';

const { version } = JSON.parse(readFileSync(new URL('../../../package.json', import.meta.url), 'utf8')) as {
  version: string;
};

const program = new Command('userfaultfd')
  .description('Serves page faults: of Firecracker VMs, and of whoever hands over its userfaultfd.')
  .version(version)
  .showHelpAfterError()
  // 1 is an answer of the doctor.
  .exitOverride(({ exitCode }) => process.exit(exitCode === 0 ? 0 : 2));

program
  .command('doctor')
  .description(
    'Says what this machine, user and container can do, and how to get what they cannot. Status 0: usable, 1: not.',
  )
  .option('--json', 'for programs')
  .addOption(new Option('--role <role>', 'only this one counts').choices(ROLES))
  .action(async (options: DoctorOptions) => {
    const { doctor } = await import('./doctor/command.js');
    process.exitCode = doctor(options);
  });

program
  .command('serve')
  .description('Serves Firecracker snapshots from a memory file, until SIGINT or SIGTERM.')
  .requiredOption('--socket <path>', 'where to listen: mem_backend.backend_path of PUT /snapshot/load', path)
  .requiredOption('--memory <file>', "the snapshot's memory file", path)
  .addOption(
    new Option(
      '--on-failure <policy>',
      'what happens to a VM whose memory cannot be served any more, and to one that lacks memory when this is ended (`hold`: poison then)',
    )
      .choices(FAILURE_POLICIES)
      .default('poison'),
  )
  .option(
    '--hold-timeout <ms>',
    'how long a VM is held (--on-failure hold) before it is poisoned (default: as long as it takes)',
    integer(1, LONGEST_TIMEOUT),
  )
  .option(
    '--record <file>',
    'records what a VM wanted; of several, the last to end has the name. Status 1 where it could not be written',
    path,
  )
  .option('--replay <recording>', 'brings what an earlier VM wanted before it is asked for', path)
  .option(
    '--pager <path>',
    'the daemon (userfaultfd-pagerd) that serves and outlives this: where it listens, or `spawn` to start one',
    path,
  )
  .option('--uid <uid>', 'whose VMs may connect (default: those of this user)', integer(0, 2 ** 32 - 2))
  .action(async (options: ServeOptions, command: Command) => {
    if (options.holdTimeout !== undefined && options.onFailure !== 'hold') {
      command.error("error: option '--hold-timeout <ms>' does nothing without '--on-failure hold'");
    }
    const { serve } = await import('./serve.js');
    process.exitCode = await outlivingReaders(async () => serve(options));
  });

const trace = program
  .command('trace')
  .description('Looks into recordings of working sets, and puts them together.');

for (const [how, description] of [
  ['merge', 'Writes what any of the recordings wanted.'],
  ['intersect', 'Writes what all of the recordings wanted.'],
] as const) {
  trace
    .command(how)
    .description(description)
    .argument('<recordings...>', 'of one memory image')
    .requiredOption('-o, --output <file>', 'the recording to write')
    .action(async (files: string[], { output }: { output: string }) => {
      const { combine } = await import('./recordings.js');
      await combine(how, files, output);
    });
}

trace
  .command('show')
  .description('Says what is in a recording.')
  .argument('<recording>')
  .option('--json', 'for programs')
  .option('--faults', 'with every fault')
  .action(async (file: string, options: ShowOptions) => {
    const { show } = await import('./recordings.js');
    await show(file, options);
  });

program
  .command('bench')
  .description(
    'Measures this machine: what a bare loop over the system calls takes, and what this package does. A minute.',
  )
  .option('--json', 'for programs: one object, when all is measured')
  .option('--quick', 'one round over less memory: a few seconds, less exact')
  .action(async (options: BenchOptions) => {
    const { bench } = await import('./bench/command.js');
    await bench(options, version);
  });

program
  .command('report')
  .description(
    'Draws a recording: where and when memory was wanted, how long faults waited, how much it was.',
  )
  .argument('<recording>')
  .requiredOption(
    '-o, --output <file>',
    'a page (.html) or a picture (.svg); nothing else is needed to look at it',
  )
  .option('--replayed <recording>', 'what was replayed in that session: tells late faults from missed ones')
  .action(async (file: string, options: ReportOptions) => {
    const { report } = await import('./recordings.js');
    await report(file, options);
  });

async function main(): Promise<void> {
  endWithReaders();
  try {
    await program.parseAsync();
  } catch (error) {
    process.stderr.write(`${explain(error)}\n`);
    process.exitCode = 1;
  }
}

void main();
