//! The glue between Node and the pager: conversion, the life cycle of an environment, waking JavaScript.
//! Nothing is decided here. Failures cross as data; TypeScript makes errors of them.

// The exports are documented where users see them, in TypeScript.
#![cfg_attr(test, allow(dead_code, reason = "the exports are left out of a test build"))]
#![allow(unreachable_pub, reason = "exports are reached from JavaScript")]
#![allow(missing_docs, reason = "generated types carry no documentation of their own")]

mod buffers;
mod calls;
mod creating;
mod daemon;
mod environment;
mod exiting;
mod failures;
mod filling;
mod firecracker;
mod handlers;
mod holding;
mod images;
mod jobs;
mod measuring;
mod memory;
mod notices;
mod operations;
mod paging;
mod polling;
mod populating;
mod promised;
mod recording;
mod scanning;
mod shared_pager;
mod signals;
mod slots;
mod sources;
mod stack;
mod thread;
mod traces;
mod tracking;
mod values;
mod views;
mod waiting;
