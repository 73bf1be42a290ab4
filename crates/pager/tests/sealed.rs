//! Memory served from a memfd that nobody can change any more.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use pager::FileSource;
use uffd::{Mapping, MappingKind};

use support::{PAGE, image, read, serve};

const PAGES: usize = 1000;

#[test]
fn every_byte_of_a_sealed_memfd_arrives_and_so_do_its_zero_pages() {
    let mut bytes = image(PAGES);
    bytes[300 * PAGE..350 * PAGE].fill(0);
    let mut memfd = File::from(memfd_create(c"image", MFdFlags::MFD_ALLOW_SEALING).unwrap());
    memfd.write_all(&bytes).unwrap();
    fcntl(&memfd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_WRITE)).unwrap();
    let source = FileSource::of_fd(memfd.into(), Path::new("image")).unwrap();
    let mapping = Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap();
    let Some(served) = serve(mapping, Arc::new(source), |_| {}) else { return };

    assert!(read(&served.mapping, 0, PAGES * PAGE) == bytes);

    assert!(served.info.stats.snapshot().pages_zero > 0);
    assert_eq!(served.info.stats.snapshot().worker_reads, 0);
    served.close();
}
