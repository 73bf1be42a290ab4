//! What a holder makes of what an earlier one has stored: everything is kept again. Of what did not come back as a whole nobody
//! makes something else: a session meets its failure policy, with that as its reason.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use pager::PagerError;
use serde_json::Value;
use uffd::fd_passing::in_memfd;
use uffd::liveness::PidFd;

use super::custody::{Custody, remember_end};
use super::journal::{Entry, Journal};
use super::notify::Notify;
use super::stash::{Place, StartedDaemon, Stash};
use super::store::{self, Store, journal_name, removing, storing};
use crate::keeping::{self, END, SESSION, SOURCE, SessionValue};
use crate::kept::Kept;
use crate::policy;

/// What a journal says.
#[derive(Default)]
struct Said {
    /// In the order in which they came; without those that were forgotten.
    entries: Vec<Option<Recorded>>,
    /// Where each is.
    places: BTreeMap<String, usize>,
    daemon: Option<StartedDaemon>,
}

struct Recorded {
    key: String,
    value: Value,
    numbers: Option<Vec<u64>>,
    lingers: bool,
}

impl Said {
    fn of(entries: Vec<Entry<'static>>) -> Self {
        let mut said = Self::default();
        entries.into_iter().for_each(|entry| said.take(entry));
        said
    }

    fn take(&mut self, entry: Entry<'static>) {
        let (key, value, fds, lingers) = match entry {
            Entry::Keep { key, value, fds } => (key, value, fds, false),
            Entry::Lingers { key, value, fds } => (key, value, fds, true),
            Entry::Stored { key, fds } => {
                if let Some(place) = self.place(&key).and_then(Option::as_mut) {
                    place.numbers = Some(fds.into_owned());
                }
                return;
            }
            Entry::Forget { key } => return self.forget(&key),
            Entry::Daemon { epoch, pid, started } => {
                self.daemon = Some(StartedDaemon { epoch, pid, started });
                return;
            }
        };
        self.forget(&key);
        let (key, value) = (key.into_owned(), value.into_owned());
        self.places.insert(key.clone(), self.entries.len());
        let numbers = fds.map(Cow::into_owned);
        self.entries.push(Some(Recorded { key, value, numbers, lingers }));
    }

    fn place(&mut self, key: &str) -> Option<&mut Option<Recorded>> {
        self.places.get(key).and_then(|&at| self.entries.get_mut(at))
    }

    fn forget(&mut self, key: &str) {
        if let Some(place) = self.place(key) {
            *place = None;
        }
    }
}

/// Something of which not everything came back.
struct Broken {
    key: String,
    value: Value,
    /// What came, each in its place.
    fds: Vec<Option<OwnedFd>>,
}

impl Custody {
    /// Keeps what was stored, and from now on stores what is kept, where there are places (`FDSTORE`). Which daemon there was before.
    pub(crate) fn restore(notify: Notify, stored: Vec<(String, OwnedFd)>) -> (Self, Option<StartedDaemon>) {
        let most = std::env::var("FDSTORE").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
        let mut custody = Self::new(notify);
        if stored.is_empty() && (most == 0 || !custody.notify.is_heard()) {
            return (custody, None);
        }
        let (mut journals, mut fds) = (Vec::new(), Vec::new());
        for (name, fd) in stored {
            match (store::journal_of(&name), store::fd_of(&name)) {
                (Some(number), _) => journals.push((number, fd)),
                (None, Some(number)) => fds.push((number, fd)),
                (None, None) => {}
            }
        }
        let next = journals.iter().map(|(number, _)| number + 1).max().unwrap_or(1);
        let mut store = Store::new(most, fds);
        let mut read = None;
        // There may be two: the later one is whole, and takes the place of the one before it.
        for (number, fd) in journals {
            match Journal::open(number, fd) {
                Ok(journal) => {
                    let is_later = read.as_ref().is_none_or(|(read, _): &(Journal, _)| read.number < number);
                    let before = if is_later { read.replace(journal) } else { Some(journal) };
                    if let Some((before, _)) = before {
                        custody.notify.tell(removing(&journal_name(before.number)), None);
                    }
                }
                Err(why) => {
                    crate::log(format_args!(
                        "{} in the service manager's store is not understood: what it speaks of stays there. {why}",
                        journal_name(number)
                    ));
                    store.leave_unused();
                }
            }
        }
        let (journal, entries) = match read {
            Some(read) => read,
            None => match custody.begin(next, &mut store) {
                Ok(journal) => (journal, Vec::new()),
                Err(error) => {
                    crate::log(format_args!("nothing is put into the service manager's store: {error}"));
                    return (custody, None);
                }
            },
        };
        let said = Said::of(entries);
        let daemon = said.daemon;
        custody.take_back(store, journal, said);
        (custody, daemon)
    }

