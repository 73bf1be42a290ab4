//! What the kernel's own tests of userfaultfd (tools/testing/selftests/mm) assert, through this crate: the cases of
//! uffd-unit-tests and uffd-stress on every kind of memory they use, and those parts of the neighbouring tests that are
//! about userfaultfd. Each module is a case or a group of them, each test one kind of memory.
//!
//! Every test runs in a process of its own: forks are told to every userfaultfd of a process and make its pages shared,
//! handlers of SIGBUS belong to the whole process, and what hangs can be killed.
#![allow(unreachable_pub, reason = "a module of a test program is its own crate's")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

#[path = "../processes/mod.rs"]
mod processes;
#[path = "../support/mod.rs"]
mod support;

#[macro_use]
mod alone;
mod forking;
mod memory;
mod serving;
mod signals;
mod tracked;

mod api;
mod events;
mod events_wp;
mod guard_regions;
mod hugetlb_mremap;
mod ksm;
mod minor;
mod minor_collapse;
mod minor_wp;
mod mkdirty;
mod mmap_changing;
mod move_pages;
mod move_pmd;
mod move_pmd_split;
mod mremap_multi_vma;
mod pagemap_base;
mod pagemap_scan;
mod pagemap_thp;
mod poison;
mod register_ioctls;
mod sigbus;
mod sigbus_wp;
mod stress;
mod wp_fork;
mod wp_fork_pin;
mod wp_fork_pin_with_event;
mod wp_fork_with_event;
mod wp_mremap;
mod wp_mremap_folios;
mod wp_mremap_with_event;
mod wp_unpopulated;
mod zeropage;
