//! A second copy of what is kept: its descriptors in the service manager's store, and a journal there of what they are. It outlives
//! this process, however that ends.
//!
//! The journal is ahead of the descriptors: what is in the store and in no entry is nobody's.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::os::fd::AsFd;

use super::journal::{Entry, Journal};
use super::notify::Notify;
use super::store::{NotStored, Store, journal_name, removing, storing};
use crate::kept::Kept;

/// A change of what is kept.
pub(crate) enum Change<'a> {
    Keep(&'a Kept),
    Forget(&'a str),
    Lingers(&'a Kept),
}

/// An entry of the journal.
pub(crate) struct Place {
    /// Of its descriptors in the store; `None` where they have no place there.
    pub(crate) numbers: Option<Vec<u64>>,
    pub(crate) lingers: bool,
    /// In the how manyth comparison it was there.
    pub(crate) seen: u64,
}

/// Which daemon there is.
#[derive(Clone, Copy)]
pub(crate) struct StartedDaemon {
    pub(crate) epoch: u64,
    pub(crate) pid: i32,
    /// When, in ticks since the machine was started.
    pub(crate) started: Option<u64>,
}

impl StartedDaemon {
    fn entry(self) -> Entry<'static> {
        let Self { epoch, pid, started } = self;
        Entry::Daemon { epoch, pid, started }
    }
}

pub(crate) struct Stash {
    store: Store,
    journal: Journal,
    places: BTreeMap<String, Place>,
    /// How many of them have no place, and would be lost with this process.
    out: usize,
    comparisons: u64,
    daemon: Option<StartedDaemon>,
    /// The journal does not say what is so.
    behind: bool,
}

impl Stash {
    /// Goes on with what is there.
    pub(crate) fn new(store: Store, journal: Journal, places: BTreeMap<String, Place>) -> Self {
        let out = places.values().filter(|place| place.numbers.is_none()).count();
        Self { store, journal, places, out, comparisons: 0, daemon: None, behind: false }
    }

    /// Makes these changes, as one.
    pub(crate) fn change(&mut self, changes: &[Change<'_>], notify: &mut Notify) {
        let (mut entries, mut new, mut released) = (Vec::new(), Vec::new(), Vec::new());
        for change in changes {
            match *change {
                Change::Keep(kept) => {
                    let numbers = self.admit(kept, &mut new);
                    // After that, so that what both have in common stays.
                    released.extend(self.leave(&kept.key).unwrap_or_default());
                    entries.push(self.enter(kept, numbers, false));
                }
                Change::Lingers(kept) => {
                    let numbers = self.leave(&kept.key).or_else(|| self.admit(kept, &mut new));
                    entries.push(self.enter(kept, numbers, true));
                }
                Change::Forget(key) => {
                    if self.places.contains_key(key) {
                        released.extend(self.leave(key).unwrap_or_default());
                        entries.push(Entry::Forget { key: Cow::Borrowed(key) });
                    }
                }
            }
        }
        self.write(&entries);
        self.store.send(&new, notify);
        self.store.release(&released, notify);
    }

    fn enter<'a>(&mut self, kept: &'a Kept, numbers: Option<Vec<u64>>, lingers: bool) -> Entry<'a> {
        self.out += usize::from(numbers.is_none());
        let entry = entry(kept, numbers.clone().map(Cow::Owned), lingers);
        self.places.insert(kept.key.clone(), Place { numbers, lingers, seen: self.comparisons });
        entry
    }

    /// What its numbers were.
    fn leave(&mut self, key: &str) -> Option<Vec<u64>> {
        let place = self.places.remove(key)?;
        self.out -= usize::from(place.numbers.is_none());
        place.numbers
    }

    fn admit(&mut self, kept: &Kept, new: &mut Vec<u64>) -> Option<Vec<u64>> {
        let why = match self.store.admit(&kept.fds) {
            Ok((numbers, its)) => {
                new.extend(its);
                return Some(numbers);
            }
            Err(NotStored::Full) => format!(
                "the service manager's descriptor store is full (FileDescriptorStoreMax={})",
                self.store.most()
            ),
            Err(NotStored::Failed(error)) => error.to_string(),
        };
        if self.out == 0 {
            crate::log(format_args!(
                "{} would be lost with this process, and what comes after it: {why}",
                kept.key
            ));
        }
        None
    }

    fn write(&mut self, entries: &[Entry<'_>]) {
        if entries.is_empty() || self.behind {
            return;
        }
        if let Err(error) = self.journal.append(entries) {
            crate::log(format_args!("what is kept could not be written down, and is written anew: {error}"));
            self.behind = true;
        }
    }

    /// A daemon has been started.
    pub(crate) fn daemon_started(&mut self, daemon: StartedDaemon) {
        self.daemon = Some(daemon);
        self.write(&[daemon.entry()]);
    }

    /// Makes the changes that lie between what is here and what is kept.
    pub(crate) fn compare(&mut self, kept: &[Kept], lingering: &[Kept], notify: &mut Notify) {
        self.comparisons += 1;
        let mut changes = Vec::new();
        for (kept, lingers) in both(kept, lingering) {
            match self.places.get_mut(&kept.key) {
                Some(place) if place.lingers == lingers => place.seen = self.comparisons,
                _ if lingers => changes.push(Change::Lingers(kept)),
                _ => changes.push(Change::Keep(kept)),
            }
        }
        self.change(&changes, notify);
        let seen = self.comparisons;
        let gone = self.places.iter().filter(|(_, place)| place.seen != seen).map(|(key, _)| key.clone());
        for key in gone.collect::<Vec<_>>() {
            self.change(&[Change::Forget(&key)], notify);
        }
    }

    /// Stores what had no place before, where it has now, and writes the journal anew where it has become long.
    pub(crate) fn settle(&mut self, kept: &[Kept], lingering: &[Kept], notify: &mut Notify) {
        if self.out > 0 && self.store.has_room() {
            for (kept, _) in both(kept, lingering) {
                self.store_now(kept, notify);
            }
        }
        // What waits to be sent was before it.
        if (self.behind || self.journal.is_long()) && notify.flush() {
            self.write_anew(kept, lingering, notify);
        }
    }

    fn store_now(&mut self, kept: &Kept, notify: &mut Notify) {
        if self.places.get(&kept.key).is_none_or(|place| place.numbers.is_some()) {
            return;
        }
        let mut new = Vec::new();
        let Some(numbers) = self.admit(kept, &mut new) else { return };
        self.write(&[Entry::Stored { key: Cow::Borrowed(&kept.key), fds: Cow::Borrowed(&numbers) }]);
        self.store.send(&new, notify);
        if let Some(place) = self.places.get_mut(&kept.key) {
            place.numbers = Some(numbers);
            self.out -= 1;
        }
    }

    fn write_anew(&mut self, kept: &[Kept], lingering: &[Kept], notify: &mut Notify) {
        let mut entries: Vec<Entry<'_>> = Vec::new();
        entries.extend(self.daemon.map(StartedDaemon::entry));
        for (kept, lingers) in both(kept, lingering) {
            let numbers = self.places.get(&kept.key).and_then(|place| place.numbers.as_deref());
            entries.push(entry(kept, numbers.map(Cow::Borrowed), lingers));
        }
        let Ok(journal) = Journal::create(self.journal.number + 1, &entries) else { return };
        if !notify.tell_now(&storing(&journal_name(journal.number)), journal.as_fd()) {
            return;
        }
        notify.tell(removing(&journal_name(self.journal.number)), None);
        self.journal = journal;
        self.behind = false;
    }

    /// Everything is over: nothing of it is stored any more.
    pub(crate) fn clear(&mut self, notify: &mut Notify) {
        notify.tell(removing(&journal_name(self.journal.number)), None);
        let places = std::mem::take(&mut self.places);
        for place in places.into_values() {
            self.store.release(&place.numbers.unwrap_or_default(), notify);
        }
    }
}

/// Each, and whether it lingers.
fn both<'a>(kept: &'a [Kept], lingering: &'a [Kept]) -> impl Iterator<Item = (&'a Kept, bool)> {
    kept.iter().map(|kept| (kept, false)).chain(lingering.iter().map(|kept| (kept, true)))
}

fn entry<'a>(kept: &'a Kept, fds: Option<Cow<'a, [u64]>>, lingers: bool) -> Entry<'a> {
    let (key, value) = (Cow::Borrowed(kept.key.as_str()), Cow::Borrowed(&kept.value));
    if lingers { Entry::Lingers { key, value, fds } } else { Entry::Keep { key, value, fds } }
}
