//! Faults that are answered outside of this crate: their order, redelivery, deadlines, and answers that come too late.
//!
//! Everything has its place from the start and nothing ever grows: the thread that watches over a handler must not allocate
//! (in the middle of a fork(3) it would wait for the fork, which waits for it). When the places are used up, messages stay
//! in the kernel until some are free again.
//!
//! A fault is named by its place and the generation of that place, so an answer that comes late never reaches another
//! fault. Several messages about one page, of whichever threads, are one fault.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use uffd::{Event, Userfaultfd};

use crate::deferred::{Kind, Wanted};
use crate::page_index::PageIndex;

/// Faults that can be open, and other messages that can wait for their delivery, at one time.
const MOST_OPEN: usize = 4096;
const MOST_NOTICES: usize = 4096;
const PLACE_BITS: u32 = 12;

/// Pauses before a fault is delivered again: none at first, then doubling.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// A mapping: faults in it are about pages of its size.
#[derive(Debug, Clone, Copy)]
pub struct Area {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Bytes of a page.
    pub page_size: u64,
}

/// A fault as it is delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenFault {
    /// Its name.
    pub id: u64,
    /// What was touched, as the kernel told.
    pub address: u64,
    /// Start of its page.
    pub page: u64,
    /// Bytes of the page.
    pub page_size: u64,
    /// Bits: 0 to 2 the kind (missing, write-protect, minor), 16 a write, 32 its memory was removed, unmapped or moved.
    pub flags: u32,
    /// The thread, where it is known.
    pub thread: u32,
}

/// Its memory went while it was open.
const REMOVED: u32 = 32;
const WRITE: u32 = 16;

/// What there is to tell besides faults, and before them.
#[derive(Debug)]
pub enum Delivery {
    /// A message of the address space, as it came.
    Event(Event),
    /// A delivered fault is not to be answered any more; it is delivered again.
    Stale(u64),
    /// Nobody answered a fault in time, and the failure policy was applied. Of one that was delivered, its name.
    Expired(OpenFault),
    /// A fault of the thread that answers was answered with zeros.
    SelfFault(OpenFault),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    /// In the queue of those to be delivered.
    Ready,
    /// Delivered, and not answered.
    Given,
    /// To be delivered again at its time.
    Parked(Instant),
}

#[derive(Debug, Clone, Copy)]
struct Place {
    generation: u64,
    state: State,
    wanted: Wanted,
    address: u64,
    page_size: u64,
    thread: u32,
    removed: bool,
    attempts: u32,
    since: Instant,
}

/// See the module.
#[derive(Debug)]
pub struct HandlerQueue {
    places: Vec<Place>,
    free: Vec<u32>,
    /// Places by page and kind.
    known: PageIndex,
    ready: VecDeque<u32>,
    notices: VecDeque<Delivery>,
    areas: Vec<Area>,
    page_size: u64,
    /// Places whose faults are parked.
    parked: Vec<u32>,
    /// No open fault is older.
    oldest: Instant,
}

impl HandlerQueue {
    /// Room for everything it will ever hold; `page_size` is that of memory outside of any [`Area`].
    #[must_use]
    pub fn new(page_size: u64, now: Instant) -> Self {
        let nothing = Place {
            generation: 0,
            state: State::Free,
            wanted: Wanted::missing(0),
            address: 0,
            page_size: 0,
            thread: 0,
            removed: false,
            attempts: 0,
            since: now,
        };
        Self {
            places: vec![nothing; MOST_OPEN],
            free: (0..MOST_OPEN as u32).rev().collect(),
            known: PageIndex::new(MOST_OPEN),
            ready: VecDeque::with_capacity(MOST_OPEN),
            notices: VecDeque::with_capacity(MOST_NOTICES + MOST_OPEN * 2),
            areas: Vec::new(),
            page_size,
            parked: Vec::with_capacity(MOST_OPEN),
            oldest: now,
        }
    }

    /// Which mappings there are.
    pub fn set_areas(&mut self, areas: Vec<Area>) {
        self.areas = areas;
    }

    /// Messages it can take.
    #[must_use]
    pub fn room(&self) -> usize {
        self.free.len().min(MOST_NOTICES.saturating_sub(self.notices.len()))
    }

    /// Faults that are open.
    #[must_use]
    pub fn open(&self) -> usize {
        MOST_OPEN - self.free.len()
    }

