import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdtempSync, rmSync, statSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { createInterface } from 'node:readline';

import { UffdError } from './errors.js';

/** The name of the executable, in every package that has it. */
const NAME = 'userfaultfd-pagerd';

/** What the daemon says when it can be connected to. @hidden */
export interface Ready {
  socket: string;
  holder: number;
  daemon: number;
}

/** One that runs. @hidden */
export interface Started extends Ready {
  /** The holder has ended. */
  ended: Promise<unknown>;
  /** Removes what a holder that was killed has left of the socket, once the daemon has ended, too. */
  clearUp: () => void;
}

/** How a daemon is started. @hidden */
export interface SpawnSettings {
  socketPath: string | undefined;
  takeover: boolean;
  confine: string;
  executable: string | undefined;
  timeout: number;
}

/**
 * Where the executable is: what `USERFAULTFD_PAGERD` names, else beside the addon.
 *
 * @throws {@linkcode UffdError} `ERR_UFFD_UNSUPPORTED_PLATFORM`
 * @hidden
 */
export function executablePath(): string {
  const named = process.env['USERFAULTFD_PAGERD'];
  if (named !== undefined && named !== '') return named;
  const require = createRequire(import.meta.url);
  const libc = isMusl() ? 'musl' : 'gnu';
  const places = [join(dirname(require.resolve('#native')), NAME)];
  try {
    const found = require.resolve(`@userfaultfd/binding-linux-${process.arch}-${libc}/package.json`);
    places.push(join(dirname(found), NAME));
  } catch {
    // Not installed: the other place may have it.
  }
  const place = places.find(path => existsSync(path));
  if (place !== undefined) return place;
  throw new UffdError(
    'ERR_UFFD_UNSUPPORTED_PLATFORM',
    `no ${NAME} for linux-${process.arch}-${libc} is installed`,
    {
      hint: 'Install with optional dependencies; from a checkout, run `npm run build`. USERFAULTFD_PAGERD may name another.',
    },
  );
}

function isMusl(): boolean {
  const report = process.report.getReport() as unknown as { header: { glibcVersionRuntime?: string } };
  return report.header.glibcVersionRuntime === undefined;
}

/**
 * Starts a daemon that outlives this process, and waits until it can be connected to.
 *
 * @throws {@linkcode UffdError} `ERR_UFFD_SOCKET` (it did not start; the message is what it said), `ERR_UFFD_TIMEOUT`
 * @hidden
 */
export async function startDaemon(settings: SpawnSettings): Promise<Started> {
  const executable = settings.executable ?? executablePath();
  const own =
    settings.socketPath === undefined ? mkdtempSync(join(tmpdir(), 'userfaultfd-pagerd-')) : undefined;
  const socket = settings.socketPath ?? join(own ?? '', 'pager.sock');
  const removeOwn = (): void => {
    if (own !== undefined) rmSync(own, { recursive: true, force: true });
  };
  const args = [
    '--socket',
    socket,
    '--takeover',
    settings.takeover ? 'on' : 'off',
    '--confine',
    settings.confine,
  ];
  // A group and session of its own: an interrupt at this terminal is not meant for what it serves. What it has to say later
  // goes where this program's own words go, also when this program is gone.
  const child = spawn(executable, args, { detached: true, stdio: ['ignore', 'pipe', 'inherit'] });
  const ended = once(child, 'close').then(([code]) => {
    // Where it was killed, its daemon goes on and is reached there.
    if (code !== null) removeOwn();
  });
  const late = AbortSignal.timeout(settings.timeout);
  try {
    const failed = once(child, 'error', { signal: late });
    const line = once(createInterface({ input: child.stdout }), 'line', { signal: late });
    // Only one of them is waited for.
    for (const other of [failed, line, ended]) other.catch(() => {});
    const [said] = (await Promise.race([line, failed, ended.then(() => [NOTHING])])) as [string | Error];
    if (said instanceof Error) throw said;
    const ready = JSON.parse(said) as Ready & { error?: string };
    if (ready.error !== undefined) throw new Error(ready.error);
    const made = statSync(socket, { throwIfNoEntry: false });
    const clearUp = (): void => {
      const there = statSync(socket, { throwIfNoEntry: false });
      // Somebody may listen there by now.
      if (there !== undefined && there.ino === made?.ino && there.dev === made.dev) rmSync(socket);
      removeOwn();
    };
    return { ...ready, ended, clearUp };
  } catch (cause) {
    child.kill('SIGKILL');
    removeOwn();
    if (late.aborted) {
      throw new UffdError('ERR_UFFD_TIMEOUT', `the daemon was not ready within ${settings.timeout} ms`);
    }
    const why = (cause as Error).message;
    throw new UffdError('ERR_UFFD_SOCKET', `the daemon ${executable} did not start: ${why}`, { cause });
  } finally {
    child.unref();
    (child.stdout as unknown as { unref(): void }).unref();
  }
}

const NOTHING = '{"error":"it ended without a word"}';
