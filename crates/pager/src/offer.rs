//! Memory that was handed over and is not served yet.
//!
//! From here on its process waits for answers: whatever happens to an offer, it becomes a session, or its memory is
//! put through the failure policy. It is never just closed, which would leave the process to wait for ever, or to read
//! zeros.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use uffd::Userfaultfd;

use crate::address_map::AddressMap;
use crate::error::PagerError;
use crate::fill::FillOptions;
use crate::firecracker::Handshake;
use crate::pager::SOURCE_TIMEOUT;
use crate::policy::FailurePolicy;
use crate::server::Image;
use crate::session::Parts;
use crate::source::LostSource;
use crate::supervise::{Peer, Supervised};
use crate::trace::WorkingSet;

/// Memory of a refused process that is poisoned page by page (its states take two bits a page). One that has more is
/// killed instead: what it claims is then too large to be kept track of.
const MOST_POISONED: u64 = 256 << 30;

/// A uffd, and what its process said of it.
pub(crate) struct Offer {
    pub(crate) server: u64,
    pub(crate) peer: Peer,
    pub(crate) process: Option<Supervised>,
    /// Absent where it never said, or cannot be understood.
    pub(crate) handshake: Option<Handshake>,
    /// When its handshake has to be over.
    pub(crate) deadline: Instant,
    /// Its observer has been asked about it.
    pub(crate) asked: bool,
    /// Why it is to be turned away whatever it said.
    pub(crate) refusal: Option<PagerError>,
    pub(crate) uffd: Userfaultfd,
    pub(crate) connection: OwnedFd,
    /// Bytes of its handshake that are in the connection's queue still, and with them its descriptors.
    pub(crate) unread: usize,
}

impl Offer {
    /// Checks the regions against the kernel and an image of `source_len` bytes.
    ///
    /// # Errors
    ///
    /// What is wrong with them.
    pub(crate) fn map(&self, source_len: u64) -> Result<AddressMap, PagerError> {
        let (regions, page_size) =
            self.handshake.as_ref().map_or((&[][..], 0), |said| (&said.regions[..], said.page_size));
        let map = AddressMap::new(regions, page_size, source_len)?;
        for region in regions {
            // WAKE is the kernel's own check of a range: it touches nothing and fails only on impossible ones.
            self.uffd.wake(region.address, region.len).map_err(|cause| PagerError::Kernel {
                address: region.address,
                len: region.len,
                cause,
            })?;
        }
        Ok(map)
    }

    /// What a session of it is made of.
    pub(crate) fn into_parts(self, id: u64, map: AddressMap, image: Image) -> Parts {
        Parts {
            id,
            label: image.label,
            uffd: self.uffd,
            map,
            source: image.source,
            policy: image.policy,
            owner: None,
            backing: None,
            window: image.window,
            fill: image.fill,
            source_timeout: image.source_timeout,
            peer: self.peer,
            process: self.process,
            parent: None,
            minor: None,
            tracking: None,
            all_there: false,
            own: false,
            connection: Some(self.connection),
            working_set: image.working_set,
        }
    }

    /// What a session is made of that only ends. Without a map nobody knows what is to be poisoned.
    pub(crate) fn into_refused(self, id: u64, policy: FailurePolicy) -> (Parts, bool) {
        let said: u64 = self
            .handshake
            .iter()
            .flat_map(|said| &said.regions)
            .map(|region| region.len)
            .fold(0, u64::saturating_add);
        let map = if said <= MOST_POISONED { self.map(u64::MAX).ok() } else { None };
        let known = map.is_some();
        let why = PagerError::Internal("a process that was turned away has no image".to_owned());
        // One window for all: no fault is answered from a source any more.
        let image = Image {
            label: String::new(),
            source: Arc::new(LostSource::new(why)),
            policy,
            window: Some(uffd::page_size() as u64),
            fill: FillOptions::default(),
            source_timeout: SOURCE_TIMEOUT,
            working_set: WorkingSet::default(),
        };
        (self.into_parts(id, map.unwrap_or_else(AddressMap::empty), image), known)
    }

    /// The descriptor that becomes readable when its process has exited.
    pub(crate) fn process_fd(&self) -> Option<BorrowedFd<'_>> {
        self.process.as_ref().map(AsFd::as_fd)
    }
}
