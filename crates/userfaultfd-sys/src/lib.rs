//! The whole kernel interface of userfaultfd(2), as `include/uapi/linux/userfaultfd.h` has it (Linux 6.12
//! to 7.2: identical): 10 ioctls on the descriptor, one on the device, 17 features, every mode bit, the
//! message.
//!
//! Hand-written, so that no constant depends on the build host's header and no build needs libclang. The
//! names are the kernel's, and the same as those of the bindgen crate this one replaces; the types of the
//! unnamed unions follow bindgen's habit because the upstream `userfaultfd` crate reaches into them. Sizes
//! and ioctl numbers are proved by the constant assertions at the end. There is no code here.

#![no_std]
#![allow(non_camel_case_types, reason = "the names are the kernel's")]
#![allow(non_upper_case_globals, reason = "the names are the kernel's")]
#![allow(missing_docs, reason = "the kernel's header and ioctl_userfaultfd(2) are the documentation")]

// ---- creating -------------------------------------------------------------------------------------------

/// Flag of `userfaultfd(2)` and of `USERFAULTFD_IOC_NEW`: faults from user mode only (Linux 5.11).
pub const UFFD_USER_MODE_ONLY: u32 = 1;
/// Magic of the ioctls of `/dev/userfaultfd`.
pub const USERFAULTFD_IOC: u8 = 0xAA;
/// `_IO(USERFAULTFD_IOC, 0)`: a new descriptor; the flags are passed by value.
pub const USERFAULTFD_IOC_NEW: u32 = 0xaa00;

// ---- handshake ------------------------------------------------------------------------------------------

pub const UFFD_API: u64 = 0xAA;

pub const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
pub const UFFD_FEATURE_EVENT_FORK: u64 = 1 << 1;
pub const UFFD_FEATURE_EVENT_REMAP: u64 = 1 << 2;
pub const UFFD_FEATURE_EVENT_REMOVE: u64 = 1 << 3;
pub const UFFD_FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
pub const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;
pub const UFFD_FEATURE_EVENT_UNMAP: u64 = 1 << 6;
pub const UFFD_FEATURE_SIGBUS: u64 = 1 << 7;
pub const UFFD_FEATURE_THREAD_ID: u64 = 1 << 8;
pub const UFFD_FEATURE_MINOR_HUGETLBFS: u64 = 1 << 9;
pub const UFFD_FEATURE_MINOR_SHMEM: u64 = 1 << 10;
pub const UFFD_FEATURE_EXACT_ADDRESS: u64 = 1 << 11;
pub const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
pub const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
pub const UFFD_FEATURE_POISON: u64 = 1 << 14;
pub const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
pub const UFFD_FEATURE_MOVE: u64 = 1 << 16;

/// All 17 features.
pub const UFFD_API_FEATURES: u64 = (1 << 17) - 1;
/// The ioctls of the descriptor itself. Bit 63 is set: as a double it would lose the low bits.
pub const UFFD_API_IOCTLS: u64 = 1 << _UFFDIO_REGISTER | 1 << _UFFDIO_UNREGISTER | 1 << _UFFDIO_API;
/// The ioctls of a registered range.
pub const UFFD_API_RANGE_IOCTLS: u64 =
    UFFD_API_RANGE_IOCTLS_BASIC | 1 << _UFFDIO_ZEROPAGE | 1 << _UFFDIO_MOVE;
/// The ioctls of a registered hugetlb range: no ZEROPAGE, no MOVE.
pub const UFFD_API_RANGE_IOCTLS_BASIC: u64 = 1 << _UFFDIO_WAKE
    | 1 << _UFFDIO_COPY
    | 1 << _UFFDIO_WRITEPROTECT
    | 1 << _UFFDIO_CONTINUE
    | 1 << _UFFDIO_POISON;

#[repr(C)]
#[derive(Debug, Default, Copy, Clone, PartialEq, Eq)]
pub struct uffdio_api {
    pub api: u64,
    pub features: u64,
    pub ioctls: u64,
}

// ---- ioctls ---------------------------------------------------------------------------------------------

pub const UFFDIO: u8 = 0xAA;

pub const _UFFDIO_REGISTER: u8 = 0x00;
pub const _UFFDIO_UNREGISTER: u8 = 0x01;
pub const _UFFDIO_WAKE: u8 = 0x02;
pub const _UFFDIO_COPY: u8 = 0x03;
pub const _UFFDIO_ZEROPAGE: u8 = 0x04;
pub const _UFFDIO_MOVE: u8 = 0x05;
pub const _UFFDIO_WRITEPROTECT: u8 = 0x06;
pub const _UFFDIO_CONTINUE: u8 = 0x07;
pub const _UFFDIO_POISON: u8 = 0x08;
pub const _UFFDIO_API: u8 = 0x3F;

