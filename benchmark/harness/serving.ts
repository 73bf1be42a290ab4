/**
 * The package as a handler: takes the memory of one process as Firecracker hands it over, as `floor/serve.c` does, with the same
 * words about it.
 *
 *     node serving.js SOCKET IMAGE OPTIONS
 */

import {
  type AdoptOptions,
  type AdoptRegion,
  bufferSource,
  fileSource,
  type FirecrackerServerOptions,
  Pager,
  serveFirecracker,
  type Session,
  Userfaultfd,
} from 'userfaultfd';

import { listen, say } from './handed.js';

/** What this program can be told; JSON. */
export interface ServingOptions {
  window?: number;
  /** Adopts the userfaultfd with these modes, in place of the server. */
  modes?: AdoptOptions['modes'];
  /** The image's bytes in memory (`bufferSource`) in place of the file. */
  buffered?: boolean;
  /** Populates before it says `session`. */
  populate?: 'before';
  /** Says `session` when what is replayed has come. */
  replayed?: boolean;
  /** Populates so many bytes from the beginning, from when it says `session` on; then it says `populated`. */
  populateFirst?: number;
  /** Processes to serve, each of which gets a `session` of its own. Default: 1. */
  peers?: number;
  /** Other options of the server. */
  server?: Partial<FirecrackerServerOptions>;
}

async function source(path: string, buffered: boolean | undefined): Promise<AdoptOptions['source']> {
  if (buffered !== true) return fileSource(path);
  const { readFile } = await import('node:fs/promises');
  return bufferSource(await readFile(path));
}

/** Gives one session after the other. */
type Accept = () => Promise<Session>;

async function serve(socketPath: string, image: string, options: ServingOptions): Promise<Accept> {
  const memory = await source(image, options.buffered);
  const window = options.window === undefined ? {} : { window: options.window };
  if (options.modes === undefined) {
    const server = await serveFirecracker({ socketPath, memory, ...window, ...options.server });
    say({ event: 'listening' });
    return async () => server.accept();
  }
  const given = { source: memory, modes: options.modes, ...window };
  const handed = await listen(socketPath);
  return async () => {
    const { uffd, memfd, regions: told } = await handed();
    const regions = told.map((region): AdoptRegion => {
      const place = {
        address: BigInt(region.base_host_virt_addr),
        length: region.size,
        sourceOffset: region.offset,
      };
      return memfd === undefined ? place : { ...place, memfdOffset: region.offset };
    });
    const shared = memfd === undefined ? {} : { memfd };
    return Pager.create().adopt(Userfaultfd.adopt(uffd), { ...given, ...shared, regions });
  };
}

const [socketPath = '', image = '', json = '{}'] = process.argv.slice(2);
const options = JSON.parse(json) as ServingOptions;
const accept = await serve(socketPath, image, options);
process.stdin.once('close', () => process.exit()).resume();
for (let left = options.peers ?? 1; left > 0; left -= 1) {
  const session = await accept();
  const start = process.hrtime.bigint();
  const since = (): number => Number(process.hrtime.bigint() - start);
  if (options.populate === 'before') await session.populate();
  if (options.replayed === true) await session.replayed();
  if (options.populateFirst !== undefined) {
    const [region] = session.regions;
    if (region === undefined) throw new Error('a session without memory');
    const ranges = [{ address: region.address, length: options.populateFirst }];
    const told = (): void => say({ event: 'populated', ns: since() });
    // Where the process has ended first, it was under way all the time: as it should be.
    void session.populate({ ranges }).then(told, () => {});
  }
  say({ event: 'session', ns: since() + session.filledIn * 1e6 });
}
