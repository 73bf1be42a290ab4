// What the binaries are made of, and under which licences: they are compiled into them, so their notices go along.

import { execFileSync } from 'node:child_process';
import { readdirSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { root } from '../paths.mjs';

/** The packages of the registry that are linked into the addon or the daemon, for any of the targets. */
export function linkedCrates() {
  const output = execFileSync('cargo', ['metadata', '--format-version', '1', '--locked'], {
    cwd: root,
    encoding: 'utf8',
    maxBuffer: 256 * 1024 * 1024,
  });
  const { packages, resolve } = JSON.parse(output);
  const byId = new Map(packages.map(one => [one.id, one]));
  const nodes = new Map(resolve.nodes.map(node => [node.id, node]));
  const seen = new Set();
  const visit = id => {
    if (seen.has(id)) return;
    seen.add(id);
    // What generates code at build time (macros, build scripts) is not in the binary.
    if (byId.get(id).targets.some(({ kind }) => kind.includes('proc-macro'))) return;
    for (const { pkg, dep_kinds: kinds } of nodes.get(id).deps) {
      if (kinds.some(({ kind, target }) => kind === null && !/windows|wasm|macos|apple/.test(target ?? '')))
        visit(pkg);
    }
  };
  for (const { id } of packages.filter(
    ({ name, source }) => ['binding', 'pagerd'].includes(name) && source === null,
  )) {
    visit(id);
  }
  return [...seen]
    .map(id => byId.get(id))
    .filter(
      ({ source, targets }) => source !== null && !targets.some(({ kind }) => kind.includes('proc-macro')),
    )
    .toSorted((a, b) => a.name.localeCompare(b.name));
}

/** The text under which a crate may be passed on: MIT's where there is a choice. */
function textOf({ name, manifest_path: manifest }) {
  const folder = dirname(manifest);
  const files = readdirSync(folder).filter(file => /^(?:licen[cs]e|copying|unlicense)/i.test(file));
  const file = files.find(one => /mit/i.test(one)) ?? files.find(one => !/apache/i.test(one)) ?? files[0];
  return file === undefined ? undefined : { name, text: readFileSync(join(folder, file), 'utf8').trim() };
}

/** One file with all of them; crates of one text share it. */
export function notices() {
  const texts = new Map();
  const crates = linkedCrates();
  for (const crate of crates) {
    const text = textOf(crate)?.text ?? `(no text in the package; ${crate.repository ?? 'no repository'})`;
    texts.set(text, [...(texts.get(text) ?? []), `${crate.name} ${crate.version} (${crate.license})`]);
  }
  const parts = [...texts].map(([text, names]) => `${names.join('\n')}\n\n${text}\n`);
  return `The binary contains these Rust crates, Rust's standard library (MIT OR Apache-2.0), and LLVM's unwinder (Apache-2.0 WITH LLVM-exception).\n\n${parts.join(`\n${'-'.repeat(80)}\n\n`)}`;
}