pub const UFFDIO_API: u32 = iowr::<uffdio_api>(_UFFDIO_API);
pub const UFFDIO_REGISTER: u32 = iowr::<uffdio_register>(_UFFDIO_REGISTER);
/// `_IOR` although the kernel only reads the structure: an old mistake of the header, kept by it.
pub const UFFDIO_UNREGISTER: u32 = ior::<uffdio_range>(_UFFDIO_UNREGISTER);
/// `_IOR` although the kernel only reads the structure: an old mistake of the header, kept by it.
pub const UFFDIO_WAKE: u32 = ior::<uffdio_range>(_UFFDIO_WAKE);
pub const UFFDIO_COPY: u32 = iowr::<uffdio_copy>(_UFFDIO_COPY);
pub const UFFDIO_ZEROPAGE: u32 = iowr::<uffdio_zeropage>(_UFFDIO_ZEROPAGE);
pub const UFFDIO_MOVE: u32 = iowr::<uffdio_move>(_UFFDIO_MOVE);
pub const UFFDIO_WRITEPROTECT: u32 = iowr::<uffdio_writeprotect>(_UFFDIO_WRITEPROTECT);
pub const UFFDIO_CONTINUE: u32 = iowr::<uffdio_continue>(_UFFDIO_CONTINUE);
pub const UFFDIO_POISON: u32 = iowr::<uffdio_poison>(_UFFDIO_POISON);

#[repr(C)]
#[derive(Debug, Default, Copy, Clone, PartialEq, Eq)]
pub struct uffdio_range {
    pub start: u64,
    pub len: u64,
}

pub const UFFDIO_REGISTER_MODE_MISSING: u64 = 1 << 0;
pub const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
pub const UFFDIO_REGISTER_MODE_MINOR: u64 = 1 << 2;

#[repr(C)]
#[derive(Debug, Default, Copy, Clone, PartialEq, Eq)]
pub struct uffdio_register {
    pub range: uffdio_range,
    pub mode: u64,
    /// Output, written on success only.
    pub ioctls: u64,
}

pub const UFFDIO_COPY_MODE_DONTWAKE: u64 = 1 << 0;
pub const UFFDIO_COPY_MODE_WP: u64 = 1 << 1;

#[repr(C)]
#[derive(Debug, Default, Copy, Clone, PartialEq, Eq)]
pub struct uffdio_copy {
    pub dst: u64,
    pub src: u64,
    pub len: u64,
    pub mode: u64,
    /// Output: bytes, or a negative errno, or untouched.
    pub copy: i64,
}

pub const UFFDIO_ZEROPAGE_MODE_DONTWAKE: u64 = 1 << 0;

#[repr(C)]
#[derive(Debug, Default, Copy, Clone, PartialEq, Eq)]
pub struct uffdio_zeropage {
    pub range: uffdio_range,
    pub mode: u64,
    /// Output: bytes, or a negative errno, or untouched.
    pub zeropage: i64,
}

pub const UFFDIO_MOVE_MODE_DONTWAKE: u64 = 1 << 0;
pub const UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES: u64 = 1 << 1;

#[repr(C)]
#[derive(Debug, Default, Copy, Clone, PartialEq, Eq)]
pub struct uffdio_move {
    pub dst: u64,
    pub src: u64,
    pub len: u64,
    pub mode: u64,
    /// Output: bytes, or a negative errno, or untouched.
    pub move_: i64,
}

pub const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;
/// Only when the protection is taken off.
pub const UFFDIO_WRITEPROTECT_MODE_DONTWAKE: u64 = 1 << 1;

#[repr(C)]
#[derive(Debug, Default, Copy, Clone, PartialEq, Eq)]
pub struct uffdio_writeprotect {
    pub range: uffdio_range,
    pub mode: u64,
}

pub const UFFDIO_CONTINUE_MODE_DONTWAKE: u64 = 1 << 0;
pub const UFFDIO_CONTINUE_MODE_WP: u64 = 1 << 1;

#[repr(C)]
#[derive(Debug, Default, Copy, Clone, PartialEq, Eq)]
pub struct uffdio_continue {
    pub range: uffdio_range,
    pub mode: u64,
    /// Output: bytes, or a negative errno, or untouched.
    pub mapped: i64,
}

pub const UFFDIO_POISON_MODE_DONTWAKE: u64 = 1 << 0;

#[repr(C)]
#[derive(Debug, Default, Copy, Clone, PartialEq, Eq)]
pub struct uffdio_poison {
    pub range: uffdio_range,
    pub mode: u64,
    /// Output: bytes, or a negative errno, or untouched.
    pub updated: i64,
}

// ---- messages -------------------------------------------------------------------------------------------

pub const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
pub const UFFD_EVENT_FORK: u8 = 0x13;
pub const UFFD_EVENT_REMAP: u8 = 0x14;
pub const UFFD_EVENT_REMOVE: u8 = 0x15;
pub const UFFD_EVENT_UNMAP: u8 = 0x16;

pub const UFFD_PAGEFAULT_FLAG_WRITE: u64 = 1 << 0;
pub const UFFD_PAGEFAULT_FLAG_WP: u64 = 1 << 1;
pub const UFFD_PAGEFAULT_FLAG_MINOR: u64 = 1 << 2;

