//! A second copy of what is kept: its descriptors in the service manager's store, and a journal there of what they are. It outlives
//! this process, however that ends.
//!
//! The journal is ahead of the descriptors: what is in the store and in no entry is nobody's.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
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
    /// What would be lost with this process.
    out: BTreeSet<String>,
    daemon: Option<StartedDaemon>,
    /// The journal does not say what is so.
    behind: bool,
}

impl Stash {
    /// Goes on with what is there.
    pub(crate) fn new(store: Store, journal: Journal, places: BTreeMap<String, Place>) -> Self {
        let missing = |(key, place): (&String, &Place)| place.numbers.is_none().then(|| key.clone());
        let out = places.iter().filter_map(missing).collect();
        Self { store, journal, places, out, daemon: None, behind: false }
    }

    /// Makes these changes, as one.
    pub(crate) fn change(&mut self, changes: &[Change<'_>], notify: &mut Notify) {
        let (mut entries, mut new, mut released) = (Vec::new(), Vec::new(), Vec::new());
        for change in changes {
            match *change {
                Change::Keep(kept) => {
                    let numbers = self.admit(kept, &mut new);
                    let place = Place { numbers: numbers.clone(), lingers: false };
                    let before = self.places.insert(kept.key.clone(), place);
                    released.extend(before.and_then(|place| place.numbers).unwrap_or_default());
                    entries.push(Entry::Keep {
                        key: Cow::Borrowed(&kept.key),
                        value: Cow::Borrowed(&kept.value),
                        fds: numbers.map(Cow::Owned),
                    });
                }
                Change::Lingers(kept) => {
                    let before = self.places.remove(&kept.key).and_then(|place| place.numbers);
                    let numbers = before.or_else(|| self.admit(kept, &mut new));
                    let place = Place { numbers: numbers.clone(), lingers: true };
                    self.places.insert(kept.key.clone(), place);
                    entries.push(Entry::Lingers {
                        key: Cow::Borrowed(&kept.key),
                        value: Cow::Borrowed(&kept.value),
                        fds: numbers.map(Cow::Owned),
                    });
                }
                Change::Forget(key) => {
                    let Some(place) = self.places.remove(key) else { continue };
                    self.out.remove(key);
                    released.extend(place.numbers.unwrap_or_default());
                    entries.push(Entry::Forget { key: Cow::Borrowed(key) });
                }
            }
        }
        self.write(&entries);
        self.store.send(&new, notify);
        self.store.release(&released, notify);
    }

    fn admit(&mut self, kept: &Kept, new: &mut Vec<u64>) -> Option<Vec<u64>> {
        let why = match self.store.admit(&kept.fds) {
            Ok((numbers, its)) => {
                new.extend(its);
                self.out.remove(&kept.key);
                return Some(numbers);
            }
            Err(NotStored::Full) => format!(
                "the service manager's descriptor store is full (FileDescriptorStoreMax={})",
                self.store.most()
            ),
            Err(NotStored::Failed(error)) => error.to_string(),
        };
        if self.out.is_empty() {
            crate::log(format_args!(
                "{} would be lost with this process, and what comes after it: {why}",
                kept.key
            ));
        }
        self.out.insert(kept.key.clone());
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
        let is_there: BTreeSet<&str> = kept.iter().chain(lingering).map(|kept| kept.key.as_str()).collect();
        let lingers = |kept: &Kept| self.places.get(&kept.key).is_some_and(|place| place.lingers);
        let gone: Vec<String> =
            self.places.keys().filter(|key| !is_there.contains(key.as_str())).cloned().collect();
        let new = kept.iter().filter(|kept| !self.places.contains_key(&kept.key)).map(Change::Keep);
        let over = lingering.iter().filter(|kept| !lingers(kept)).map(Change::Lingers);
        let gone = gone.iter().map(|key| Change::Forget(key));
        let changes: Vec<Change<'_>> = new.chain(over).chain(gone).collect();
        self.change(&changes, notify);
    }

    /// Stores what had no place before, where it has now, and writes the journal anew where it has become long.
    pub(crate) fn settle(&mut self, kept: &[Kept], lingering: &[Kept], notify: &mut Notify) {
        if !self.out.is_empty() && self.store.has_room() {
            for kept in kept.iter().chain(lingering) {
                self.store_now(kept, notify);
            }
        }
        // What waits to be sent was before it.
        if (self.behind || self.journal.is_long()) && notify.flush() {
            self.write_anew(kept, lingering, notify);
        }
    }

    fn store_now(&mut self, kept: &Kept, notify: &mut Notify) {
        if !self.out.contains(&kept.key) {
            return;
        }
        let mut new = Vec::new();
        let Some(numbers) = self.admit(kept, &mut new) else { return };
        self.write(&[Entry::Stored { key: Cow::Borrowed(&kept.key), fds: Cow::Borrowed(&numbers) }]);
        self.store.send(&new, notify);
        if let Some(place) = self.places.get_mut(&kept.key) {
            place.numbers = Some(numbers);
        }
    }

    fn write_anew(&mut self, kept: &[Kept], lingering: &[Kept], notify: &mut Notify) {
        let numbers = |key: &str| {
            let numbers = self.places.get(key).and_then(|place| place.numbers.as_deref());
            numbers.map(Cow::Borrowed)
        };
        let kept = kept.iter().map(|Kept { key, value, .. }| Entry::Keep {
            key: Cow::Borrowed(key),
            value: Cow::Borrowed(value),
            fds: numbers(key),
        });
        let lingering = lingering.iter().map(|Kept { key, value, .. }| Entry::Lingers {
            key: Cow::Borrowed(key),
            value: Cow::Borrowed(value),
            fds: numbers(key),
        });
        let daemon = self.daemon.map(StartedDaemon::entry);
        let entries = daemon.into_iter().chain(kept).chain(lingering);
        let Ok(journal) = Journal::create(self.journal.number + 1, entries) else { return };
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
