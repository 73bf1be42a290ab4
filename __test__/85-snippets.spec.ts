// What the documents show works: each example is type-checked, and run.

import { spawnSync } from 'node:child_process';
import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

import test from 'ava';
import ts from 'typescript';

import { canRun, folder } from './helpers/serving.js';
import { SETTINGS } from './helpers/snippets.js';

const ROOT = fileURLToPath(new URL('../../', import.meta.url));
const RUN = fileURLToPath(new URL('fixtures/run-snippet.js', import.meta.url));
/** Inside of the package, so that it is reached by its own name. */
const COMPILED = join(ROOT, 'out/snippets');
const DOCUMENTS = ['README.md', 'docs', 'docs/api'].flatMap(path =>
  path.endsWith('.md')
    ? [path]
    : readdirSync(join(ROOT, path))
        .filter(name => name.endsWith('.md'))
        .map(name => join(path, name)),
);
const HOW =
  'each block of ts needs <!-- snippet: NAME --> in the line before it, and a setting in helpers/snippets.ts';

interface Snippet {
  name: string;
  where: string;
  code: string;
}

function snippetsOf(path: string): Snippet[] {
  const lines = readFileSync(join(ROOT, path), 'utf8').split('\n');
  return lines.flatMap((line, at) => {
    if (!/^```(?:ts|js|mjs|typescript|javascript)\b/.test(line)) return [];
    const name = /^<!-- snippet: ([\w-]+) -->$/.exec(lines[at - 1] ?? '')?.[1] ?? '';
    const end = lines.indexOf('```', at);
    return [{ name, where: `${path}:${at + 1}`, code: lines.slice(at + 1, end).join('\n') }];
  });
}

const SNIPPETS = DOCUMENTS.flatMap(snippetsOf);

/** The program that a snippet is here; `place` is where its files are. */
function program({ name, code }: Snippet, place: string): string {
  const { replace = {}, append = '', types = '' } = SETTINGS[name] ?? {};
  let text = code;
  for (const [from, to] of Object.entries(replace)) {
    text = text.replaceAll(`'${from}'`, JSON.stringify(join(place, to)));
  }
  return `${text}\n${append}\n${types}\nexport {};\n`;
}

function compile(snippets: readonly Snippet[], places: ReadonlyMap<string, string>): string {
  rmSync(COMPILED, { recursive: true, force: true });
  mkdirSync(COMPILED, { recursive: true });
  const files = snippets.map(snippet => {
    const file = join(COMPILED, `${snippet.name}.ts`);
    writeFileSync(file, program(snippet, places.get(snippet.name) ?? ''));
    return file;
  });
  const { config } = ts.readConfigFile(join(ROOT, 'tsconfig.json'), path => readFileSync(path, 'utf8')) as {
    config: { compilerOptions: object };
  };
  const { options } = ts.convertCompilerOptionsFromJson(
    {
      ...config.compilerOptions,
      outDir: COMPILED,
      rootDir: COMPILED,
      declaration: false,
      declarationMap: false,
      isolatedDeclarations: false,
      // An example need not use all it has.
      noUnusedLocals: false,
    },
    ROOT,
  );
  const compiled = ts.createProgram(files, options);
  const { diagnostics } = compiled.emit();
  return ts.formatDiagnostics([...ts.getPreEmitDiagnostics(compiled), ...diagnostics], {
    getCanonicalFileName: name => name,
    getCurrentDirectory: () => ROOT,
    getNewLine: () => '\n',
  });
}

test('every example in the documents has a name and a setting, and every setting an example', t => {
  for (const { name, where } of SNIPPETS) t.true(name in SETTINGS, `${where}: ${HOW}`);
  t.deepEqual(SNIPPETS.map(({ name }) => name).toSorted(), Object.keys(SETTINGS).toSorted());
});

test('every example in the documents is type-checked, and does what it says', t => {
  const places = new Map(SNIPPETS.map(({ name }) => [name, folder(t)]));

  t.is(compile(SNIPPETS, places), '');
  if (!canRun(t)) return;
  const failed = SNIPPETS.flatMap(({ name, where }) => {
    const { status, signal, stdout, stderr } = spawnSync(
      process.execPath,
      [RUN, name, join(COMPILED, `${name}.js`), places.get(name) ?? ''],
      { encoding: 'utf8', timeout: 60_000 },
    );
    return status === 0 ? [] : [`${name} (${where}), ${signal ?? status}: ${stdout}${stderr}`];
  });
  t.is(failed.join('\n'), '');
});
