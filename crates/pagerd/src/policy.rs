//! What becomes of sessions that no daemon takes over: each meets its failure policy, in the holder itself.

use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};
use std::{collections::BTreeMap, sync::Arc};

use pager::{
    Keeper, KeptDescriptors, KeptSession, Notice, Observer, Pager, PagerError, PagerOptions, SessionEnd,
};

use crate::control::Kept;
use crate::holder::remember_end;
use crate::keeping::{self, END, SESSION, SessionValue};

/// How long all of it may take. What is not over then is killed with its process, or stays open with the holder.
const PATIENCE: Duration = Duration::from_secs(60);

/// Hears how sessions end.
#[derive(Debug)]
struct Ends(Sender<(u64, SessionEnd, bool)>);

impl Keeper for Ends {
    fn keep(&self, _: &KeptSession, _: KeptDescriptors<'_>) -> Result<(), PagerError> {
        Ok(())
    }

    fn forget(&self, id: u64, end: &SessionEnd, still_open: bool) {
        // Whoever waits for it is there until all have come, or the time is up.
        let _ = self.0.send((id, end.clone(), still_open));
    }
}

impl Observer for Ends {
    fn notice(&self, _: Notice) {}
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
    let mut open = BTreeMap::new();
    let mut over = Vec::new();
    let (sessions, others) = std::mem::take(kept).into_iter().partition(|kept| kept.key.starts_with(SESSION));
    *kept = others;
    let sessions: Vec<Kept> = sessions;
    let count = sessions.len();
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
    let until = Instant::now() + PATIENCE;
    while !open.is_empty() {
        let Ok((id, end, still_open)) = ended.recv_timeout(until.saturating_duration_since(Instant::now()))
        else {
            break;
        };
        let one = open.remove(&id);
        lingering.extend(one.filter(|_| still_open));
        over.push((id, end));
    }
    // Those that are not over stay open here: their processes wait, and read no zeros.
    lingering.extend(open.into_values());
    for (id, end) in over {
        remember_end(kept, format!("{END}{id}"), keeping::ended(id, &end));
    }
    count
}
