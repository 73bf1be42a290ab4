// Running another program: its output goes into a log file, nothing it starts outlives it, and what it
// printed is there afterwards. A file instead of a pipe, because a pipe is held open by any grandchild
// and loses the order of stdout and stderr.

import { spawn } from 'node:child_process';
import { closeSync, mkdirSync, openSync, readFileSync } from 'node:fs';
import { constants } from 'node:os';
import { join, relative } from 'node:path';
import { logs, root } from './paths.mjs';

const MINUTE = 60_000;
const running = new Set();

/**
 * Kills a program with all it started: each is the leader of a process group.
 * @param {import('node:child_process').ChildProcess} child
 */
function killGroup(child) {
  try {
    process.kill(-child.pid, 'SIGKILL');
  } catch (error) {
    if (error.code !== 'ESRCH') throw error;
  }
}

const SIGNALS = ['SIGINT', 'SIGTERM', 'SIGHUP'];

function endAll(signal) {
  running.forEach(killGroup);
  process.exit(128 + constants.signals[signal]);
}

// The groups are not the terminal's, so its Ctrl-C reaches only this process. What is imported when nothing runs any more ends as it likes.
function begun(child) {
  if (running.size === 0) for (const signal of SIGNALS) process.on(signal, endAll);
  running.add(child);
}

function ended(child) {
  running.delete(child);
  if (running.size === 0) for (const signal of SIGNALS) process.off(signal, endAll);
}

/**
 * Runs `command` in the repository's root until it ends or `deadline` passes.
 *
 * @param {string[]} command The program and its arguments.
 * @param {object} options
 * @param {string} options.name Names the log files: `<name>.log`, and `<name>.out` with `separate`.
 * @param {Record<string, string>} [options.env] Added to the environment.
 * @param {boolean} [options.separate] Keeps stdout out of the log: for output that is parsed while
 *   anything may be written to stderr. Default: `false`.
 * @param {number} [options.deadline] Milliseconds until it is killed. Default: 30 minutes.
 */
export async function run(command, { name, env = {}, separate = false, deadline = 30 * MINUTE }) {
  mkdirSync(logs, { recursive: true });
  const log = join(logs, `${name}.log`);
  const result = separate ? join(logs, `${name}.out`) : log;
  const logFd = openSync(log, 'w');
  const resultFd = separate ? openSync(result, 'w') : logFd;
  const started = performance.now();
  const end = await new Promise(settle => {
    const child = spawn(command[0], command.slice(1), {
      cwd: root,
      detached: true,
      // Colours would have to be taken out again before anything is parsed.
      env: { ...process.env, CARGO_TERM_COLOR: 'never', FORCE_COLOR: '0', NO_COLOR: '1', ...env },
      stdio: ['ignore', resultFd, logFd],
    });
    child.once('error', error => settle({ error }));
    if (child.pid === undefined) return;
    begun(child);
    let timedOut = false;
    const timer = setTimeout(() => {
      timedOut = true;
      killGroup(child);
    }, deadline);
    child.once('exit', (status, signal) => {
      clearTimeout(timer);
      ended(child);
      killGroup(child);
      settle({ status, signal, timedOut });
    });
  });
  closeSync(logFd);
  if (separate) closeSync(resultFd);
  const milliseconds = performance.now() - started;
  return {
    command,
    ok: end.status === 0,
    ending: describeEnd(command[0], end, deadline),
    missing: end.error?.code === 'ENOENT',
    milliseconds,
    stdout: readFileSync(result, 'utf8'),
    stderr: separate ? readFileSync(log, 'utf8') : '',
    log: relative(root, log),
  };
}

/** How the program ended, in words. */
function describeEnd(program, { error, status, signal, timedOut }, deadline) {
  if (error) return `${program} could not be started: ${error.message}`;
  if (timedOut) return `killed after ${deadline / MINUTE} minutes without an end`;
  return signal ? `killed by ${signal}` : `exit status ${status}`;
}

/** `83.4 s` */
export const seconds = milliseconds => `${(milliseconds / 1000).toFixed(1)} s`;

/** The last `count` lines of `text`. */
export function tail(text, count) {
  const lines = text.trimEnd().split('\n');
  if (lines.length <= count) return lines.join('\n');
  return [`(${lines.length - count} lines before)`, ...lines.slice(-count)].join('\n');
}
