//! `naive-loop SOCKET IMAGE`: what everyone writes first with the `userfaultfd` crate: poll, read one event, copy one page.

use std::os::fd::AsRawFd;

use rivals::{Image, Outcome, PAGE, accept, tell, wait};
use userfaultfd::Event;

fn main() -> Outcome<()> {
    let mut words = std::env::args().skip(1);
    let (socket, path) = (words.next().ok_or("SOCKET")?, words.next().ok_or("IMAGE")?);
    let image = Image::map(&path)?;
    let guest = accept(&socket)?;
    tell("session")?;
    let fds = [guest.uffd.as_raw_fd(), guest.stream.as_raw_fd()];
    loop {
        if wait(&fds)?.get(1) == Some(&true) {
            return Ok(());
        }
        let Some(Event::Pagefault { addr, .. }) = guest.uffd.read_event()? else { continue };
        let page = addr.addr() / PAGE * PAGE;
        let region = guest.regions.iter().find(|region| region.contains(page as u64));
        let region = region.ok_or("a fault outside the memory")?;
        let offset = region.offset as usize + page - region.base_host_virt_addr as usize;
        // SAFETY: a page of the image; the kernel checks where it goes, which is another process's memory.
        unsafe {
            guest.uffd.copy(image.at(offset), std::ptr::with_exposed_provenance_mut(page), PAGE, true)
        }?;
    }
}
