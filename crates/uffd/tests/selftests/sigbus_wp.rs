//! The SIGBUS feature with pages copied in write-protected: a second signal for the first write.

use crate::memory::Memory;
use crate::sigbus::case;

cases!(|memory| case(memory, true); all);
