// Types: what a program can write, and what the compiler must refuse. The compiler is the test; a title stands for what it
// has accepted.

import test from 'ava';
import { expectTypeOf } from 'expect-type';
import {
  type AddressRange,
  type Backend,
  capabilities,
  type Capabilities,
  type CopyOptions,
  type CreateOptions,
  type EventBatch,
  type FailurePolicy,
  type FaultEvent,
  type FaultKind,
  type Feature,
  type ForkEvent,
  type Ioctl,
  type MappingRange,
  type MemoryMapping,
  type MemoryRange,
  onExit,
  type OrBit,
  type PageKind,
  receiveFds,
  type ReceivedFds,
  type RegisterMode,
  type RemapEvent,
  type RemoveEvent,
  type Residency,
  type Rest,
  type SessionEndReason,
  type UffdError,
  type UffdErrorCode,
  type UffdErrorKind,
  type UffdEvent,
  type UnknownEvent,
  type Userfaultfd,
  type UserfaultfdFactory,
  type WrittenPages,
} from 'userfaultfd';

test('features, modes and ioctls are literal unions of the kernel’s names', t => {
  expectTypeOf<Feature>().toEqualTypeOf<
    | 'pagefault-flag-wp'
    | 'event-fork'
    | 'event-remap'
    | 'event-remove'
    | 'missing-hugetlbfs'
    | 'missing-shmem'
    | 'event-unmap'
    | 'sigbus'
    | 'thread-id'
    | 'minor-hugetlbfs'
    | 'minor-shmem'
    | 'exact-address'
    | 'wp-hugetlbfs-shmem'
    | 'wp-unpopulated'
    | 'poison'
    | 'wp-async'
    | 'move'
  >();
  expectTypeOf<RegisterMode>().toEqualTypeOf<'missing' | 'write-protect' | 'minor'>();
  expectTypeOf<Ioctl>().toEqualTypeOf<
    | 'register'
    | 'unregister'
    | 'wake'
    | 'copy'
    | 'zeropage'
    | 'move'
    | 'writeprotect'
    | 'continue'
    | 'poison'
    | 'api'
  >();
  expectTypeOf<OrBit<'a'>>().toEqualTypeOf<'a' | `bit-${number}`>();
  expectTypeOf<CreateOptions['require']>().toEqualTypeOf<readonly Feature[] | undefined>();
  expectTypeOf<Userfaultfd['enabledFeatures']>().toEqualTypeOf<readonly OrBit<Feature>[] | undefined>();
  t.pass();
});

test('events are told apart by their type, and have the fields of their kind', t => {
  expectTypeOf<UffdEvent['type']>().toEqualTypeOf<
    'fault' | 'fork' | 'remap' | 'remove' | 'unmap' | 'unknown'
  >();
  expectTypeOf<FaultKind>().toEqualTypeOf<'missing' | 'write-protect' | 'minor'>();
  expectTypeOf<Extract<UffdEvent, { type: 'fault' }>>().toEqualTypeOf<FaultEvent>();
  expectTypeOf<Extract<UffdEvent, { type: 'fork' }>>().toEqualTypeOf<ForkEvent>();
  expectTypeOf<Extract<UffdEvent, { type: 'remap' }>>().toEqualTypeOf<RemapEvent>();
  expectTypeOf<Extract<UffdEvent, RemoveEvent>>().toEqualTypeOf<RemoveEvent>();
  expectTypeOf<Extract<UffdEvent, { type: 'unknown' }>>().toEqualTypeOf<UnknownEvent>();
  expectTypeOf<FaultEvent['address']>().toEqualTypeOf<bigint>();
  expectTypeOf<FaultEvent['threadId']>().toEqualTypeOf<number | undefined>();
  expectTypeOf<ForkEvent['child']>().toEqualTypeOf<Userfaultfd>();
  expectTypeOf<EventBatch['type']>().returns.toEqualTypeOf<UffdEvent['type']>();
  expectTypeOf<Userfaultfd['events']>().returns.toEqualTypeOf<AsyncGenerator<UffdEvent[], void, undefined>>();
  t.pass();
});

test('codes and kinds of errors are literal unions', t => {
  expectTypeOf<UffdErrorCode>().toEqualTypeOf<
    | 'ERR_UFFD_API'
    | 'ERR_UFFD_CHANGING'
    | 'ERR_UFFD_CLONE'
    | 'ERR_UFFD_CLOSED'
    | 'ERR_UFFD_EXHAUSTED'
    | 'ERR_UFFD_FAULTS_WAITING'
    | 'ERR_UFFD_IN_USE'
    | 'ERR_UFFD_NOT_PERMITTED'
    | 'ERR_UFFD_NOT_REGISTERED'
    | 'ERR_UFFD_PAGE_EXIST'
    | 'ERR_UFFD_PAGER_LOST'
    | 'ERR_UFFD_PAGES_MISSING'
    | 'ERR_UFFD_PARTIALLY_COPIED'
    | 'ERR_UFFD_PEER_NOT_ALLOWED'
    | 'ERR_UFFD_PROTOCOL'
    | 'ERR_UFFD_REGION'
    | 'ERR_UFFD_SOCKET'
    | 'ERR_UFFD_SOURCE'
    | 'ERR_UFFD_STALE'
    | 'ERR_UFFD_SYSTEM'
    | 'ERR_UFFD_TIMEOUT'
    | 'ERR_UFFD_TRACE'
    | 'ERR_UFFD_TRACE_IMAGE'
    | 'ERR_UFFD_UNANSWERED'
    | 'ERR_UFFD_UNSUPPORTED'
    | 'ERR_UFFD_UNSUPPORTED_PLATFORM'
    | 'ERR_UFFD_USE_AFTER_CLOSE'
    | 'ERR_UFFD_WOULD_DEADLOCK'
  >();
  expectTypeOf<UffdErrorKind>().toEqualTypeOf<
    | 'PageExist'
    | 'UffdClosed'
    | 'PartiallyCopied'
    | 'Clone'
    | 'Userfaultfd'
    | 'Changing'
    | 'NotRegistered'
    | 'NotPermitted'
    | 'Unsupported'
    | 'UseAfterClose'
  >();
  expectTypeOf<UffdError['code']>().toEqualTypeOf<UffdErrorCode>();
  expectTypeOf<UffdError['kind']>().toEqualTypeOf<UffdErrorKind | undefined>();
  expectTypeOf<UffdError['done']>().toEqualTypeOf<number | undefined>();
  t.pass();
});

