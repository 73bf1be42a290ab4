//! What becomes of sessions that no daemon takes over: each meets its failure policy, in the holder itself.

use std::os::fd::BorrowedFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};
use std::{collections::BTreeMap, sync::Arc};

use pager::{
    FailurePolicy, Keeper, KeptConnection, KeptDescriptors, KeptSession, Notice, Observer, Pager, PagerError,
    PagerOptions, SessionEnd,
};

use crate::holder::remember_end;
use crate::keeping::{self, CONNECTION, END, Label, SESSION, SessionValue};
use crate::kept::{Kept, take};
use crate::left::Left;

/// How long all of it may take. What is not over then is killed with its process, or stays open with the holder.
const PATIENCE: Duration = Duration::from_secs(60);

/// What has ended.
enum Over {
    Session(u64, SessionEnd, bool),
    /// Of which no session was made.
    Connection,
}

/// Hears how sessions end.
#[derive(Debug)]
struct Ends(Sender<Over>);

impl Keeper for Ends {
    fn keep(&self, _: &KeptSession, _: KeptDescriptors<'_>) -> Result<(), PagerError> {
        Ok(())
    }

    fn forget(&self, id: u64, end: &SessionEnd, still_open: bool) {
        // Whoever waits for it is there until all have come, or the time is up.
        let _ = self.0.send(Over::Session(id, end.clone(), still_open));
    }

    fn keep_connection(&self, _: &KeptConnection, _: BorrowedFd<'_>) -> Result<(), PagerError> {
        Ok(())
    }

    fn forget_connection(&self, _: u64) {}
}

impl Observer for Ends {
    fn notice(&self, notice: Notice) {
        if matches!(notice, Notice::ServerClosed) {
            // As above. It is told last of all of what stood in for its server.
            let _ = self.0.send(Over::Connection);
        }
    }
}

/// Puts every kept session through its failure policy, and keeps how it ended in its place; how many there were.
pub(crate) fn apply(kept: &mut Vec<Kept>, lingering: &mut Vec<Kept>, why: &str) -> usize {
    let (ends, ended) = channel();
    let ends = Arc::new(Ends(ends));
    let keeper: Arc<dyn Keeper> = Arc::<Ends>::clone(&ends);
    let pager = match Pager::start(&PagerOptions { keeper: Some(keeper), ..PagerOptions::default() }) {
        Ok(pager) => pager,
        Err(error) => {
            crate::log(format_args!("failure policies cannot be applied: {error}"));
            return 0;
        }
    };
    let left = Left::take(kept);
    let accepted = left.servers(kept);
    pager.inherit(left.children);
    let sessions = take(kept, SESSION);
    let connections = take(kept, CONNECTION);
    let count = sessions.len() + connections.len();
    let mut open = BTreeMap::new();
    let mut over = Vec::new();
    for one in sessions {
        let Ok(value) = serde_json::from_value::<SessionValue>(one.value.clone()) else { continue };
        let id = value.session.id;
        let why = PagerError::Internal(why.to_owned());
        let observer: Arc<dyn Observer> = Arc::<Ends>::clone(&ends);
        let failed = keeping::descriptors(&value, &one.fds)
            .and_then(|descriptors| pager.fail_session(&value.session, descriptors, why, observer));
        match failed {
            Ok(()) => drop(open.insert(id, one)),
            Err(error) => over.push((id, keeping::never_resumed(error))),
        }
    }
    let mut turned_away = accepted.len();
    // No session has such a number: those of daemons are higher.
    for (id, (socket, server)) in (1..).zip(accepted) {
        let (why, observer) = (PagerError::Internal(why.to_owned()), Arc::<Ends>::clone(&ends));
        let policy = server.map_or(FailurePolicy::Poison, |(_, policy)| policy);
        pager.fail_connection(id, socket, policy, why, observer);
    }
    for Kept { value, mut fds, .. } in connections {
        let (Ok(value), Some(socket)) = (serde_json::from_value::<KeptConnection>(value), fds.pop()) else {
            continue;
        };
        let observer: Arc<dyn Observer> = Arc::<Ends>::clone(&ends);
        let why = PagerError::Internal(why.to_owned());
        pager.fail_connection(value.id, socket, policy_for(kept, &value), why, observer);
        turned_away += 1;
    }
    await_all(&ended, &mut open, turned_away, lingering, &mut over);
    // Those that are not over stay open here: their processes wait, and read no zeros.
    lingering.extend(open.into_values());
    for (id, end) in over {
        remember_end(kept, format!("{END}{id}"), keeping::ended(id, &end));
    }
    count
}

fn await_all(
    ended: &Receiver<Over>,
    open: &mut BTreeMap<u64, Kept>,
    mut turned_away: usize,
    lingering: &mut Vec<Kept>,
    over: &mut Vec<(u64, SessionEnd)>,
) {
    let until = Instant::now() + PATIENCE;
    while !(open.is_empty() && turned_away == 0) {
        match ended.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(Over::Session(id, end, still_open)) => {
                let one = open.remove(&id);
                lingering.extend(one.filter(|_| still_open));
                over.push((id, end));
            }
            Ok(Over::Connection) => turned_away = turned_away.saturating_sub(1),
            Err(_) => return,
        }
    }
}

/// The policy of the server that a connection has come to.
fn policy_for(kept: &[Kept], connection: &KeptConnection) -> FailurePolicy {
    let server = Label::of(&connection.label).and_then(|label| label.server);
    let mut servers = kept.iter().filter_map(Kept::server);
    servers.find(|&(number, _)| Some(number) == server).map_or(FailurePolicy::Poison, |(_, policy)| policy)
}
