//! `userfaultfd-peer`: a separate process that does what Firecracker does when it restores a snapshot, for
//! tests and for `npm start` to page for. `--help` is its reference.
//!
//! It shares no code with the crates it tests: the protocol and the kernel's numbers are written here a second
//! time, so that a mistake in one place is not agreed upon by the other.

mod args;
mod chunk;
mod commands;
mod content;
mod discard;
mod failure;
mod forking;
mod handshake;
mod help;
mod hugepages;
mod json;
mod memory;
mod page_set;
mod payload;
mod process;
mod random;
mod text;
mod touch;
mod uffd;
mod words;

use std::env;
use std::io::{self, Write};
use std::process::{ExitCode, id};

use args::{Descriptor, Options, Request};
use commands::Peer;
use failure::Failure;
use json::{Object, array};
use memory::Memory;
use uffd::Modes;

/// Everything that fails at start exits with it.
const STATUS_FAILED: u8 = 2;

fn main() -> ExitCode {
    match run() {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            eprintln!("userfaultfd-peer: {failure}");
            ExitCode::from(STATUS_FAILED)
        }
    }
}

fn run() -> Result<u8, Failure> {
    let mut output = io::stdout().lock();
    match args::parse(env::args_os().skip(1))? {
        Request::Help => {
            output
                .write_all(help::HELP.as_bytes())
                .map_err(|error| Failure::io("write to standard output", &error))?;
            Ok(0)
        }
        Request::Run(options) => peer(&options, &mut output),
    }
}

/// Firecracker's order: memory, userfaultfd, registration, connection, message.
fn peer(options: &Options, output: &mut impl Write) -> Result<u8, Failure> {
    process::die_of_fault_signals()?;
    if let Some(cpu) = options.cpu {
        process::pin(cpu)?;
    }
    let memory = Memory::map(&options.regions, options.page_size, options.reverse, options.memfd)?;
    let blocking = options.handshake.descriptor == Descriptor::Blocking;
    // Held until the process ends, as Firecracker does: a pager that dies leaves faults waiting, not zeros.
    let uffd = uffd::create(options.creation, blocking)?;
    uffd::enable(&uffd, options.creation.features)?;
    if options.modes != Modes::NONE {
        for region in memory.regions() {
            uffd::register(&uffd, region, options.modes)?;
        }
    }
    let socket = options.socket.as_deref().map(handshake::connect).transpose()?;
    commands::print(output, ready(&memory)?)?;
    let _kept_open = match socket {
        Some(socket) => {
            let text = payload::text(&options.handshake, &memory);
            let second_uffd = || uffd::create(options.creation, false);
            handshake::perform(&options.handshake, socket, &text, &uffd, memory.memfd(), second_uffd)?
        }
        None => Vec::new(),
    };
    Peer::new(memory).serve(io::stdin().lock(), output)
}

fn ready(memory: &Memory) -> Result<Object, Failure> {
    let regions: Vec<String> = memory
        .regions()
        .iter()
        .map(|region| {
            Object::new()
                .string("base", &format!("{:#x}", region.base))
                .number("size", region.size as u64)
                .number("offset", region.offset)
                .number("page_size", memory.page_size() as u64)
                .finish()
        })
        .collect();
    Ok(Object::new()
        .string("event", "ready")
        .number("pid", u64::from(id()))
        .raw("regions", &array(&regions))
        .number("resident", memory.resident_pages()?))
}
