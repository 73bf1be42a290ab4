//! Descriptors in the store of the service manager (`FDSTORE=1`), each open file under a name of its own.
//!
//! The manager drops a descriptor of an open file that it has already, so here, too, each is one thing, however many want it.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::stat::{FileStat, fstat};

use super::notify::Notify;
use super::open_file::order;

/// Begins the name of a descriptor, and of a journal.
const FD: &str = "uffd-fd-";
const JOURNAL: &str = "uffd-journal-";
/// Places for the journal, and for the one that follows it.
const JOURNALS: usize = 2;

/// Whether something was stored under such a name by a holder.
pub(crate) fn is_ours(name: &str) -> bool {
    fd_of(name).is_some() || journal_of(name).is_some()
}

/// The number of a descriptor, by its name.
pub(crate) fn fd_of(name: &str) -> Option<u64> {
    name.strip_prefix(FD)?.parse().ok()
}

/// The number of a journal, by its name.
pub(crate) fn journal_of(name: &str) -> Option<u64> {
    name.strip_prefix(JOURNAL)?.parse().ok()
}

pub(crate) fn journal_name(number: u64) -> String {
    format!("{JOURNAL}{number}")
}

/// What is to be told so that a descriptor that goes along is stored. It is not taken out when it has nothing to say any more.
pub(crate) fn storing(name: &str) -> String {
    format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0")
}

pub(crate) fn removing(name: &str) -> String {
    format!("FDSTOREREMOVE=1\nFDNAME={name}")
}

/// An open file in the store.
struct Stored {
    fd: OwnedFd,
    inode: (u64, u64),
    /// How often it is wanted.
    uses: usize,
}

/// What is there, by its numbers.
pub(crate) struct Store {
    /// Descriptors that there may be.
    most: usize,
    last: u64,
    stored: BTreeMap<u64, Stored>,
    /// Numbers by inode: open files that may be the same.
    inodes: BTreeMap<(u64, u64), Vec<u64>>,
    leaves_unused: bool,
}

/// Why something is not stored.
pub(crate) enum NotStored {
    /// There is no place.
    Full,
    Failed(io::Error),
}

impl Store {
    /// One with these in it, each of which is wanted by nobody so far.
    pub(crate) fn new(most: usize, found: Vec<(u64, OwnedFd)>) -> Self {
        let (stored, inodes) = (BTreeMap::new(), BTreeMap::new());
        let mut store = Self { most, last: 0, stored, inodes, leaves_unused: false };
        for (number, fd) in found {
            store.last = store.last.max(number);
            // Of what is open it does not fail.
            let Ok(stat) = fstat(&fd) else { continue };
            store.insert(number, fd, &stat);
        }
        store
    }

    /// Whether there is anything in it.
    pub(crate) fn is_used(&self) -> bool {
        !self.stored.is_empty()
    }

    /// What nobody is known to want stays: somebody may.
    pub(crate) fn leave_unused(&mut self) {
        self.leaves_unused = true;
    }

    pub(crate) fn most(&self) -> usize {
        self.most
    }

    /// Whether there is place for one more.
    pub(crate) fn has_room(&self) -> bool {
        self.stored.len() + JOURNALS < self.most
    }

    /// A descriptor of the same open file.
    pub(crate) fn get(&self, number: u64) -> Option<OwnedFd> {
        self.stored.get(&number)?.fd.try_clone().ok()
    }

    /// Has a place for all of these, or for none; their numbers, and which of those are to be [sent](Self::send).
    pub(crate) fn admit(&mut self, fds: &[OwnedFd]) -> Result<(Vec<u64>, Vec<u64>), NotStored> {
        let (mut numbers, mut new) = (Vec::new(), Vec::new());
        for fd in fds {
            match self.number_of(fd, &mut new) {
                Ok(number) => numbers.push(number),
                Err(why) => {
                    new.iter().for_each(|&number| self.remove(number));
                    return Err(why);
                }
            }
        }
        self.use_all(&numbers);
        Ok((numbers, new))
    }

    fn number_of(&mut self, fd: &OwnedFd, new: &mut Vec<u64>) -> Result<u64, NotStored> {
        let stat = fstat(fd).map_err(|errno| NotStored::Failed(errno.into()))?;
        let inode = inode_of(&stat);
        if let Ok((_, number)) = self.place_of(fd, inode, &stat) {
            return Ok(number);
        }
        if !self.has_room() {
            return Err(NotStored::Full);
        }
        let fd = fd.try_clone().map_err(NotStored::Failed)?;
        self.last += 1;
        new.push(self.last);
        self.insert(self.last, fd, &stat);
        Ok(self.last)
    }

    /// Where an open file is among those of its inode, and its number; or where it would be. Many that were opened by their own are
    /// often of one image.
    fn place_of(&self, fd: &OwnedFd, inode: (u64, u64), stat: &FileStat) -> Result<(usize, u64), usize> {
        let numbers = self.inodes.get(&inode).map_or(&[][..], Vec::as_slice);
        let compare = |number: &u64| {
            let there = self.stored.get(number).and_then(|stored| order(&stored.fd, fd));
            there.unwrap_or(if is_by_inode(stat) { Ordering::Equal } else { Ordering::Less })
        };
        let at = numbers.binary_search_by(compare)?;
        numbers.get(at).map(|&number| (at, number)).ok_or(at)
    }

