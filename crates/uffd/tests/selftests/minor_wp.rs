//! Minor faults answered with pages mapped write-protected.

use crate::memory::{Area, Memory};
use crate::minor::case;

cases!(|memory| case(Area::usual(memory), true); shmem = Memory::Shmem, hugetlb = Memory::Hugetlb);