test('the other choices are literal unions, too', t => {
  expectTypeOf<Backend>().toEqualTypeOf<'device' | 'syscall'>();
  expectTypeOf<Residency>().toEqualTypeOf<'absent' | 'cached' | 'noted' | 'present'>();
  expectTypeOf<PageKind>().toEqualTypeOf<'ordinary' | 'small' | 'transparent' | number>();
  expectTypeOf<FailurePolicy>().toEqualTypeOf<'poison' | 'kill' | 'hold'>();
  expectTypeOf<Rest>().toEqualTypeOf<'populate' | 'poison' | 'zero'>();
  expectTypeOf<CreateOptions['faults']>().toEqualTypeOf<'permitted' | 'all' | 'user' | undefined>();
  expectTypeOf<CopyOptions['onPresent']>().toEqualTypeOf<'throw' | 'skip' | undefined>();
  expectTypeOf<SessionEndReason>().toExtend<string>();
  expectTypeOf<SessionEndReason>().not.toEqualTypeOf<string>();
  t.pass();
});

test('calls take what they document and give what they document', t => {
  expectTypeOf<MemoryRange>().toEqualTypeOf<MappingRange | AddressRange>();
  expectTypeOf<Userfaultfd['register']>().returns.toEqualTypeOf<OrBit<Ioctl>[]>();
  expectTypeOf<Parameters<Userfaultfd['copy']>>().toEqualTypeOf<
    [range: MemoryRange, source: ArrayBufferView | MemoryRange, options?: CopyOptions | undefined]
  >();
  expectTypeOf<Userfaultfd['copy']>().returns.toEqualTypeOf<void>();
  expectTypeOf<Userfaultfd['tryCopy']>().returns.toEqualTypeOf<number>();
  expectTypeOf<Userfaultfd['waitSync']>().returns.toEqualTypeOf<number>();
  expectTypeOf<Userfaultfd['wait']>().returns.resolves.toEqualTypeOf<boolean>();
  expectTypeOf<MemoryMapping['address']>().toEqualTypeOf<bigint>();
  expectTypeOf<MemoryMapping['read']>().returns.resolves.toExtend<Uint8Array>();
  expectTypeOf<MemoryMapping['writtenPages']>().returns.toEqualTypeOf<WrittenPages>();
  expectTypeOf<MemoryMapping['sharedArrayBuffer']>().returns.toEqualTypeOf<SharedArrayBuffer>();
  expectTypeOf<ReturnType<typeof UserfaultfdFactory.open>>().toEqualTypeOf<UserfaultfdFactory>();
  expectTypeOf(capabilities).returns.toEqualTypeOf<Capabilities>();
  expectTypeOf(receiveFds).returns.resolves.toEqualTypeOf<ReceivedFds>();
  expectTypeOf(onExit).parameter(0).toEqualTypeOf<number | { readonly pidfd: number }>();
  expectTypeOf<Userfaultfd>().toExtend<Disposable>();
  expectTypeOf<MemoryMapping>().toExtend<Disposable>();
  t.pass();
});

/** Never called: each line has to be refused by the compiler, or the directive above it is an error. */
export function refused(uffd: Userfaultfd, mapping: MemoryMapping, error: UffdError): void {
  // @ts-expect-error -- a misspelt mode
  uffd.register(mapping.range(), { modes: ['wp'] });
  // @ts-expect-error -- modes are asked for, never assumed
  uffd.register(mapping.range(), {});
  // @ts-expect-error -- an address is a bigint
  uffd.wake({ address: 4096, length: 4096 });
  // @ts-expect-error -- a misspelt option
  uffd.copy(mapping.range(), new Uint8Array(4096), { wakee: false });
  // @ts-expect-error -- an array is no view
  uffd.copy(mapping.range(), [1, 2, 3]);
  // @ts-expect-error -- only one side can be left to zero
  uffd.close({ waiting: 'populate' });
  // @ts-expect-error -- the length is the kernel's
  mapping.length = 5;
  // @ts-expect-error -- a code that is none
  if (error.code === 'ERR_UFFD_PAGE_EXISTS') mapping.close();
  // @ts-expect-error -- faults only have a kind
  expectTypeOf<UffdEvent['kind']>();
}
