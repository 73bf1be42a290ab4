//! What the descriptor table of a pager's process had when that died, and nobody else: userfaultfds of children whose FORK message was
//! read and no more. Who shared that table (`CLONE_FILES`) has handed them on.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use uffd::{AdoptError, Userfaultfd};

/// Descriptors of processes that are gone, by the numbers that they had there.
#[derive(Debug, Default)]
pub struct LeftBehind(BTreeMap<i32, LeftTable>);

/// Those of one process.
#[derive(Debug, Default)]
pub(crate) struct LeftTable {
    fds: BTreeMap<i32, OwnedFd>,
    /// What is not here was closed, or is kept otherwise.
    pub(crate) whole: bool,
}

impl LeftBehind {
    /// Adds one that process `pid` has had as `number`.
    pub fn add(&mut self, pid: i32, number: i32, fd: OwnedFd) {
        self.0.entry(pid).or_default().fds.insert(number, fd);
    }

    /// Everything of process `pid` is here that nobody has kept otherwise.
    pub fn is_whole(&mut self, pid: i32) {
        self.0.entry(pid).or_default().whole = true;
    }

    /// Takes out what `numbers` name in the table of process `pid`.
    pub(crate) fn table(&mut self, pid: i32, numbers: &[i32]) -> LeftTable {
        let Some(table) = self.0.get_mut(&pid) else { return LeftTable::default() };
        let of = |&number: &i32| Some((number, table.fds.remove(&number)?));
        let fds = numbers.iter().filter_map(of).collect();
        LeftTable { fds, whole: table.whole }
    }
}

impl LeftTable {
    /// The userfaultfd with that number.
    pub(crate) fn take(&mut self, number: i32) -> Option<Result<Userfaultfd, AdoptError>> {
        self.fds.remove(&number).map(Userfaultfd::adopt)
    }
}
