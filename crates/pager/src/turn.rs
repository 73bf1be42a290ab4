//! A session's turn: what is waiting is read, then faults are answered for a while.
//!
//! Everybody's events are read before anybody's faults are answered, and no session is answered for longer than its slice
//! while others may wait. So a storm of faults costs the other sessions one slice a turn, however many threads make it.

use std::time::{Duration, Instant};

use crate::error::PagerError;
use crate::following::{is_short_of_descriptors, reason_of, unreadable};
use crate::policy::EndReason;
use crate::session::{Context, Session};
use crate::spin::Look;

/// How long one session's faults are answered before others have their turn. One page takes about 5 us, a window 15.
const SLICE: Duration = Duration::from_micros(10);
/// The same where there is no other session: only requests and new connections wait.
const LONG_SLICE: Duration = Duration::from_millis(1);
/// Messages read in one turn, and faults queued before no more are read, where there is no other session.
const MOST_MESSAGES: usize = 1024;

impl Session {
    /// Reads what is waiting. Removals count from here on, for faults that were read before them as well: the kernel hands
    /// out faults before events that are older. Of a storm, a part stays for the next turn: while a removal is unread the
    /// kernel installs nothing, so that what is answered before it is put off and not wrong.
    pub(crate) fn read(&mut self, cx: &mut Context<'_>) {
        let mut ring = self.kept.as_deref_mut().and_then(|kept| kept.lend_ring(cx.events.capacity()));
        let events = ring.as_mut().unwrap_or(&mut *cx.events);
        let most = if cx.alone { MOST_MESSAGES } else { events.most() };
        let mut read = 0;
        let mut failure: Option<(EndReason, PagerError)> = None;
        let mut drained = false;
        self.holding.unreadable = false;
        while !drained && read < most && self.queue.len() < most {
            if let Some(kept) = self.kept.as_deref_mut() {
                kept.begin_read();
            }
            match self.uffd.read_events(events) {
                Ok(count) => {
                    read += count;
                    // A read that had room left has emptied the queue: asking again would cost a system call.
                    drained = count < events.most();
                }
                Err(cause) if is_short_of_descriptors(&cause) && cx.spare.take().is_some() => {
                    // Who has forked waits until that is read: its child gets this one, and no more.
                    self.holding.crowded = true;
                    continue;
                }
                Err(cause) => {
                    self.holding.unreadable = true;
                    failure = Some(unreadable(cause));
                    break;
                }
            }
            self.watch.start();
            while let Some(event) = events.take() {
                if let Some(kept) = self.kept.as_deref_mut() {
                    kept.next_message();
                }
                if let Err(error) = self.note(event, cx.forked) {
                    failure = failure.or(Some((reason_of(&error), error)));
                }
                if self.kept.is_some() {
                    events.finish();
                }
            }
        }
        self.holding.crowded = false;
        if let (Some(ring), Some(kept)) = (ring, self.kept.as_deref_mut()) {
            kept.give_back(ring);
        }
        if let Some((reason, error)) = failure {
            self.fail(reason, error);
            // The message that led to it is finished with.
            self.keep_ending();
        }
    }

    /// Answers queued faults, at least one, until the slice that begins now (`started`) is over. Whether some are left.
    pub(crate) fn answer_queued(&mut self, started: Instant, cx: &mut Context<'_>) -> bool {
        if self.queue.is_empty() {
            return false;
        }
        let slice = if cx.alone { LONG_SLICE } else { SLICE };
        let mut turn = self.answer_some(started, started, slice, cx);
        while self.queue.is_empty() && turn.saturating_duration_since(started) < slice && self.reads_again(cx)
        {
            turn = self.answer_some(turn, started, slice, cx);
        }
        self.info.stats.busy_ns.add(turn.saturating_duration_since(started).as_nanos() as u64);
        !self.queue.is_empty()
    }

    /// Answers queued faults, at least one, as long as the slice lasts. When the last was answered.
    fn answer_some(
        &mut self,
        mut turn: Instant,
        started: Instant,
        slice: Duration,
        cx: &mut Context<'_>,
    ) -> Instant {
        // Events may have been read since: a page that was installed then can be missing again.
        self.answered.clear();
        self.elsewhere.batch += 1;
        while let Some(wanted) = self.queue.pop_front() {
            if let Some(read) = wanted.read {
                self.info.stats.latencies.queue.record(turn.saturating_duration_since(read));
            }
            self.watch.set(turn);
            self.answer(wanted, cx);
            turn = self.watch.end();
            if turn.saturating_duration_since(started) >= slice {
                break;
            }
        }
        turn
    }

    /// Reads without waiting, where that hits: on the CPU of a thread that was woken, that thread has often run, and faults
    /// again, before this one goes on. Whether faults came.
    fn reads_again(&mut self, cx: &mut Context<'_>) -> bool {
        // What is to be brought without faults comes between two of them.
        if !cx.alone || self.has_ahead() || !self.again.is_due() {
            return false;
        }
        self.read(cx);
        let found = !self.queue.is_empty();
        self.again.looked(if found { Look::Hit } else { Look::Miss });
        found
    }

    /// Queues the parked faults again, if it is time. Whether it was.
    pub(crate) fn retry(&mut self, now: Instant, cx: &mut Context<'_>) -> bool {
        self.release_faults();
        let Some(pages) = self.deferred.take_due(now) else { return false };
        if cx.alone {
            // The thread that changes the address space has to run before anything can be installed. Others would have
            // to wait until everything that can run has run; for them the pauses do.
            std::thread::yield_now();
        }
        self.queue.extend(pages);
        self.read(cx);
        true
    }
}
