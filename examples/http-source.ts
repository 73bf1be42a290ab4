/**
 * Memory that comes over HTTP: a server that answers range requests (here in the same program; an object store does the
 * same), and pages that are fetched when they are touched, several at a time, each once.
 *
 *     node out/examples/http-source.js
 */

import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import process from 'node:process';

import { callbackSource, KiB, MemoryMapping, MiB, Pager } from 'userfaultfd';

const SIZE = 8 * MiB;
const CHUNK = 256 * KiB;

/** Serves `image`, in ranges, to this machine. One request in ten fails, as they do. */
async function serve(image: Buffer): Promise<{ server: Server; url: URL; requests: () => number }> {
  let count = 0;
  const server = createServer((request, response) => {
    count += 1;
    const [, first, last] = /^bytes=(\d+)-(\d+)$/.exec(request.headers.range ?? '') ?? [];
    if (count % 10 === 0 || first === undefined || last === undefined) {
      response.writeHead(503).end();
      return;
    }
    const part = image.subarray(Number(first), Number(last) + 1);
    response.writeHead(206, {
      'content-length': part.length,
      'content-range': `bytes ${first}-${last}/${image.length}`,
    });
    response.end(part);
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as AddressInfo;
  return { server, url: new URL(`http://127.0.0.1:${port}/image`), requests: () => count };
}

const image = Buffer.alloc(SIZE);
for (let at = 0; at < SIZE; at += 4) image.writeUInt32LE(at, at);
const { server, url, requests } = await serve(image);

const source = callbackSource(
  async (offset, length, { signal }) => {
    const range = `bytes=${offset}-${offset + length - 1}`;
    const response = await fetch(url, { headers: { range }, signal });
    if (response.status !== 206) throw new Error(`${url.href}, ${range}: status ${response.status}`);
    return new Uint8Array(await response.arrayBuffer());
  },
  { size: SIZE, chunk: CHUNK, concurrency: 4, retries: 5 },
);
await using pager = Pager.create();
const mapping = MemoryMapping.anonymous(SIZE);
const session = await pager.serve(mapping, { source });

const some = await mapping.read(5 * MiB, 4);
process.stdout.write(`at 5 MiB there is ${some.readUInt32LE()}, after ${requests()} request\n`);
const all = await mapping.read(0, SIZE);
const digest = (bytes: Uint8Array): string => createHash('sha256').update(bytes).digest('hex');
process.stdout.write(`all of it is ${digest(all) === digest(image) ? 'the same' : 'NOT the same'}\n`);
process.stdout.write(`${SIZE / CHUNK} chunks took ${requests()} requests\n`);

await session.close({ rest: 'zero' });
source.close();
mapping.close();
server.close();
