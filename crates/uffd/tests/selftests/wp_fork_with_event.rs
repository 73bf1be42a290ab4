//! As `wp_fork`, with the FORK event: protection is inherited.

use crate::memory::Memory;
use crate::wp_fork::case;

cases!(|memory| case(memory, true); all);
