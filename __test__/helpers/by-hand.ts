/** Speaks a daemon's protocol without the package's client. */

import { once } from 'node:events';
import { createConnection, type Socket } from 'node:net';
import { createInterface } from 'node:readline';

type Answer = { id?: number; result?: Record<string, unknown>; error?: { message: string } };

/** A connection that has said hello. */
export class ByHand {
  readonly #socket: Socket;
  readonly #waiting = new Map<number, (answer: Answer) => void>();
  #last = 0;
  /** What the daemon has answered to hello. */
  hello: Record<string, unknown> = {};

  private constructor(socket: Socket) {
    this.#socket = socket;
    createInterface({ input: socket }).on('line', line => {
      const answer = JSON.parse(line) as Answer;
      this.#waiting.get(answer.id ?? -1)?.(answer);
    });
    const lost = (): void => {
      for (const answer of this.#waiting.values()) answer({ error: { message: 'the connection was lost' } });
    };
    socket.on('error', lost).on('close', lost);
  }

  static async connect(path: string): Promise<ByHand> {
    const socket = createConnection(path);
    await once(socket, 'connect');
    const connection = new ByHand(socket);
    connection.hello = await connection.ask('hello', { protocol: 1, client: 'by hand', sessions: [] });
    return connection;
  }

  async ask(method: string, params: object): Promise<Record<string, unknown>> {
    this.#last += 1;
    const id = this.#last;
    const answer = await new Promise<Answer>(resolve => {
      this.#waiting.set(id, resolve);
      this.#socket.write(`${JSON.stringify({ jsonrpc: '2.0', id, method, params })}\n`);
    });
    this.#waiting.delete(id);
    if (answer.error) throw new Error(answer.error.message);
    return answer.result ?? {};
  }

  close(): void {
    this.#socket.destroy();
  }
}
