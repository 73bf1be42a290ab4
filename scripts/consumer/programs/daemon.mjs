// The pager in a process of its own, as it is installed.
import { once } from 'node:events';
import { KiB, MemoryMapping, PagerClient, bufferSource } from 'userfaultfd';

const LENGTH = 256 * KiB;
const image = new Uint8Array(LENGTH).map((_, index) => index % 251);
const pager = await PagerClient.spawn();
const mapping = MemoryMapping.anonymous(LENGTH);
const session = await pager.serve(mapping, { source: bufferSource(image) });
const bytes = await mapping.read(0, LENGTH);
const same = bytes.every((byte, index) => byte === image[index]);
const ended = once(pager, 'close');
await session.close();
await pager.close();
await ended;
mapping.close();
const { faults } = session.stats();
if (!same || !(faults > 0)) throw new Error(`wrong: ${same}, ${faults} faults`);
console.log(JSON.stringify({ faults, kind: 'daemon' }));
