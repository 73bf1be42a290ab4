import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

import test from 'ava';

const ROOT = fileURLToPath(new URL('../../', import.meta.url));
const text = (path: string): string => readFileSync(join(ROOT, path), 'utf8');

test('the declarations can be read without knowing the package’s own names', t => {
  const declarations = readdirSync(join(ROOT, 'dist'), { recursive: true, encoding: 'utf8' }).filter(name =>
    name.endsWith('.d.ts'),
  );

  t.true(declarations.length > 40);
  t.deepEqual(
    declarations.filter(name => text(join('dist', name)).includes('#native')),
    [],
  );
  t.regex(text('dist/src/errors.d.ts'), /from '\.\.\/\.\.\/native\.cjs'/);
});

test('the command is in the package, and the library does not know it', t => {
  const { bin, files } = JSON.parse(text('package.json')) as { bin: Record<string, string>; files: string[] };

  t.deepEqual(Object.keys(bin), ['userfaultfd']);
  t.true(text(bin['userfaultfd'] ?? '').startsWith('#!/usr/bin/env node\n'));
  t.true(files.includes('dist'));
  const library = readdirSync(join(ROOT, 'src'), { encoding: 'utf8' }).filter(name => name.endsWith('.ts'));
  t.deepEqual(
    ['index.ts', ...library.map(name => join('src', name))].filter(name => text(name).includes('/cli/')),
    [],
  );
});
