//! As `events`, with pages copied in write-protected: the first write to each page is a fault of its own.

use crate::events::case;
use crate::memory::Memory;

cases!(|memory| case(memory, true); all);
