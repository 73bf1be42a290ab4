//! Where bytes rest between a source and the memory that is served.

/// Page-aligned: copying in and out of an unaligned buffer takes a quarter longer.
pub(crate) struct Staging {
    bytes: Vec<u8>,
    aligned: usize,
    len: usize,
}

impl Staging {
    pub(crate) fn new(len: usize) -> Self {
        let page = uffd::page_size();
        // Never resident beyond what is used: it comes zeroed from the allocator.
        let bytes = vec![0; len + page];
        let aligned = bytes.as_ptr().align_offset(page).min(page);
        Self { bytes, aligned, len }
    }

    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        self.bytes.get_mut(self.aligned..self.aligned + self.len).unwrap_or_default()
    }
}
