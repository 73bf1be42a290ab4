//! Messages to the event loop, and the bell that wakes it for them.

use crate::sync::mpsc::{Receiver, Sender, channel};
use crate::sync::{Arc, Bell, Mutex, PoisonError};

/// The side that sends: any number of threads.
pub(crate) struct Mailbox<M> {
    // A Mutex only because Sender is shared between threads; held for the length of a push.
    sender: Arc<Mutex<Sender<M>>>,
    bell: Arc<Bell>,
}

impl<M> Clone for Mailbox<M> {
    fn clone(&self) -> Self {
        Self { sender: Arc::clone(&self.sender), bell: Arc::clone(&self.bell) }
    }
}

impl<M> Mailbox<M> {
    /// Both sides.
    pub(crate) fn new(bell: Bell) -> (Self, Inbox<M>) {
        let (sender, receiver) = channel();
        let bell = Arc::new(bell);
        let mailbox = Self { sender: Arc::new(Mutex::new(sender)), bell: Arc::clone(&bell) };
        (mailbox, Inbox { receiver, bell })
    }

    pub(crate) fn send(&self, message: M) {
        // An event loop that is gone has closed its sessions; nobody waits for an answer to this.
        let _ = self.sender.lock().unwrap_or_else(PoisonError::into_inner).send(message);
        self.bell.ring();
    }
}

/// The event loop's side.
pub(crate) struct Inbox<M> {
    receiver: Receiver<M>,
    bell: Arc<Bell>,
}

impl<M> Inbox<M> {
    /// What rings when a message has come.
    pub(crate) fn bell(&self) -> &Bell {
        &self.bell
    }

    /// To be called before messages are taken: one that comes after the last was taken rings again.
    pub(crate) fn silence(&self) {
        self.bell.silence();
    }

    /// The next message, if there is one.
    pub(crate) fn take(&self) -> Option<M> {
        self.receiver.try_recv().ok()
    }
}
