//! The names of features and ioctls. Bits this version has no name for are kept: kernels to come have more.

use std::fmt;

use bitflags::bitflags;
use userfaultfd_sys as sys;

macro_rules! named_bits {
    ($(#[$($doc:tt)*])* $type:ident { $($(#[$($bit_doc:tt)*])* $name:ident = $value:expr, $text:literal;)* }) => {
        bitflags! {
            $(#[$($doc)*])*
            #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
            pub struct $type: u64 {
                $($(#[$($bit_doc)*])* const $name = $value;)*
                const _ = !0;
            }
        }

        impl $type {
            /// Every bit that has a name, lowest first.
            pub const NAMES: &'static [(&'static str, Self)] = &[$(($text, Self::$name),)*];

            /// The bit of this name.
            #[must_use]
            pub fn of_name(name: &str) -> Option<Self> {
                Self::NAMES.iter().find(|(text, _)| *text == name).map(|(_, bit)| *bit)
            }

            /// The names of the bits that are set, lowest first; `bit-N` for one without a name.
            #[must_use]
            pub fn names(self) -> Vec<String> {
                (0..u64::BITS)
                    .map(|bit| Self::from_bits_retain(1 << bit))
                    .filter(|&bit| self.contains(bit))
                    .map(|bit| match Self::NAMES.iter().find(|(_, named)| *named == bit) {
                        Some((name, _)) => (*name).to_owned(),
                        None => format!("bit-{}", bit.bits().trailing_zeros()),
                    })
                    .collect()
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.names().join(", "))
            }
        }
    };
}

named_bits! {
    /// What a userfaultfd can do, or does (`UFFD_FEATURE_*`, ioctl_userfaultfd(2)).
    Features {
        /// Write-protect mode exists for anonymous memory (5.7). Only tells; need not be asked for.
        PAGEFAULT_FLAG_WP = sys::UFFD_FEATURE_PAGEFAULT_FLAG_WP, "pagefault-flag-wp";
        /// FORK events (4.11, CAP_SYS_PTRACE): the child's memory is registered like its parent's.
        EVENT_FORK = sys::UFFD_FEATURE_EVENT_FORK, "event-fork";
        /// REMAP events (4.11): the registration follows mremap(2).
        EVENT_REMAP = sys::UFFD_FEATURE_EVENT_REMAP, "event-remap";
        /// REMOVE events (4.11): memory that is discarded is announced.
        EVENT_REMOVE = sys::UFFD_FEATURE_EVENT_REMOVE, "event-remove";
        /// Missing mode exists for huge pages (4.11). Only tells.
        MISSING_HUGETLBFS = sys::UFFD_FEATURE_MISSING_HUGETLBFS, "missing-hugetlbfs";
        /// Missing mode exists for shared memory (4.11). Only tells.
        MISSING_SHMEM = sys::UFFD_FEATURE_MISSING_SHMEM, "missing-shmem";
        /// UNMAP events (4.11).
        EVENT_UNMAP = sys::UFFD_FEATURE_EVENT_UNMAP, "event-unmap";
        /// SIGBUS instead of messages (4.14).
        SIGBUS = sys::UFFD_FEATURE_SIGBUS, "sigbus";
        /// Fault messages carry the thread's id (4.14).
        THREAD_ID = sys::UFFD_FEATURE_THREAD_ID, "thread-id";
        /// Minor mode exists for huge pages (5.13). Only tells.
        MINOR_HUGETLBFS = sys::UFFD_FEATURE_MINOR_HUGETLBFS, "minor-hugetlbfs";
        /// Minor mode exists for shared memory (5.14). Only tells.
        MINOR_SHMEM = sys::UFFD_FEATURE_MINOR_SHMEM, "minor-shmem";
        /// Fault messages carry the exact address, not the page's (5.18).
        EXACT_ADDRESS = sys::UFFD_FEATURE_EXACT_ADDRESS, "exact-address";
        /// Write-protect mode exists for shared memory and huge pages (5.19). Only tells.
        WP_HUGETLBFS_SHMEM = sys::UFFD_FEATURE_WP_HUGETLBFS_SHMEM, "wp-hugetlbfs-shmem";
        /// Holes of anonymous memory can be write-protected (6.4).
        WP_UNPOPULATED = sys::UFFD_FEATURE_WP_UNPOPULATED, "wp-unpopulated";
        /// Pages can be poisoned (6.6). Only tells.
        POISON = sys::UFFD_FEATURE_POISON, "poison";
        /// The kernel resolves write-protect faults itself (6.7); read what was written by PAGEMAP_SCAN.
        WP_ASYNC = sys::UFFD_FEATURE_WP_ASYNC, "wp-async";
        /// Pages can be moved in (6.8). Only tells.
        MOVE = sys::UFFD_FEATURE_MOVE, "move";
    }
}

named_bits! {
    /// Ioctls, by the kernel's numbers.
    Ioctls {
        /// `UFFDIO_REGISTER`
        REGISTER = 1 << sys::_UFFDIO_REGISTER, "register";
        /// `UFFDIO_UNREGISTER`
        UNREGISTER = 1 << sys::_UFFDIO_UNREGISTER, "unregister";
        /// `UFFDIO_WAKE`
        WAKE = 1 << sys::_UFFDIO_WAKE, "wake";
        /// `UFFDIO_COPY`
        COPY = 1 << sys::_UFFDIO_COPY, "copy";
        /// `UFFDIO_ZEROPAGE`
        ZEROPAGE = 1 << sys::_UFFDIO_ZEROPAGE, "zeropage";
        /// `UFFDIO_MOVE`
        MOVE = 1 << sys::_UFFDIO_MOVE, "move";
        /// `UFFDIO_WRITEPROTECT`
        WRITEPROTECT = 1 << sys::_UFFDIO_WRITEPROTECT, "writeprotect";
        /// `UFFDIO_CONTINUE`
        CONTINUE = 1 << sys::_UFFDIO_CONTINUE, "continue";
        /// `UFFDIO_POISON`
        POISON = 1 << sys::_UFFDIO_POISON, "poison";
        /// `UFFDIO_API`
        API = 1 << sys::_UFFDIO_API, "api";
    }
}

bitflags! {
    /// Which faults of a range are reported (`UFFDIO_REGISTER_MODE_*`).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Modes: u64 {
        /// The page is not there.
        const MISSING = sys::UFFDIO_REGISTER_MODE_MISSING;
        /// The page is write-protected and written to.
        const WRITE_PROTECT = sys::UFFDIO_REGISTER_MODE_WP;
        /// The page is in the page cache, but not mapped. Shared memory and huge pages only.
        const MINOR = sys::UFFDIO_REGISTER_MODE_MINOR;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_feature_and_ioctl_has_a_name_that_finds_it_again() {
        assert_eq!(Features::NAMES.len(), 17);
        assert_eq!(Ioctls::NAMES.len(), 10);
        for (name, bit) in Features::NAMES {
            assert_eq!(Features::of_name(name), Some(*bit));
            assert_eq!(bit.names(), [*name]);
        }
        assert_eq!(Features::of_name("event-forks"), None);
    }

    #[test]
    fn bits_without_a_name_are_kept_and_shown() {
        let features = Features::from_bits_retain(1 << 40) | Features::MOVE;

        assert_eq!(features.to_string(), "move, bit-40");
        assert_eq!(features.bits(), 1 << 40 | 1 << 16);
    }

    #[test]
    fn the_highest_ioctl_is_not_lost() {
        assert_eq!(Ioctls::from_bits_retain(0x8000_0000_0000_0003).to_string(), "register, unregister, api");
    }
}
