//! `local-file IMAGE mmap|read sequential|random [PAGES]`: an image without a pager. It is mapped privately, or read as a whole into fresh
//! memory; then one word of each page is loaded. Prints nanoseconds, and the SHA-256 of what is there. Told how many pages, it
//! loads no more, prints no checksum (which needs them all), and stays until its input ends.

use std::fs::File;
use std::io::Read;
use std::time::Instant;

use rivals::{Image, Outcome, PAGE};
use sha2::{Digest, Sha256};

fn load(address: *const libc::c_void) -> u64 {
    // SAFETY: the start of a page of the image, or of a buffer as long as it.
    unsafe { address.cast::<u64>().read_volatile() }
}

fn shuffled(pages: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..pages).collect();
    let mut state = 88_172_645_463_325_252_u64;
    for index in (1..pages).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        order.swap(index, (state % (index as u64 + 1)) as usize);
    }
    order
}

fn main() -> Outcome<()> {
    let mut words = std::env::args().skip(1);
    let (path, how) = (words.next().ok_or("IMAGE")?, words.next().ok_or("mmap or read")?);
    let len = usize::try_from(std::fs::metadata(&path)?.len())?;
    let order = match words.next().as_deref() {
        Some("random") => shuffled(len / PAGE),
        _ => (0..len / PAGE).collect(),
    };
    let limit = words.next().map(|pages| pages.parse::<usize>()).transpose()?;
    let start = Instant::now();
    let mut buffer = Vec::new();
    let at: Box<dyn Fn(usize) -> *const libc::c_void> = if how == "mmap" {
        let image = Image::map(&path)?;
        Box::new(move |offset| image.at(offset))
    } else {
        buffer.reserve_exact(len);
        File::open(&path)?.read_to_end(&mut buffer)?;
        let bytes = buffer.as_ptr();
        Box::new(move |offset| bytes.wrapping_add(offset).cast())
    };
    let sum = order
        .iter()
        .take(limit.unwrap_or(usize::MAX))
        .fold(0_u64, |sum, page| sum.wrapping_add(load(at(page * PAGE))));
    let took = start.elapsed().as_nanos();
    if limit.is_some() {
        println!("{{\"total_ns\":{took},\"sum\":\"{sum}\"}}");
        std::io::stdin().read_to_end(&mut Vec::new())?;
        return Ok(());
    }
    // SAFETY: all of the image, or of the buffer with its bytes, which nobody writes to.
    let bytes = unsafe { std::slice::from_raw_parts(at(0).cast::<u8>(), len) };
    let hash: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    println!("{{\"total_ns\":{took},\"sha256\":\"{hash}\",\"sum\":\"{sum}\"}}");
    Ok(())
}
