/**
 * Exports what sessions count and measure to Prometheus: memory that comes from a file, and an HTTP server with
 * `/metrics`, which this program scrapes once itself.
 */

import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { once } from 'node:events';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { Registry } from 'prom-client';
import { fileSource, KiB, MemoryMapping, MiB, Pager } from 'userfaultfd';

import { whyNoUserfaultfd } from './support/machine.js';
import { registerUserfaultfd } from './support/metrics.js';

const SIZE = 16 * MiB;

async function main(): Promise<void> {
  const registry = new Registry();
  registerUserfaultfd(registry);
  const server = createServer((_, response) => {
    void registry.metrics().then(text => response.setHeader('content-type', registry.contentType).end(text));
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');

  const folder = mkdtempSync(join(tmpdir(), 'userfaultfd-'));
  const path = join(folder, 'image');
  writeFileSync(path, Buffer.alloc(SIZE, 'every page has something in it; '));
  const pager = Pager.create();
  const mapping = MemoryMapping.anonymous(SIZE);
  try {
    const session = await pager.serve(mapping, { source: fileSource(path) });
    for (let offset = 0; offset < SIZE / 2; offset += 256 * KiB) await mapping.read(offset, 1);
    await session.close({ rest: 'zero' });

    const { port } = server.address() as AddressInfo;
    const scraped = await fetch(`http://127.0.0.1:${port}/metrics`);
    process.stdout.write(await scraped.text());
  } finally {
    await pager.close();
    mapping.close();
    server.close();
    rmSync(folder, { recursive: true, force: true });
  }
}

const problem = whyNoUserfaultfd();
if (problem === undefined) {
  await main();
} else {
  process.stdout.write(`${problem}\n`);
  process.exitCode = 1;
}
