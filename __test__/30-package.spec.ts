import { readdirSync, readFileSync } from 'node:fs';
import { createRequire } from 'node:module';

import test from 'ava';
import * as userfaultfd from 'userfaultfd';

interface Package {
  version: string;
  os?: string[];
  cpu?: string[];
  libc?: string[];
  files: string[];
  name: string;
  main: string;
  napi: { targets: string[]; packageName: string; binaryName: string };
}

const root = new URL('../../', import.meta.url);
const read = (path: string): Package => JSON.parse(readFileSync(new URL(path, root), 'utf8')) as Package;
const TUPLES: Record<string, string> = {
  'x86_64-unknown-linux-gnu': 'linux-x64-gnu',
  'x86_64-unknown-linux-musl': 'linux-x64-musl',
  'aarch64-unknown-linux-gnu': 'linux-arm64-gnu',
  'aarch64-unknown-linux-musl': 'linux-arm64-musl',
};

test('there is one platform package for each target, and it says what the root says', t => {
  const main = read('package.json');

  const expected = main.napi.targets.map(target => TUPLES[target]);
  const folders = readdirSync(new URL('npm', root));
  t.deepEqual([folders.length, expected.length], [4, 4]);
  t.deepEqual(
    expected.filter(tuple => !folders.includes(tuple ?? '')),
    [],
  );
  for (const tuple of expected) {
    const platform = read(`npm/${tuple}/package.json`);
    const [os = '', cpu = '', libc = ''] = tuple?.split('-') ?? [];
    t.like(platform, {
      name: `${main.napi.packageName}-${tuple}`,
      version: main.version,
      main: `${main.napi.binaryName}.${tuple}.node`,
      os: [os],
      cpu: [cpu],
      libc: [libc === 'gnu' ? 'glibc' : libc],
    });
    // npm leaves an optional package out whose `engines` do not fit, without a word; the root's only warn.
    t.false('engines' in platform, tuple);
  }
});

test('import and require give the same classes', t => {
  const required = createRequire(import.meta.url)('userfaultfd') as typeof userfaultfd;

  t.is(required.UffdError, userfaultfd.UffdError);
  t.is(required.serveFirecracker, userfaultfd.serveFirecracker);
});
