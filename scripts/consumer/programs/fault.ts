import {
  bufferSource,
  capabilities,
  type Capabilities,
  KiB,
  MemoryMapping,
  Pager,
  type Session,
  type UffdErrorCode,
} from 'userfaultfd';

const code: UffdErrorCode = 'ERR_UFFD_SOURCE';
const pager: Pager = Pager.create();
const mapping: MemoryMapping = MemoryMapping.anonymous(64 * KiB);
const session: Session = await pager.serve(mapping, {
  source: bufferSource(new TextEncoder().encode(code.padEnd(64 * KiB))),
});
const text: string = (await mapping.read(0, code.length)).toString('latin1');
const faults: number = session.stats().faults;
await pager.close();
mapping.close();
if (text !== code || !(faults > 0)) throw new Error(`wrong: ${text}, ${faults} faults`);
const kind: Capabilities['faults'] = capabilities().faults;
console.log(JSON.stringify({ faults, kind }));
