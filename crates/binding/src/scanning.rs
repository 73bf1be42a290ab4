//! Which pages were written to (`PAGEMAP_SCAN`).

use std::num::NonZeroU64;
use std::sync::OnceLock;

use napi::bindgen_prelude::Float64Array;
use napi_derive::napi;
use uffd::pagemap::{Pagemap, PagemapError, Region, ScanOptions};

use crate::environment::MAPPINGS;
use crate::memory::mapping;
use crate::operations::negative;
use crate::values::NativeError;
use crate::views::View;

#[napi(object, object_from_js = false)]
pub struct NativeScan {
    pub error: Option<NativeError>,
    /// Offset, length, offset, length, …
    pub ranges: Option<Float64Array>,
    /// Where going on starts.
    pub next: f64,
}

/// What was written since it was last protected; with `protect` protected again in the same step.
#[napi(catch_unwind)]
pub fn scan_written(handle: f64, offset: f64, len: f64, protect: bool, most_pages: f64) -> NativeScan {
    let failed = |error: NativeError| NativeScan { error: Some(error), ranges: None, next: offset };
    let mapping = match mapping(handle) {
        Ok(mapping) => mapping,
        Err(error) => return failed(error),
    };
    let scan = match mapping.range(offset as usize, len as usize) {
        Ok(range) => {
            let take = ScanOptions { require_tracking: true, protect, ..ScanOptions::written() };
            let options = ScanOptions { max_pages: NonZeroU64::new(most_pages as u64), ..take };
            Pagemap::of_self().and_then(|map| map.scan_to_end(range.start, range.end, &options))
        }
        Err(error) => return failed(error.into()),
    };
    match scan {
        Ok(scan) => {
            let relative = |address: u64| (address - mapping.address()) as f64;
            let regions = scan.regions.iter();
            let ranges: Vec<f64> = regions
                .flat_map(|region| [relative(region.start), (region.end - region.start) as f64])
                .collect();
            NativeScan { error: None, ranges: Some(ranges.into()), next: relative(scan.walk_end) }
        }
        Err(error) => failed(scan_error(&error)),
    }
}

fn scan_error(error: &PagemapError) -> NativeError {
    let code = match error {
        PagemapError::Unsupported => "ERR_UFFD_UNSUPPORTED",
        PagemapError::NotTracked { .. } => "ERR_UFFD_NOT_REGISTERED",
        PagemapError::ProcessGone => "ERR_UFFD_CLOSED",
        _ => "ERR_UFFD_SYSTEM",
    };
    NativeError {
        code: code.to_owned(),
        message: error.to_string(),
        errno: Some(error.errno()),
        syscall: Some("PAGEMAP_SCAN".to_owned()),
        hint: None,
        causes: None,
    }
}

/// Pairs of offset and length in a view of doubles, behind one that is none.
struct Pairs<'a> {
    into: &'a View,
    base: u64,
    room: usize,
    count: usize,
    /// The range that was put last.
    last: Option<Region>,
}

impl<'a> Pairs<'a> {
    fn new(into: &'a View, base: u64) -> Self {
        let room = (into.len / size_of::<f64>()).saturating_sub(1) / 2;
        Self { into, base, room, count: 0, last: None }
    }

    fn left(&self) -> usize {
        self.room - self.count
    }

    /// Puts a range; one that goes on where the last ended makes that one longer.
    fn put(&mut self, found: Region) {
        let region = match self.last {
            Some(last) if last.end == found.start => Region { start: last.start, ..found },
            _ if self.left() == 0 => return,
            _ => {
                self.count += 1;
                found
            }
        };
        self.last = Some(region);
        self.set(2 * self.count - 1, region.start - self.base);
        self.set(2 * self.count, region.end - region.start);
    }

    /// Ends the pairs with one of no length, where there is room.
    fn end(&self) {
        if self.left() > 0 {
            self.set(2 * self.count + 1, 0);
            self.set(2 * self.count + 2, 0);
        }
    }

    fn set(&self, index: usize, number: u64) {
        // SAFETY: below `2 * room + 1`, the number of doubles that the view has at least.
        let place = unsafe { self.into.data.cast::<f64>().add(index) };
        // SAFETY: as above; bytes need not be aligned for a double.
        unsafe { place.write_unaligned(number as f64) };
    }
}

/// The hot form of [`scan_written`]: no object, no descriptor of its own. How many pairs, or -errno.
pub(crate) fn scan_written_into(handle: f64, offset: f64, len: f64, protect: bool, into: &View) -> f64 {
    static OWN: OnceLock<Option<Pagemap>> = OnceLock::new();
    let Some(mapping) = MAPPINGS.get(handle) else { return negative(libc::EBADF) };
    let Some(pagemap) = OWN.get_or_init(|| Pagemap::of_self().ok()) else { return negative(libc::ENOENT) };
    let Ok(range) = mapping.range(offset as usize, len as usize) else { return negative(libc::EINVAL) };
    let mut pairs = Pairs::new(into, mapping.address());
    if pairs.room == 0 {
        return negative(libc::EINVAL);
    }
    let mut from = range.start;
    let outcome = loop {
        if from >= range.end || pairs.left() == 0 {
            break Ok(());
        }
        let options = ScanOptions {
            max_regions: pairs.left(),
            protect,
            require_tracking: true,
            ..ScanOptions::written()
        };
        match pagemap.scan_each(from, range.end, &options, |region| pairs.put(region)) {
            Ok(stopped) if stopped > from => from = stopped,
            Ok(_) => break Ok(()),
            Err(errno) => break Err(errno),
        }
    };
    pairs.set(0, from - mapping.address());
    pairs.end();
    match outcome {
        Ok(()) => pairs.count as f64,
        Err(errno) => negative(errno as i32),
    }
}
