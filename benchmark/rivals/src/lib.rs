//! What the programs here share: the hand-over of a process's memory as Firecracker does it, and a mapping of the image.

use std::error::Error;
use std::fs::File;
use std::io::{IoSliceMut, Write};
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use nix::cmsg_space;
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde::Deserialize;
use userfaultfd::Uffd;

/// Bytes.
pub const PAGE: usize = 4096;

/// Whatever went wrong ends the program.
pub type Outcome<T> = Result<T, Box<dyn Error>>;

/// A stretch of the process's memory, with the members that are of interest.
#[derive(Clone, Debug, Deserialize)]
pub struct GuestRegion {
    /// Its first address there.
    pub base_host_virt_addr: u64,
    /// Bytes.
    pub size: usize,
    /// Where its first byte is in the image.
    pub offset: u64,
}

impl GuestRegion {
    /// Whether the address is in it.
    #[must_use]
    pub fn contains(&self, address: u64) -> bool {
        (self.base_host_virt_addr..self.base_host_virt_addr + self.size as u64).contains(&address)
    }
}

/// What one process has handed over.
#[derive(Debug)]
pub struct Guest {
    /// Its userfaultfd.
    pub uffd: Uffd,
    /// Its memory.
    pub regions: Vec<GuestRegion>,
    /// Ends with the process.
    pub stream: UnixStream,
}

/// Prints an event for the program that drives this one.
///
/// # Errors
/// Nobody reads it.
pub fn tell(event: &str) -> Outcome<()> {
    let mut output = std::io::stdout();
    writeln!(output, "{{\"event\":\"{event}\"}}")?;
    Ok(output.flush()?)
}

/// Listens, says so, and takes the memory of the one process that connects.
///
/// # Errors
/// The socket's, or a message that is not Firecracker's.
pub fn accept(path: &str) -> Outcome<Guest> {
    let listener = UnixListener::bind(path)?;
    tell("listening")?;
    let (stream, _) = listener.accept()?;
    let mut json = vec![0_u8; 1 << 16];
    let mut control = cmsg_space!(RawFd);
    let (bytes, fd) = {
        let mut pieces = [IoSliceMut::new(&mut json)];
        let message =
            recvmsg::<()>(stream.as_raw_fd(), &mut pieces, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
        let fd = message.cmsgs()?.find_map(|part| match part {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
            _ => None,
        });
        (message.bytes, fd)
    };
    let fd = fd.ok_or("no descriptor came with the memory")?;
    // SAFETY: the kernel has just given it to this process; nothing else knows it.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: a userfaultfd, by the protocol, and no longer anybody else's.
    let uffd = unsafe { Uffd::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(owned)) };
    let regions = serde_json::from_slice(json.get(..bytes).unwrap_or_default())?;
    Ok(Guest { uffd, regions, stream })
}

/// An image, mapped for the life of the program.
#[derive(Clone, Copy, Debug)]
pub struct Image {
    address: usize,
    /// Bytes.
    pub len: usize,
}

impl Image {
    /// Maps it privately, for reading.
    ///
    /// # Errors
    /// It cannot be opened or mapped.
    pub fn map(path: &str) -> Outcome<Self> {
        let file = File::open(path)?;
        let len = usize::try_from(file.metadata()?.len())?;
        let length = NonZeroUsize::new(len).ok_or("the image is empty")?;
        // SAFETY: new memory, wherever there is room.
        let address = unsafe { mmap(None, length, ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE, &file, 0) }?;
        Ok(Self { address: address.as_ptr().expose_provenance(), len })
    }

    /// Where a byte of it is.
    #[must_use]
    pub fn at(self, offset: usize) -> *const libc::c_void {
        std::ptr::with_exposed_provenance(self.address + offset)
    }
}

/// Waits until one of the descriptors is readable: which are.
///
/// # Errors
/// What poll(2) says.
pub fn wait(fds: &[RawFd]) -> Outcome<Vec<bool>> {
    let mut waiting: Vec<_> =
        fds.iter().map(|&fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }).collect();
    // SAFETY: as many structures as it says, which live across the call.
    let ready = unsafe { libc::poll(waiting.as_mut_ptr(), waiting.len() as libc::nfds_t, -1) };
    if ready < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(waiting.iter().map(|one| one.revents != 0).collect())
}
