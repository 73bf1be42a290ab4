/**
 * What Firecracker's API server does, to the byte, with `userfaultfd-peer` as the process whose memory is restored: it connects,
 * hands its memory over and faults on it before it answers `PUT /snapshot/load`.
 */

import { mkdirSync } from 'node:fs';
import { createServer, type Server, type Socket } from 'node:net';
import { dirname, join } from 'node:path';
import { once } from 'node:events';

import type { ExecutionContext } from 'ava';

import { Peer } from '../../examples/support/peer.js';
import { folder, IMAGE_SIZE } from './serving.js';

/** One request as it arrived. */
export interface ApiRequest {
  line: string;
  headers: string[];
  body: string;
}

/** What is answered: bytes; or nothing, and the connection stays open. */
export type Behaviour = (request: ApiRequest, socket: Socket) => Promise<string | undefined>;

/** The two answers there are. */
export const NO_CONTENT = 'HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n';
export function badRequest(fault: string): string {
  const body = JSON.stringify({ fault_message: fault });
  return `HTTP/1.1 400 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\nContent-Type: application/json\r\nContent-Length: ${body.length}\r\n\r\n${body}`;
}

/** A Firecracker that has been started and has not loaded anything. */
export class FakeFirecracker {
  readonly requests: ApiRequest[] = [];
  readonly apiSocket: string;
  readonly #t: ExecutionContext;
  readonly #jailRoot: string;
  readonly #server: Server;
  readonly #sockets = new Set<Socket>();
  #peer: Peer | undefined;
  /** What it does when it is asked to load a snapshot. */
  onLoad: Behaviour = async request => {
    await this.connect(request);
    // The device model touches guest memory before the load call returns.
    await this.peer.ask('read', 0, 8);
    return NO_CONTENT;
  };
  /** What it does when it is asked to pause or to go on. */
  onState: Behaviour = async () => NO_CONTENT;

  private constructor(t: ExecutionContext, jailRoot: string) {
    this.#t = t;
    this.#jailRoot = jailRoot;
    this.apiSocket = join(jailRoot === '' ? folder(t) : jailRoot, 'run', 'firecracker.socket');
    mkdirSync(dirname(this.apiSocket));
    this.#server = createServer(socket => this.#talk(socket));
    t.teardown(() => this.exit());
  }

  /** Starts it; with `jailRoot`, it sees that as `/`. */
  static async start(t: ExecutionContext, jailRoot = ''): Promise<FakeFirecracker> {
    const firecracker = new FakeFirecracker(t, jailRoot);
    firecracker.#server.listen(firecracker.apiSocket);
    await once(firecracker.#server, 'listening');
    return firecracker;
  }

  /** The process whose memory is restored. */
  get peer(): Peer {
    if (this.#peer === undefined) throw new Error('nothing has been loaded');
    return this.#peer;
  }

  /** Hands over memory to the socket that the request names. */
  async connect({ body }: ApiRequest, ...args: string[]): Promise<Peer> {
    const { mem_backend: backend } = JSON.parse(body) as { mem_backend: { backend_path: string } };
    const peer = new Peer([
      '--socket',
      join(this.#jailRoot, backend.backend_path),
      '--region',
      `${IMAGE_SIZE}`,
      ...args,
    ]);
    this.#peer = peer;
    this.#t.teardown(async () => {
      peer.kill();
      await peer.ended;
    });
    await peer.ready();
    // It obeys commands once its handshake is sent.
    await peer.ask('resident');
    return peer;
  }

  /** The process ends, and its API with it. */
  exit(): void {
    this.#peer?.kill();
    this.#server.close();
    for (const socket of this.#sockets) socket.destroy();
  }

  #talk(socket: Socket): void {
    this.#sockets.add(socket);
    socket.on('close', () => this.#sockets.delete(socket));
    // Who asked may have given up.
    socket.on('error', () => {});
    let said = '';
    socket.setEncoding('utf8').on('data', (piece: string) => {
      said += piece;
      const [head = '', body] = said.split('\r\n\r\n');
      const length = Number(/^content-length: (\d+)$/im.exec(head)?.[1] ?? 0);
      if (body === undefined || Buffer.byteLength(body) < length) return;
      said = '';
      const [line = '', ...headers] = head.split('\r\n');
      const request = { line, headers, body };
      this.requests.push(request);
      const behaviour = line.startsWith('PUT /snapshot/load ') ? this.onLoad : this.onState;
      void behaviour(request, socket).then(answer => {
        if (answer !== undefined) socket.write(answer);
      });
    });
  }
}
