const { bufferSource, capabilities, KiB, MemoryMapping, Pager } = require('userfaultfd');

async function main() {
  const pager = Pager.create();
  const mapping = MemoryMapping.anonymous(64 * KiB);
  const session = await pager.serve(mapping, { source: bufferSource(new Uint8Array(64 * KiB).fill(7)) });
  const same = mapping.view(0, 64 * KiB).every(byte => byte === 7);
  const { faults } = session.stats();
  await pager.close();
  mapping.close();
  if (!same || !(faults > 0)) throw new Error(`wrong: ${same}, ${faults} faults`);
  console.log(JSON.stringify({ faults, kind: capabilities().faults }));
}

void main();
