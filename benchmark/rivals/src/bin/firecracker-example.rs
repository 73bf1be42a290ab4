//! `firecracker-example SOCKET IMAGE on-demand|fault-all`: a model of Firecracker's example handlers (`src/firecracker/examples/uffd`),
//! system call for system call: poll on the stream and the userfaultfd, all events read into a list one by one, then each answered
//! with one page of the mapped file, or the first with everything.

use std::collections::HashSet;
use std::os::fd::AsRawFd;

use rivals::{Guest, GuestRegion, Image, Outcome, PAGE, accept, tell, wait};
use userfaultfd::{Error, Event};

struct Handler {
    guest: Guest,
    image: Image,
    removed: HashSet<u64>,
    all_at_once: bool,
}

impl Handler {
    /// Whether it is answered; else it has to be tried again.
    fn populate(&self, region: &GuestRegion, address: u64, len: usize) -> Outcome<bool> {
        let offset = region.offset as usize + (address - region.base_host_virt_addr) as usize;
        let place = std::ptr::with_exposed_provenance_mut(address as usize);
        // SAFETY: `len` bytes of the image; the kernel checks where they go, which is another process's memory.
        match unsafe { self.guest.uffd.copy(self.image.at(offset), place, len, true) } {
            Ok(copied) => Ok(copied > 0),
            Err(Error::PartiallyCopied(0)) => Ok(false),
            Err(Error::PartiallyCopied(copied)) if copied == (-libc::EAGAIN) as usize => Ok(false),
            Err(Error::CopyFailed(errno)) if errno as i32 == libc::EEXIST => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    fn serve(&self, address: *mut libc::c_void) -> Outcome<bool> {
        let page = (address.addr() / PAGE * PAGE) as u64;
        if self.removed.contains(&page) {
            let place = std::ptr::with_exposed_provenance_mut(page as usize);
            // SAFETY: the kernel checks where the zeros go, which is another process's memory.
            return Ok(unsafe { self.guest.uffd.zeropage(place, PAGE, true) }? > 0);
        }
        if self.all_at_once {
            for region in &self.guest.regions {
                self.populate(region, region.base_host_virt_addr, region.size)?;
            }
            return Ok(true);
        }
        let region = self.guest.regions.iter().find(|region| region.contains(page));
        self.populate(region.ok_or("a fault outside the memory")?, page, PAGE)
    }

    fn dispatch(&mut self) -> Outcome<()> {
        let mut deferred = Vec::new();
        loop {
            let mut events: Vec<_> = std::mem::take(&mut deferred);
            while let Some(event) = self.guest.uffd.read_event()? {
                events.push(event);
            }
            for event in events {
                match event {
                    Event::Pagefault { addr, .. } => {
                        if !self.serve(addr)? {
                            deferred.push(event);
                        }
                    }
                    Event::Remove { start, end } => {
                        self.removed.extend((start.addr() as u64..end.addr() as u64).step_by(PAGE));
                    }
                    _ => return Err("an event nobody asked for".into()),
                }
            }
            if deferred.is_empty() {
                return Ok(());
            }
        }
    }
}

fn main() -> Outcome<()> {
    let mut words = std::env::args().skip(1);
    let (socket, path) = (words.next().ok_or("SOCKET")?, words.next().ok_or("IMAGE")?);
    let all_at_once = match words.next().as_deref() {
        Some("on-demand") => false,
        Some("fault-all") => true,
        _ => return Err("on-demand or fault-all".into()),
    };
    let image = Image::map(&path)?;
    let guest = accept(&socket)?;
    tell("session")?;
    let fds = [guest.stream.as_raw_fd(), guest.uffd.as_raw_fd()];
    let mut handler = Handler { guest, image, removed: HashSet::new(), all_at_once };
    loop {
        let ready = wait(&fds)?;
        if ready.first() == Some(&true) {
            return Ok(());
        }
        if ready.get(1) == Some(&true) {
            handler.dispatch()?;
        }
    }
}