    fn insert(&mut self, number: u64, fd: OwnedFd, stat: &FileStat) {
        let inode = inode_of(stat);
        let (Ok((at, _)) | Err(at)) = self.place_of(&fd, inode, stat);
        self.stored.insert(number, Stored { fd, inode, uses: 0 });
        let numbers = self.inodes.entry(inode).or_default();
        numbers.insert(at.min(numbers.len()), number);
    }

    /// Somebody wants these.
    pub(crate) fn use_all(&mut self, numbers: &[u64]) {
        for number in numbers {
            if let Some(stored) = self.stored.get_mut(number) {
                stored.uses += 1;
            }
        }
    }

    /// Tells the service manager of descriptors that have a number since now.
    pub(crate) fn send(&self, numbers: &[u64], notify: &mut Notify) {
        for number in numbers {
            if let Some(stored) = self.stored.get(number) {
                notify.tell(storing(&format!("{FD}{number}")), Some(stored.fd.as_fd()));
            }
        }
    }

    /// Nobody wants these any more who did; whether there is place now that was not there before.
    pub(crate) fn release(&mut self, numbers: &[u64], notify: &mut Notify) -> bool {
        for number in numbers {
            if let Some(stored) = self.stored.get_mut(number) {
                stored.uses = stored.uses.saturating_sub(1);
            }
        }
        self.sweep(numbers, notify)
    }

    /// Takes out what nobody wants of what was found.
    pub(crate) fn sweep_found(&mut self, notify: &mut Notify) {
        if self.leaves_unused {
            return;
        }
        let numbers: Vec<u64> = self.stored.keys().copied().collect();
        self.sweep(&numbers, notify);
    }

    fn sweep(&mut self, numbers: &[u64], notify: &mut Notify) -> bool {
        let mut any = false;
        for &number in numbers {
            if self.stored.get(&number).is_some_and(|stored| stored.uses == 0) {
                self.remove(number);
                notify.tell(removing(&format!("{FD}{number}")), None);
                any = true;
            }
        }
        any
    }

    fn remove(&mut self, number: u64) {
        if let Some(Stored { inode, .. }) = self.stored.remove(&number)
            && let Some(numbers) = self.inodes.get_mut(&inode)
        {
            numbers.retain(|&other| other != number);
            if numbers.is_empty() {
                self.inodes.remove(&inode);
            }
        }
    }
}

fn inode_of(stat: &FileStat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

/// Whether the inode has to do where the kernel does not say which open file it is: it has one of its own.
fn is_by_inode(stat: &FileStat) -> bool {
    matches!(stat.st_mode & libc::S_IFMT, libc::S_IFREG | libc::S_IFSOCK)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::{AsRawFd, BorrowedFd};

    use super::*;

    fn file() -> OwnedFd {
        File::open("/proc/self/exe").unwrap().into()
    }

    fn admitted(store: &mut Store, fds: &[OwnedFd]) -> Option<(Vec<u64>, Vec<u64>)> {
        store.admit(fds).ok()
    }

    #[test]
    fn an_open_file_has_one_number_whoever_wants_it_and_another_of_the_same_inode_has_its_own() {
        let mut store = Store::new(100, Vec::new());
        let mut notify = Notify::from_environment();
        let one = file();
        let both = [one.try_clone().unwrap(), one, file()];

        assert_eq!(admitted(&mut store, &both), Some((vec![1, 1, 2], vec![1, 2])));
        assert_eq!(admitted(&mut store, &both[..1]), Some((vec![1], vec![])));

        assert!(!store.release(&[1, 1], &mut notify));
        assert!(store.release(&[1], &mut notify));
        assert_eq!(admitted(&mut store, &both[..1]), Some((vec![3], vec![3])), "numbers are not given again");
    }

    #[test]
    fn what_does_not_fit_as_a_whole_takes_no_place() {
        let mut store = Store::new(JOURNALS + 2, Vec::new());
        let three = [file(), file(), file()];
        assert_eq!(admitted(&mut Store::new(10, Vec::new()), &three), Some((vec![1, 2, 3], vec![1, 2, 3])));

        assert!(matches!(store.admit(&three), Err(NotStored::Full)));
        assert!(admitted(&mut store, &three[..2]).is_some());
        assert!(matches!(store.admit(&three[2..]), Err(NotStored::Full)));
        assert!(admitted(&mut store, &three[..1]).is_some(), "it is there already");
    }

    #[test]
    fn what_was_found_is_there_under_its_number() {
        let found = file();
        let raw = found.as_raw_fd();
        let mut store = Store::new(10, vec![(41, found)]);
        // SAFETY: the store has it open.
        let borrowed = unsafe { BorrowedFd::borrow_raw(raw) };

        assert_eq!(
            admitted(&mut store, &[borrowed.try_clone_to_owned().unwrap(), file()]),
            Some((vec![41, 42], vec![42]))
        );
        let mut byte = [0];
        File::from(store.get(41).unwrap()).read_exact(&mut byte).unwrap();
        assert!(store.get(40).is_none());
    }

    #[test]
    fn names_say_what_they_are() {
        assert_eq!((fd_of("uffd-fd-12"), journal_of("uffd-journal-3")), (Some(12), Some(3)));
        assert!(!is_ours("userfaultfd-pagerd.socket") && !is_ours("uffd-fd-") && !is_ours("uffd-fd-x"));
        assert_eq!(storing("uffd-fd-1"), "FDSTORE=1\nFDNAME=uffd-fd-1\nFDPOLL=0");
        assert_eq!(removing("uffd-fd-1"), "FDSTOREREMOVE=1\nFDNAME=uffd-fd-1");
    }
}
