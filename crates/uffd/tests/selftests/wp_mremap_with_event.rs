//! As `wp_mremap`, with the REMAP event: protection moves along.

use uffd::Features;

use crate::memory::{Area, Memory};
use crate::wp_mremap::{case, populated};

cases!(|memory| case(populated(Area::usual(memory)), Features::EVENT_REMAP); all);