    /// Takes a message. There has to be room.
    pub fn push(&mut self, event: Event, now: Instant) {
        if let Event::Fault(fault) = &event {
            let page_size = self.page_size_at(fault.address);
            let page = fault.address & !(page_size - 1);
            let wanted = Wanted { address: page, kind: fault.kind.into(), write: fault.write, read: None };
            return self.open_fault(wanted, fault.address, page_size, fault.thread_id.unwrap_or(0), now);
        }
        match &event {
            Event::Remove { start, end } | Event::Unmap { start, end } => self.went(*start, *end),
            Event::Remap { from, len, .. } => self.went(*from, from.saturating_add(*len)),
            Event::Fault(_) | Event::Fork { .. } | Event::Unknown { .. } => {}
        }
        self.notices.push_back(Delivery::Event(event));
    }

    /// The memory that an address belongs to, as far as it was told.
    #[must_use]
    pub fn area_of(&self, address: u64) -> Option<Area> {
        self.areas.iter().find(|area| (area.start..area.start + area.len).contains(&address)).copied()
    }

    fn page_size_at(&self, address: u64) -> u64 {
        self.area_of(address).map_or(self.page_size, |area| area.page_size)
    }

    fn open_fault(&mut self, wanted: Wanted, address: u64, page_size: u64, thread: u32, now: Instant) {
        let places = &self.places;
        let is_same = |index: u16| {
            let place = places.get(usize::from(index));
            place.is_some_and(|place| {
                (place.wanted.address, place.wanted.kind) == (wanted.address, wanted.kind)
            })
        };
        if let Some(index) = self.known.find(wanted.address, is_same) {
            if let Some(place) = self.places.get_mut(usize::from(index)) {
                place.wanted.write |= wanted.write;
                place.thread = thread;
            }
            return;
        }
        let Some(index) = self.free.pop() else { return };
        let Some(place) = self.places.get_mut(index as usize) else { return };
        let generation = place.generation + 1;
        *place = Place {
            generation,
            state: State::Ready,
            wanted,
            address,
            page_size,
            thread,
            removed: false,
            attempts: 0,
            since: now,
        };
        self.known.insert(wanted.address, index as u16);
        self.ready.push_back(index);
    }

    /// Memory was removed, unmapped or moved away: what is open there is told so, and delivered again if it was delivered.
    fn went(&mut self, start: u64, end: u64) {
        if self.open() == 0 {
            return;
        }
        for index in 0..self.places.len() {
            let Some(place) = self.places.get_mut(index) else { return };
            let (from, to) = (place.wanted.address, place.wanted.address + place.page_size);
            if place.state == State::Free || to <= start || from >= end {
                continue;
            }
            place.removed = true;
            if place.state == State::Given {
                let id = id_of(index, place);
                place.generation += 1;
                place.state = State::Ready;
                self.ready.push_back(index as u32);
                self.notices.push_back(Delivery::Stale(id));
            }
        }
    }

    /// The next thing to tell that is no fault to answer.
    pub fn deliver(&mut self) -> Option<Delivery> {
        self.notices.pop_front()
    }

    /// The next fault to answer, when nothing else is left.
    pub fn deliver_fault(&mut self) -> Option<OpenFault> {
        if !self.notices.is_empty() {
            return None;
        }
        while let Some(index) = self.ready.pop_front() {
            let Some(place) = self.places.get_mut(index as usize) else { continue };
            // Answered, or failed, while it was in the queue.
            if place.state != State::Ready {
                continue;
            }
            place.state = State::Given;
            return Some(fault_of(index as usize, place));
        }
        None
    }

    /// Whether there is something to tell.
    #[must_use]
    pub fn has_deliveries(&self) -> bool {
        !self.notices.is_empty() || !self.ready.is_empty()
    }

    /// A fault that was delivered and is to be answered; `None` when the answer comes too late.
    #[must_use]
    pub fn given(&self, id: u64) -> Option<OpenFault> {
        let index = index_of(id);
        let place = self.places.get(index)?;
        let is_open = place.state == State::Given && id_of(index, place) == id;
        is_open.then(|| fault_of(index, place))
    }

    /// It was answered.
    pub fn close(&mut self, id: u64) {
        if self.given(id).is_some() {
            self.forget(index_of(id));
        }
    }

    /// Leaves it to be delivered again after a pause that grows with each time.
    pub fn park(&mut self, id: u64, now: Instant) -> bool {
        if self.given(id).is_none() {
            return false;
        }
        let Some(place) = self.places.get_mut(index_of(id)) else { return false };
        let pause = match place.attempts {
            0 => Duration::ZERO,
            attempts => FIRST_PAUSE.saturating_mul(1 << (attempts - 1).min(16)).min(LONGEST_PAUSE),
        };
        place.attempts = place.attempts.saturating_add(1);
        place.generation += 1;
        place.state = State::Parked(now + pause);
        self.parked.push(index_of(id) as u32);
        true
    }