    /// Without a journal nothing is known of what was stored: it stays open, so that nobody whose memory it is reads zeros.
    fn begin(&mut self, number: u64, store: &mut Store) -> std::io::Result<Journal> {
        if store.is_used() {
            crate::log(format_args!("nothing says what is in the service manager's store: it stays there"));
            store.leave_unused();
        }
        let journal = Journal::create(number, &[])?;
        self.notify.tell(storing(&journal_name(number)), Some(journal.as_fd()));
        Ok(journal)
    }

    fn take_back(&mut self, mut store: Store, journal: Journal, said: Said) {
        let mut places = BTreeMap::new();
        let mut broken = Vec::new();
        for Recorded { key, value, numbers, lingers } in said.entries.into_iter().flatten() {
            let stored = numbers.clone().unwrap_or_default();
            store.use_all(&stored);
            let fds: Vec<Option<OwnedFd>> = stored.iter().map(|&number| store.get(number)).collect();
            let is_whole = numbers.is_some() && fds.iter().all(Option::is_some);
            places.insert(key.clone(), Place { numbers, lingers, seen: 0 });
            if !is_whole {
                broken.push((Broken { key, value, fds }, lingers));
                continue;
            }
            let kept = Kept { key, value, fds: fds.into_iter().flatten().collect() };
            if lingers { self.lingering.push(kept) } else { self.kept.push(kept) }
        }
        store.sweep_found(&mut self.notify);
        self.stash = Some(Stash::new(store, journal, places));
        self.settle_broken(broken);
        // What was lost is not written down any more.
        self.compare();
    }

    /// Sessions meet their policy here and now; a source that cannot be opened is its daemon's to tell of.
    fn settle_broken(&mut self, broken: Vec<(Broken, bool)>) {
        const WHY: &str = "not all of its descriptors came back from the service manager's store";
        let mut sessions = Vec::new();
        for (Broken { key, value, fds }, lingers) in broken {
            crate::log(format_args!("{key}: {WHY}"));
            if key.starts_with(SOURCE) {
                self.kept.push(Kept { key, value, fds: fds.into_iter().flatten().collect() });
            } else if key.starts_with(SESSION)
                && let Ok(session) = serde_json::from_value::<SessionValue>(value)
            {
                let id = session.session.id;
                match mended(session, fds) {
                    Ok((value, fds)) if lingers => self.lingering.push(Kept { key, value, fds }),
                    Ok((value, fds)) => sessions.push(Kept { key, value, fds }),
                    Err(process) => {
                        // Nothing can be poisoned any more: what it misses would be waited for in vain, or read zero.
                        let killed =
                            process.is_some_and(|process| process.send_signal(libc::SIGKILL).is_ok());
                        let what = if killed { "was killed" } else { "is left to itself" };
                        let error = PagerError::Internal(format!(
                            "{WHY}, nor did its userfaultfd: its process {what}"
                        ));
                        let end = keeping::never_resumed(error);
                        let _ = remember_end(&mut self.kept, format!("{END}{id}"), keeping::ended(id, &end));
                    }
                }
            }
        }
        if !sessions.is_empty() {
            policy::apply(&mut sessions, &mut self.lingering, WHY);
            self.kept.append(&mut sessions);
        }
    }

    fn new(notify: Notify) -> Self {
        Self { kept: Vec::new(), lingering: Vec::new(), stash: None, notify }
    }
}

/// A session with what came of it, as its policy can be applied; or its process, where nothing can.
fn mended(
    mut session: SessionValue,
    fds: Vec<Option<OwnedFd>>,
) -> Result<(Value, Vec<OwnedFd>), Option<PidFd>> {
    let mut fds = fds.into_iter();
    let mut next = || fds.next().flatten();
    let (uffd, record) = (next(), next());
    let process = session.process.then(&mut next).flatten();
    let connection = session.connection.then(&mut next).flatten();
    session.process = process.is_some();
    session.connection = connection.is_some();
    // One that says nothing is as good as none.
    let record = record.or_else(|| in_memfd(c"uffd-no-record", b"").ok());
    match (uffd, record, serde_json::to_value(session)) {
        (Some(uffd), Some(record), Ok(value)) => {
            Ok((value, [uffd, record].into_iter().chain(process).chain(connection).collect()))
        }
        _ => Err(process.and_then(|process| PidFd::from_fd(process).ok())),
    }
}
