// The command lines that the documents show work as they are written.

import { spawnSync } from 'node:child_process';
import { copyFileSync, existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import process from 'node:process';
import { fileURLToPath } from 'node:url';

import test, { type ExecutionContext } from 'ava';

import { Peer } from '../examples/support/peer.js';
import { MAIN, Serve } from './helpers/serve.js';
import { canRun, folder, image, IMAGE_SIZE } from './helpers/serving.js';

const ROOT = fileURLToPath(new URL('../../', import.meta.url));
const DOCUMENTS = ['README.md', ...['docs', 'docs/api'].flatMap(markdownIn)];
/** What starts the tests, and what other steps of them do. */
const ELSEWHERE = /^npm (?:start|test|run bench|install userfaultfd)\b/;
const SHOWN = /^npx userfaultfd (.*)$/;

function markdownIn(place: string): string[] {
  const names = readdirSync(join(ROOT, place)).filter(name => name.endsWith('.md'));
  return names.map(name => join(place, name));
}

/** The lines of shells, without what is said of them. */
function linesOf(path: string): string[] {
  const text = readFileSync(join(ROOT, path), 'utf8');
  const blocks = [...text.matchAll(/^```(?:sh|bash|shell|console)\n(.*?)^```$/gms)];
  const lines = blocks.flatMap(([, block = '']) => block.split('\n'));
  return lines.map(line => line.replace(/\s+#.*$/, '').trim()).filter(line => line !== '');
}

async function isServed(t: ExecutionContext, args: string[]): Promise<void> {
  const serve = new Serve(t, args);
  await serve.next('listening');
  const socket = args[args.indexOf('--socket') + 1] ?? '';
  const peer = new Peer(['--socket', socket, '--region', `${IMAGE_SIZE}`]);
  t.teardown(() => peer.kill());
  await peer.ready();
  await peer.ask('touch');
  await peer.exit();
  await serve.next('end');
  serve.child.kill('SIGTERM');
  t.deepEqual(await serve.ended, [0, null], args.join(' '));
}

for (const path of DOCUMENTS) {
  const lines = linesOf(path);
  if (lines.length === 0) continue;

  test(`${path}: each command works`, async t => {
    if (!canRun(t)) return;
    const place = folder(t);
    writeFileSync(join(place, 'snapshot.mem'), image(t).bytes);
    const here = (word: string): string =>
      /\.(?:sock|mem|trace|html)$/.test(word) ? join(place, basename(word)) : word;
    for (const line of lines.filter(shown => !ELSEWHERE.test(shown))) {
      const [, words = ''] = SHOWN.exec(line) ?? [];
      t.not(words, '', `${line}: nothing runs this`);
      const [command = '', ...rest] = words.split(/\s+/);
      const args = rest.map(here);
      if (command === 'serve') await isServed(t, args);
      else {
        const { status, stdout, stderr } = spawnSync(process.execPath, [MAIN, command, ...args], {
          encoding: 'utf8',
        });
        // `doctor` says by it what this machine can do.
        t.true(status === 0 || (command === 'doctor' && status === 1), `${line}: ${stderr}`);
        if (command === 'doctor') t.regex(stdout, /userfaultfd/);
      }
      const [one, other] = [join(place, 'run.trace'), join(place, 'other.trace')];
      if (existsSync(one)) copyFileSync(one, other);
    }
  });
}
