import { randomUUID } from 'node:crypto';
import { closeSync } from 'node:fs';
import { createConnection, type Socket } from 'node:net';

import { sendFds } from './descriptors.js';
import { UffdError, type UffdErrorCode } from './errors.js';
import { withResolvers } from './limits.js';
import type { Upgraded } from './remote-upgrade.js';

/** What this speaks. */
const PROTOCOL = 1;
/** Characters of a line: more is no daemon's. */
const LONGEST_LINE = 64 * 1024 * 1024;

/** What a daemon says of itself when it is greeted. @hidden */
export interface Welcome {
  version: string;
  pid: number;
  holder: number | null;
  takeover: boolean;
  /** How many daemons there were. Absent where the daemon is too old to say, as is the next. */
  epoch?: number;
  /** How the last upgrades ended; of a holder that is too old to say, nothing. */
  upgrades?: Upgraded[] | null;
  sessions: Record<string, unknown>[];
  /** Those that are not announced yet. */
  pending?: number[];
  servers: { id: number; socketPath: string; owner: string }[];
  ends: Record<string, unknown>[];
  /** Those that are over, and in no file. Absent where the daemon is too old to record. */
  recordings?: Record<string, unknown>[];
}

/** Who hears what a daemon says without having been asked. @hidden */
export interface Listening {
  told(method: string, params: Record<string, unknown>): void;
  /** Nothing more comes. */
  lost(): void;
}

interface Waiting {
  resolve: (result: Record<string, unknown>) => void;
  reject: (error: unknown) => void;
}

interface Reply {
  id?: number | null;
  method?: string;
  params?: Record<string, unknown>;
  result?: Record<string, unknown>;
  error?: { code: number; message: string; data?: { code: string; errno?: number; syscall?: string } };
}

/**
 * One connection to a daemon: JSON-RPC 2.0, one object a line, descriptors riding with the first byte of the line that says
 * how many it has (docs/protocol.md). @hidden
 */
export class Connection {
  readonly #socket: Socket;
  readonly #listening: Listening;
  readonly #waiting = new Map<number, Waiting>();
  #last = 0;
  #said = '';
  #sending: Promise<void> = Promise.resolve();
  #lost = false;

