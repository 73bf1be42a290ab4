//! What `PAGEMAP_SCAN` takes and gives (linux/fs.h).

use super::{Categories, Region};

/// `PM_SCAN_WP_MATCHING` and `PM_SCAN_CHECK_WPASYNC`.
pub(super) const WP_MATCHING: u64 = 1;
pub(super) const CHECK_WPASYNC: u64 = 2;

/// `struct pm_scan_arg` of linux/fs.h.
#[repr(C)]
pub(super) struct ScanArg {
    pub(super) size: u64,
    pub(super) flags: u64,
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) walk_end: u64,
    pub(super) vec: u64,
    pub(super) vec_len: u64,
    pub(super) max_pages: u64,
    pub(super) category_inverted: u64,
    pub(super) category_mask: u64,
    pub(super) category_anyof_mask: u64,
    pub(super) return_mask: u64,
}

/// `struct page_region` of linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct RawRegion {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) categories: u64,
}

impl From<RawRegion> for Region {
    fn from(raw: RawRegion) -> Self {
        Self { start: raw.start, end: raw.end, categories: Categories::from_bits_retain(raw.categories) }
    }
}

const _: () = assert!(size_of::<ScanArg>() == 96);
const _: () = assert!(size_of::<RawRegion>() == 24);
const _: () = assert!(nix::request_code_readwrite!(b'f', 16, size_of::<ScanArg>()) as u32 == 0xc060_6610);

nix::ioctl_readwrite!(
    /// `PAGEMAP_SCAN`
    pagemap_scan, b'f', 16, ScanArg
);
