import { request } from 'node:http';
import { constants } from 'node:os';

import { UffdError } from './errors.js';

/** Far more than Firecracker says about any mistake. */
const LONGEST_ANSWER = 64 * 1024;

/** @hidden Whether the connection broke off before there was an answer: what happens when the process is gone. */
export function brokeOff(error: unknown): boolean {
  const { ECONNRESET, EPIPE } = constants.errno;
  return error instanceof UffdError && (error.errno === ECONNRESET || error.errno === EPIPE);
}

/**
 * @hidden One request to Firecracker's API. Resolves when it says that it is done.
 *
 * @throws {@linkcode UffdError} `ERR_UFFD_API`: with what it answered as `cause`; or with `errno`, where it could not be
 * asked. The signal's reason when it aborts.
 */
export async function callApi(
  apiSocket: string,
  method: 'PUT' | 'PATCH',
  path: string,
  body: object,
  signal: AbortSignal,
): Promise<void> {
  signal.throwIfAborted();
  const text = JSON.stringify(body);
  const headers = {
    Accept: 'application/json',
    'Content-Type': 'application/json',
    'Content-Length': Buffer.byteLength(text),
  };
  const what = `${method} ${path}`;
  const asked = new Promise<{ status: number; answer: string }>((resolve, reject) => {
    const failed = (error: NodeJS.ErrnoException): void => reject(unanswered(what, apiSocket, error));
    const asking = request({ socketPath: apiSocket, method, path, headers, agent: false, signal });
    asking.on('error', failed);
    asking.on('response', response => {
      let said = '';
      response.setEncoding('utf8');
      response.on('error', failed);
      response.on('data', (piece: string) => {
        said = (said + piece).slice(0, LONGEST_ANSWER);
      });
      response.on('end', () => resolve({ status: response.statusCode ?? 0, answer: said }));
    });
    asking.end(text);
  });
  const { status, answer } = await asked.catch((error: unknown) => {
    signal.throwIfAborted();
    throw error;
  });
  if (status >= 200 && status < 300) return;
  const fault = faultOf(answer);
  throw new UffdError('ERR_UFFD_API', `Firecracker refused ${what} (status ${status}): ${fault}`, {
    cause: new Error(fault),
  });
}

function unanswered(what: string, apiSocket: string, error: NodeJS.ErrnoException): UffdError {
  return new UffdError('ERR_UFFD_API', `${what} at ${apiSocket}: ${error.message}`, {
    errno: errnoOf(error),
    syscall: error.syscall,
    cause: error,
    hint: 'Firecracker must be running, with this API socket (--api-sock), and not have loaded anything before.',
  });
}

/** Positive, as everywhere here. A connection that broke off has a code, but no number of its own. */
function errnoOf(error: NodeJS.ErrnoException): number | undefined {
  if (error.errno !== undefined) return Math.abs(error.errno);
  return error.code === 'ECONNRESET' ? constants.errno.ECONNRESET : undefined;
}

/** What Firecracker gives as the reason: its `fault_message`, or all it said. */
function faultOf(answer: string): string {
  try {
    const { fault_message: fault } = JSON.parse(answer) as { fault_message?: unknown };
    if (typeof fault === 'string') return fault;
  } catch {
    // Not JSON: whoever answers there is no Firecracker, and is quoted as it is.
  }
  return answer === '' ? 'no reason given' : answer;
}