    /// Makes parked faults whose time has come ready; when the next one is due.
    pub fn unpark(&mut self, now: Instant) -> Option<Instant> {
        let Self { parked, places, ready, .. } = self;
        let mut next: Option<Instant> = None;
        parked.retain(|&index| {
            let Some(place) = places.get_mut(index as usize) else { return false };
            let State::Parked(due) = place.state else { return false };
            if due <= now {
                place.state = State::Ready;
                ready.push_back(index);
                return false;
            }
            next = Some(next.map_or(due, |next| next.min(due)));
            true
        });
        next
    }

    /// A fault that was read `age` ago and is not answered: it is closed and becomes the caller's. To be told of by
    /// [`HandlerQueue::tell`].
    pub fn expire(&mut self, now: Instant, age: Duration) -> Option<OpenFault> {
        if self.open() == 0 {
            self.oldest = now;
        }
        if now.duration_since(self.oldest) < age {
            return None;
        }
        let open = self.places.iter().enumerate().filter(|(_, place)| place.state != State::Free);
        let (index, since) =
            open.map(|(index, place)| (index, place.since)).min_by_key(|&(_, since)| since)?;
        self.oldest = since;
        if now.duration_since(since) < age {
            return None;
        }
        self.take(index)
    }

    /// A fault of this thread that was not delivered: it is closed and becomes the caller's.
    pub fn take_of_thread(&mut self, thread: u32) -> Option<OpenFault> {
        if self.ready.is_empty() {
            return None;
        }
        let index = *self.ready.iter().find(|&&index| {
            let place = self.places.get(index as usize);
            place.is_some_and(|place| place.state == State::Ready && place.thread == thread)
        })?;
        self.take(index as usize)
    }

    /// The fault that has been read and not delivered for the longest time, and since when.
    #[must_use]
    pub fn oldest_unseen(&self) -> Option<(u32, Instant)> {
        let &index = self.ready.front()?;
        let place = self.places.get(index as usize)?;
        Some((place.thread, place.since))
    }

    /// That fault: it is closed and becomes the caller's.
    pub fn take_unseen(&mut self) -> Option<OpenFault> {
        let &index = self.ready.front()?;
        self.take(index as usize)
    }

    /// Any fault that is open: it is closed and becomes the caller's.
    pub fn take_any(&mut self) -> Option<OpenFault> {
        let index = self.places.iter().position(|place| place.state != State::Free)?;
        self.take(index)
    }

    /// Something to tell that did not come from the kernel. There is always room for one of each open fault.
    pub fn tell(&mut self, notice: Delivery) {
        if self.notices.len() < self.notices.capacity() {
            self.notices.push_back(notice);
        }
    }

    fn take(&mut self, index: usize) -> Option<OpenFault> {
        let place = self.places.get(index)?;
        let fault = fault_of(index, place);
        self.forget(index);
        Some(fault)
    }

    fn forget(&mut self, index: usize) {
        let Some(place) = self.places.get_mut(index) else { return };
        match place.state {
            State::Free => return,
            State::Parked(_) => self.parked.retain(|&other| other as usize != index),
            // Few are taken out of the queue like this, and a place must not be in it twice.
            State::Ready => self.ready.retain(|&other| other as usize != index),
            State::Given => {}
        }
        place.state = State::Free;
        let page = place.wanted.address;
        let page_of =
            |other: u16| self.places.get(usize::from(other)).map_or(0, |place| place.wanted.address);
        self.known.remove(page, index as u16, page_of);
        self.free.push(index as u32);
    }
}

fn id_of(index: usize, place: &Place) -> u64 {
    place.generation << PLACE_BITS | index as u64
}

fn index_of(id: u64) -> usize {
    (id & ((1 << PLACE_BITS) - 1)) as usize
}

fn fault_of(index: usize, place: &Place) -> OpenFault {
    let kind = match place.wanted.kind {
        Kind::Missing => 0,
        Kind::WriteProtect => 1,
        Kind::Minor => 2,
    };
    let write = if place.wanted.write { WRITE } else { 0 };
    let removed = if place.removed { REMOVED } else { 0 };
    OpenFault {
        id: id_of(index, place),
        address: place.address,
        page: place.wanted.address,
        page_size: place.page_size,
        flags: kind | write | removed,
        thread: place.thread,
    }
}

impl OpenFault {
    /// Whether it is about a page that is there but protected.
    #[must_use]
    pub fn is_write_protect(&self) -> bool {
        self.flags & 3 == 1
    }

    /// Whether its memory went while it was open.
    #[must_use]
    pub fn is_removed(&self) -> bool {
        self.flags & REMOVED != 0
    }

    /// Makes the threads that wait for it look again.
    pub(crate) fn wake(&self, uffd: &Userfaultfd) {
        // Nobody waits where that fails.
        let _ = uffd.wake(self.page, self.page_size);
    }
}

#[cfg(test)]
mod tests;
