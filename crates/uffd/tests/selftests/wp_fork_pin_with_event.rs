//! As `wp_fork_pin`, with the FORK event: protection is inherited.

use crate::memory::Memory;
use crate::wp_fork_pin::case;

cases!(|memory| case(memory, true); all);
