// `npm run release:check`: everything up to the publishing itself. Needs the binaries of `npm run build:all` and a built library
// (`npm run build`). All of it is looked at even where something fails.

import { execFileSync, spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { delimiter, join } from 'node:path';
import { inspect, problemsOf } from './build-all/gate.mjs';
import { binariesOf, TARGETS } from './build-all/targets.mjs';
import { root } from './paths.mjs';
import { check, conclude } from './release/checks.mjs';
import { contentsOf } from './release/contents.mjs';
import { checkSizes } from './release/sizes.mjs';
import { packPlatform, packRoot, platforms } from './release/stage.mjs';

const text = path => readFileSync(join(root, path), 'utf8');
const json = path => JSON.parse(text(path));

/** A check that is a program. */
function runs(what, command, args, env = {}) {
  const { status, stdout, stderr, error } = spawnSync(command, args, {
    cwd: root,
    encoding: 'utf8',
    env: { ...process.env, NO_COLOR: '1', ...env },
  });
  check(what, status === 0 ? '' : (error?.message ?? `${stdout}${stderr}`));
}

function versions() {
  const { version } = json('package.json');
  const others = {
    'package-lock.json': json('package-lock.json').version,
    'Cargo.toml': /^\[workspace\.package\]\nversion = "(.*)"$/m.exec(text('Cargo.toml'))?.[1],
    'CHANGELOG.md (newest entry)': /^## (\S+)/m.exec(text('CHANGELOG.md'))?.[1],
  };
  for (const platform of platforms())
    others[`npm/${platform}`] = json(`npm/${platform}/package.json`).version;
  const wrong = Object.entries(others).filter(([, other]) => other !== version);
  check(
    'versions',
    wrong.map(([where, other]) => `${where} has ${other}, not ${version}`).join('\n'),
    version,
  );
}

function targets() {
  const { napi } = json('package.json');
  const wanted = Object.values(TARGETS).map(({ platform }) => platform);
  const problems = [
    [Object.keys(TARGETS), napi.targets, 'the targets of package.json'],
    [wanted, platforms(), 'the folders of npm/'],
  ].flatMap(([expected, found, what]) =>
    expected.toSorted().join() === found.toSorted().join() ? [] : [`${what}: ${found.join(', ')}`],
  );
  check('targets', problems.join('\n'), wanted.join(', '));
}

function binaries() {
  for (const [target, { platform }] of Object.entries(TARGETS)) {
    for (const name of binariesOf(platform)) {
      const file = join(root, 'npm', platform, name);
      if (!existsSync(file)) {
        check(`${platform}: ${name}`, 'missing: npm run build:all');
        continue;
      }
      const found = inspect(file);
      check(
        `${platform}: ${name}`,
        problemsOf(target, found).join('\n'),
        `${(found.bytes / 1000).toFixed(0)} kB`,
      );
    }
  }
}

function tarballs() {
  const folder = mkdtempSync(join(tmpdir(), 'userfaultfd-release-'));
  process.once('exit', () => rmSync(folder, { force: true, recursive: true }));
  const ready = platforms().filter(platform =>
    readdirSync(join(root, 'npm', platform)).some(name => name.endsWith('.node')),
  );
  const packed = [packRoot(folder), ...ready.map(platform => packPlatform(platform, folder))];
  for (const tarball of packed)
    check(`files of ${tarball.name}`, contentsOf(tarball), `${tarball.files.length} files`);
  checkSizes(packed, check);
  const scripts = packed.filter(
    ({ folder: from }) => JSON.parse(readFileSync(join(from, 'package.json'), 'utf8')).scripts,
  );
  check('nothing runs when it is installed', scripts.map(({ name }) => `${name} has scripts`).join('\n'));
}

/** cargo-deny, built once into a folder of its own where it is not there. */
function licences() {
  const tools = join(root, '.cache/tools');
  const PATH = [process.env.PATH, join(tools, 'bin')].join(delimiter);
  const has = spawnSync('cargo-deny', ['--version'], { env: { ...process.env, PATH } }).status === 0;
  if (!has) runs('cargo install cargo-deny', 'cargo', ['install', '--locked', '--root', tools, 'cargo-deny']);
  runs(
    'licences, bans, sources of the crates',
    'cargo',
    ['deny', '--offline', 'check', 'licenses', 'bans', 'sources'],
    {
      PATH,
    },
  );
}

function tree() {
  const dirty = execFileSync('git', ['status', '--porcelain'], { cwd: root, encoding: 'utf8' });
  check('nothing is uncommitted', dirty);
}

tree();
versions();
targets();
binaries();
tarballs();
licences();
runs('as a consumer', process.execPath, ['scripts/consumer.mjs', '--packaged']);
conclude('ready to be published');
