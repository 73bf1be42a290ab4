// What the documents refer to exists.

import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

import test from 'ava';

const ROOT = fileURLToPath(new URL('../../', import.meta.url));
const text = (path: string): string => readFileSync(join(ROOT, path), 'utf8');

/** The source of a test: `13-ending`, or `pager/failures`. */
function fileOf(name: string): string {
  const [crate = '', ...rest] = name.split('/');
  return rest.length > 0 ? `crates/${crate}/tests/${rest.join('/')}.rs` : `__test__/${name}.spec.ts`;
}

test('each guarantee has tests, and each test that it names exists', t => {
  const sections = text('docs/guarantees.md').split(/^## /m).slice(1);

  t.deepEqual(
    sections.map(section => section.slice(0, 2)),
    ['By', 'P1', 'P2', 'P3', 'P4', 'P5', 'P6', 'P7', 'P8'],
  );
  for (const section of sections) {
    const named = [...section.matchAll(/^- `([\w/-]+)`: (.+)$/gm)];
    t.true(named.length >= 5, section.slice(0, 40));
    // A failure without a test, where they are listed one by one.
    t.notRegex(section, /^\*\*.+\*\*\n(?!\n- `)/m);
    for (const [, file = '', title = ''] of named) {
      const path = fileOf(file);
      t.true(existsSync(join(ROOT, path)), `${path} of “${title}”`);
      const source = text(path);
      const has = path.endsWith('.rs')
        ? new RegExp(`#\\[test\\][^}]*?fn ${title}\\(|\\b${title}\\b`).test(source)
        : source.includes(title);
      t.true(has, `${path} has “${title}”`);
    }
  }
});

test('every code of an error has its cause and its fix in the troubleshooting, and no other has', t => {
  const codes = [...text('src/errors.ts').matchAll(/^ {2}\| '(ERR_UFFD_\w+)'/gm)].map(([, code]) => code);
  const entries = [
    ...text('docs/troubleshooting.md').matchAll(/^### `(ERR_UFFD_\w+)`\n\n([^]*?)(?=\n###|$(?![^]))/gm),
  ];

  t.true(codes.length > 20);
  t.deepEqual(new Set(entries.map(([, code]) => code)), new Set(codes));
  for (const [, code, entry = ''] of entries)
    t.regex(entry, /^\*\*Cause\.\*\* .+\n(.+\n)*\*\*Fix\.\*\* .+/, code);
});

test('links between the documents lead somewhere', t => {
  const documents = [
    'README.md',
    'docs/DESIGN.md',
    'docs/guarantees.md',
    'docs/troubleshooting.md',
    'docs/api/uffd-error.md',
  ];
  for (const path of documents) {
    for (const [, target = ''] of text(path).matchAll(/\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)/g)) {
      t.true(target === '' || existsSync(join(ROOT, path, '..', target)), `${path}: ${target}`);
    }
  }
});

test('the README shows a report as a browser does, and the picture is a small one', t => {
  const [, path = ''] =
    /^!\[A report, in a browser: [^\]]+\]\((docs\/[\w-]+\.png)\)$/m.exec(text('README.md')) ?? [];
  const picture = readFileSync(join(ROOT, path));

  t.is(picture.toString('latin1', 0, 8), '\x89PNG\r\n\x1a\n');
  const [width, height] = [16, 20].map(at => picture.readUInt32BE(at));
  // As wide as a window, and all of the page.
  t.true((width ?? 0) >= 900 && (height ?? 0) > (width ?? 0), `${width} by ${height}`);
  t.true(picture.length < 150_000, `${picture.length} bytes`);
});