  private constructor(socket: Socket, listening: Listening) {
    this.#socket = socket;
    this.#listening = listening;
    socket.setEncoding('utf8').on('data', (piece: string) => this.#receive(piece));
    socket.on('close', () => this.#end());
    // Its end says the same.
    socket.on('error', () => {});
    socket.unref();
  }

  /** A name that a client has over all its connections. */
  static token(): string {
    return randomUUID();
  }

  /**
   * Connects and says hello.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_SOCKET` (nobody listens there), `ERR_UFFD_UNSUPPORTED` (another protocol),
   *   `ERR_UFFD_PEER_NOT_ALLOWED`, `ERR_UFFD_PROTOCOL` (no daemon)
   */
  static async open(
    path: string,
    hello: { client: string; sessions: number[]; sources: number[] },
    listening: Listening,
  ): Promise<{ connection: Connection; welcome: Welcome }> {
    const socket = createConnection(path);
    const { promise: connected, resolve, reject } = withResolvers<void>();
    socket.once('connect', resolve).once('error', (error: NodeJS.ErrnoException) => {
      const details = {
        errno: Math.abs(error.errno ?? 0),
        syscall: 'connect',
        hint: `Is a daemon listening at ${path}?`,
      };
      reject(
        new UffdError('ERR_UFFD_SOCKET', `no daemon can be reached at ${path}: ${error.message}`, details),
      );
    });
    await connected;
    const connection = new Connection(socket, listening);
    try {
      const welcome = await connection.request('hello', {
        protocol: PROTOCOL,
        version: '1',
        recordings: true,
        ...hello,
      });
      return { connection, welcome: readWelcome(path, welcome) };
    } catch (error) {
      connection.close();
      throw error;
    }
  }

  /** Asks for something. Descriptors that are `owned` are closed here once they are sent, or cannot be. */
  async request(
    method: string,
    params: object,
    fds: readonly number[] = [],
    owned = true,
  ): Promise<Record<string, unknown>> {
    this.#last += 1;
    const id = this.#last;
    const { promise, ...waiting } = withResolvers<Record<string, unknown>>();
    if (this.#lost) {
      if (owned) closeAll(fds);
      throw lost();
    }
    this.#waiting.set(id, waiting);
    this.#socket.ref();
    this.#send({ jsonrpc: '2.0', id, method, params, fds: fds.length }, fds, owned);
    return promise;
  }

  /** Says something that has no answer. */
  tell(method: string, params: object, fds: readonly number[] = []): void {
    this.#send({ jsonrpc: '2.0', method, params, fds: fds.length }, fds, true);
  }

  close(): void {
    this.#socket.destroy();
    this.#end();
  }

  #send(message: object, fds: readonly number[], owned: boolean): void {
    const line = `${JSON.stringify(message)}\n`;
    this.#sending = this.#sending.then(async () => {
      try {
        if (this.#lost) return;
        if (fds.length === 0) {
          this.#socket.write(line);
          return;
        }
        // What was written before has to be in the kernel first.
        if (this.#socket.writableLength > 0) {
          await new Promise(resolve => {
            this.#socket.write('', resolve);
          });
        }
        await sendFds(fdOf(this.#socket), fds, Buffer.from(line));
      } catch {
        // The connection is of no use after half a line; its end is what everybody hears.
        this.#socket.destroy();
      } finally {
        if (owned) closeAll(fds);
      }
    });
  }

  #receive(piece: string): void {
    this.#said += piece;
    if (this.#said.length > LONGEST_LINE) this.#socket.destroy();
    const lines = this.#said.split('\n');
    this.#said = lines.pop() ?? '';
    for (const line of lines) this.#take(line);
  }

  #take(line: string): void {
    let reply: Reply;
    try {
      reply = JSON.parse(line) as Reply;
    } catch {
      // Whoever this is, it is no daemon.
      this.#socket.destroy();
      return;
    }
    if (reply.method !== undefined) {
      this.#listening.told(reply.method, reply.params ?? {});
      return;
    }
    // Who is not let in is told without having asked: nothing else is without a number.
    const id = reply.id ?? Math.min(...this.#waiting.keys());
    const waiting = this.#waiting.get(id);
    this.#waiting.delete(id);
    if (this.#waiting.size === 0) this.#socket.unref();
    if (reply.error) waiting?.reject(errorOf(reply.error));
    else waiting?.resolve(reply.result ?? {});
  }

  #end(): void {
    if (this.#lost) return;
    this.#lost = true;
    for (const waiting of this.#waiting.values()) waiting.reject(lost());
    this.#waiting.clear();
    this.#listening.lost();
  }
}

/** Makes sure that it is a daemon which has answered, and one that speaks the same. */
function readWelcome(path: string, answer: Record<string, unknown>): Welcome {
  const { protocol, pid, sessions, servers, ends } = answer;
  const isDaemon =
    typeof pid === 'number' && Array.isArray(sessions) && Array.isArray(servers) && Array.isArray(ends);
  if (!isDaemon) {
    throw new UffdError('ERR_UFFD_PROTOCOL', `what listens at ${path} is no userfaultfd-pagerd`);
  }
  if (protocol !== PROTOCOL) {
    throw new UffdError(
      'ERR_UFFD_UNSUPPORTED',
      `the daemon at ${path} speaks protocol ${String(protocol)}, and this package ${PROTOCOL}: use versions that go together`,
    );
  }
  return answer as unknown as Welcome;
}

/** @hidden What a request comes to whose daemon went away. */
export function lost(): UffdError {
  return new UffdError('ERR_UFFD_PAGER_LOST', 'the connection to the daemon was lost before it answered');
}

/** The connection's own words have no code of this package. */
function errorOf({ code, message, data }: NonNullable<Reply['error']>): UffdError {
  if (data) return new UffdError(data.code as UffdErrorCode, message, data);
  const hint = code === -32601 ? 'The daemon is older than this package.' : undefined;
  return new UffdError('ERR_UFFD_PROTOCOL', `the daemon refused: ${message} (${code})`, { hint });
}

function closeAll(fds: readonly number[]): void {
  for (const fd of fds) closeSync(fd);
}

/** The descriptor of a socket. */
function fdOf(socket: Socket): number {
  // oxlint-disable-next-line no-underscore-dangle -- Node has no public name for it
  return (socket as unknown as { _handle?: { fd: number } })._handle?.fd ?? -1;
}