/// One message of `read(2)`.
#[repr(C, packed)]
#[derive(Copy, Clone)]
pub struct uffd_msg {
    pub event: u8,
    pub reserved1: u8,
    pub reserved2: u16,
    pub reserved3: u32,
    pub arg: uffd_msg__bindgen_ty_1,
}

#[repr(C)]
#[derive(Copy, Clone)]
pub union uffd_msg__bindgen_ty_1 {
    pub pagefault: uffd_msg__bindgen_ty_1__bindgen_ty_1,
    pub fork: uffd_msg__bindgen_ty_1__bindgen_ty_2,
    pub remap: uffd_msg__bindgen_ty_1__bindgen_ty_3,
    pub remove: uffd_msg__bindgen_ty_1__bindgen_ty_4,
    pub reserved: uffd_msg__bindgen_ty_1__bindgen_ty_5,
}

/// `UFFD_EVENT_PAGEFAULT`.
#[repr(C)]
#[derive(Copy, Clone)]
pub struct uffd_msg__bindgen_ty_1__bindgen_ty_1 {
    pub flags: u64,
    pub address: u64,
    pub feat: uffd_msg__bindgen_ty_1__bindgen_ty_1__bindgen_ty_1,
}

#[repr(C)]
#[derive(Copy, Clone)]
pub union uffd_msg__bindgen_ty_1__bindgen_ty_1__bindgen_ty_1 {
    pub ptid: u32,
}

/// `UFFD_EVENT_FORK`.
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct uffd_msg__bindgen_ty_1__bindgen_ty_2 {
    pub ufd: u32,
}

/// `UFFD_EVENT_REMAP`.
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct uffd_msg__bindgen_ty_1__bindgen_ty_3 {
    pub from: u64,
    pub to: u64,
    pub len: u64,
}

/// `UFFD_EVENT_REMOVE` and `UFFD_EVENT_UNMAP`.
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct uffd_msg__bindgen_ty_1__bindgen_ty_4 {
    pub start: u64,
    pub end: u64,
}

#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct uffd_msg__bindgen_ty_1__bindgen_ty_5 {
    pub reserved1: u64,
    pub reserved2: u64,
    pub reserved3: u64,
}

// ---- the way the numbers are made -----------------------------------------------------------------------

// asm-generic/ioctl.h: the encoding of x86, arm64, riscv and every other architecture of this package.
// (alpha, mips, powerpc and sparc differ; the assertions below would not hold for them.)
const fn ioc<T>(direction: u32, number: u8) -> u32 {
    direction << 30 | (size_of::<T>() as u32) << 16 | (UFFDIO as u32) << 8 | number as u32
}

const fn ior<T>(number: u8) -> u32 {
    ioc::<T>(2, number)
}

const fn iowr<T>(number: u8) -> u32 {
    ioc::<T>(3, number)
}

const _: () = {
    assert!(size_of::<uffdio_api>() == 24);
    assert!(size_of::<uffdio_range>() == 16);
    assert!(size_of::<uffdio_register>() == 32);
    assert!(size_of::<uffdio_copy>() == 40);
    assert!(size_of::<uffdio_zeropage>() == 32);
    assert!(size_of::<uffdio_move>() == 40);
    assert!(size_of::<uffdio_writeprotect>() == 24);
    assert!(size_of::<uffdio_continue>() == 32);
    assert!(size_of::<uffdio_poison>() == 32);
    assert!(size_of::<uffd_msg>() == 32);
    assert!(core::mem::offset_of!(uffd_msg, arg) == 8);
    assert!(core::mem::offset_of!(uffd_msg__bindgen_ty_1__bindgen_ty_1, flags) == 0);
    assert!(core::mem::offset_of!(uffd_msg__bindgen_ty_1__bindgen_ty_1, address) == 8);
    assert!(core::mem::offset_of!(uffd_msg__bindgen_ty_1__bindgen_ty_1, feat) == 16);

    assert!(UFFDIO_API == 0xc018_aa3f);
    assert!(UFFDIO_REGISTER == 0xc020_aa00);
    assert!(UFFDIO_UNREGISTER == 0x8010_aa01);
    assert!(UFFDIO_WAKE == 0x8010_aa02);
    assert!(UFFDIO_COPY == 0xc028_aa03);
    assert!(UFFDIO_ZEROPAGE == 0xc020_aa04);
    assert!(UFFDIO_MOVE == 0xc028_aa05);
    assert!(UFFDIO_WRITEPROTECT == 0xc018_aa06);
    assert!(UFFDIO_CONTINUE == 0xc020_aa07);
    assert!(UFFDIO_POISON == 0xc020_aa08);
    assert!(USERFAULTFD_IOC_NEW == (USERFAULTFD_IOC as u32) << 8);

    assert!(UFFD_API_FEATURES == 0x1ffff);
    assert!(UFFD_API_IOCTLS == 0x8000_0000_0000_0003);
    assert!(UFFD_API_RANGE_IOCTLS == 0x1fc);
};
