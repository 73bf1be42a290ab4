import { bufferSource, capabilities, KiB, MemoryMapping, Pager, UffdError } from 'userfaultfd';

const LENGTH = 256 * KiB;
const image = new Uint8Array(LENGTH).map((_, index) => index % 251);
const pager = Pager.create();
const mapping = MemoryMapping.anonymous(LENGTH);
const session = await pager.serve(mapping, { source: bufferSource(image) });
const view = mapping.view(0, LENGTH); // touching it is a page fault
const same = view.every((byte, index) => byte === image[index]);
const { faults } = session.stats();
await pager.close();
mapping.close();
if (!same || !(faults > 0) || !(UffdError.prototype instanceof Error))
  throw new Error(`wrong: ${same}, ${faults} faults`);
console.log(JSON.stringify({ faults, kind: capabilities().faults }));
