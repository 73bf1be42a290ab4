//! Reading and writing a mapping through the kernel: what nobody can have is an error, where touching it is a signal. Each
//! test in a process of its own, which the signal would end.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod processes;
mod support;

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;

use uffd::{
    CopyOptions, CreateOptions, Factory, Faults, FileAccess, FileOptions, Mapping, MappingError,
    MemfdOptions, Modes,
};

use processes::{PAGE, alone};
use support::{elsewhere, fault, finish};

/// A file of a disk, whose pages have the bytes 1, 2, 3...
fn on_disk(pages: usize) -> File {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .open(env!("CARGO_TARGET_TMPDIR"))
        .unwrap();
    for page in 0..pages {
        file.write_all_at(&[page as u8 + 1; PAGE], (page * PAGE) as u64).unwrap();
    }
    file
}

fn mapped(file: &File, access: FileAccess, offset: usize) -> Mapping {
    let options = FileOptions { access, offset: offset as u64, len: None };
    Mapping::of_file(file.as_fd().try_clone_to_owned().unwrap(), options).unwrap()
}

fn errno<T>(outcome: Result<T, MappingError>) -> Option<i32> {
    outcome.err().map(|error| error.errno())
}

#[test]
fn a_file_that_was_cut_short_is_an_error_from_there_on() {
    alone("a_file_that_was_cut_short_is_an_error_from_there_on", || {
        for access in [FileAccess::ReadOnly, FileAccess::CopyOnWrite, FileAccess::Shared] {
            let file = on_disk(6);
            let mapping = mapped(&file, access, PAGE);
            let mut bytes = vec![0; 2 * PAGE];
            mapping.read_checked(2 * PAGE, &mut bytes).unwrap();
            assert_eq!((bytes[0], bytes[PAGE]), (4, 5));
            file.set_len(3 * PAGE as u64 + 100).unwrap();

            // The page with the file's end is there, zero behind it.
            mapping.read_checked(PAGE, &mut bytes).unwrap();
            assert_eq!((bytes[0], bytes[PAGE + 99], bytes[PAGE + 100]), (3, 4, 0));
            assert_eq!(errno(mapping.read_checked(3 * PAGE, &mut bytes)), Some(libc::EFAULT));
            assert_eq!(errno(mapping.read_checked(3 * PAGE - 8, &mut [0; 16])), Some(libc::EFAULT));
            assert_eq!(errno(mapping.read_checked(5 * PAGE - 1, &mut [0; 1])), Some(libc::EFAULT));
            if access != FileAccess::ReadOnly {
                let refused = mapping.write_checked(3 * PAGE, &[1]);
                assert!(refused.as_ref().unwrap_err().to_string().contains("process_vm_writev"));
                assert_eq!(errno(refused), Some(libc::EFAULT));
                mapping.write_checked(2 * PAGE, &[9]).unwrap();
            }
        }
    });
}

#[test]
fn a_memfd_that_was_cut_short_is_an_error_from_there_on() {
    alone("a_memfd_that_was_cut_short_is_an_error_from_there_on", || {
        let options = MemfdOptions { fixed_size: false, ..MemfdOptions::default() };
        let mapping = Mapping::with_memfd(4 * PAGE, &options).unwrap();
        let memfd = File::from(mapping.memfd().unwrap().try_clone_to_owned().unwrap());
        let also = mapped(&memfd, FileAccess::Shared, 2 * PAGE);
        mapping.write_checked(0, &[7; 4 * PAGE]).unwrap();
        memfd.set_len(3 * PAGE as u64).unwrap();

        for (mapping, end) in [(&mapping, 3 * PAGE), (&also, PAGE)] {
            let mut byte = [0];
            mapping.read_checked(end - 1, &mut byte).unwrap();
            assert_eq!(byte, [7]);
            assert_eq!(errno(mapping.read_checked(end, &mut byte)), Some(libc::EFAULT));
            assert_eq!(errno(mapping.write_checked(end, &byte)), Some(libc::EFAULT));
        }
    });
}

#[test]
fn a_page_that_only_user_mode_may_wait_for_is_waited_for_and_the_next_is_an_error() {
    alone("a_page_that_only_user_mode_may_wait_for_is_waited_for_and_the_next_is_an_error", || {
        let options = CreateOptions { faults: Faults::User, ..CreateOptions::default() };
        let Ok(uffd) = Factory::open().create(&options) else {
            println!("skipped: no userfaultfd can be made here");
            return;
        };
        let options = MemfdOptions { fixed_size: false, ..MemfdOptions::default() };
        let mapping = Arc::new(Mapping::with_memfd(2 * PAGE, &options).unwrap());
        let memfd = File::from(mapping.memfd().unwrap().try_clone_to_owned().unwrap());
        // SAFETY: no reference to the mapping exists.
        unsafe { uffd.register(mapping.address(), mapping.len() as u64, Modes::MISSING) }.unwrap();
        memfd.set_len(PAGE as u64).unwrap();
        let reader = Arc::clone(&mapping);
        let reading = elsewhere(move || {
            let mut bytes = vec![0; 2 * PAGE];
            let outcome = reader.read_checked(0, &mut bytes);
            (bytes[0], errno(outcome))
        });

        assert_eq!(fault(&uffd).address, mapping.address());
        // SAFETY: the source is ordinary memory of this process.
        unsafe { uffd.copy(mapping.address(), [5; PAGE].as_ptr(), PAGE, CopyOptions::default()) }.unwrap();

        assert_eq!(finish(&reading), (5, Some(libc::EFAULT)));
    });
}
