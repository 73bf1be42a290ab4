//! What Firecracker says when it restores a snapshot: a JSON array of regions, in as many pieces as the stream
//! pleases, and a uffd that rides with one of them.
//!
//! | Firecracker | fields |
//! | --- | --- |
//! | 1.1 to 1.6 | `base_host_virt_addr`, `size`, `offset` |
//! | 1.7 to 1.11 | and `page_size_kib`, which holds **bytes** |
//! | 1.12 on | and `page_size`, in bytes, beside the old one |
//!
//! Unknown fields, bytes behind the array and more descriptors than one are accepted: versions to come have them.

use serde::Deserialize;

use crate::address_map::Region;
use crate::error::PagerError;

/// Far more than any version sends (about 130 bytes a region); bounds what a peer can make us hold.
pub(crate) const LONGEST_MESSAGE: usize = 64 * 1024;

const HUGE_PAGE: u64 = 2 << 20;

#[derive(Debug, Deserialize)]
struct GuestRegion {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: Option<u64>,
    page_size_kib: Option<u64>,
}

/// What a complete handshake says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handshake {
    /// The guest's memory, in the order sent.
    pub regions: Vec<Region>,
    /// Bytes of a page, the same for all regions.
    pub page_size: u64,
}

/// Reads the regions from what has arrived so far; `None` while the array is not complete. What is behind the first
/// 64 KiB is not looked at, so that it does not matter in which pieces a message arrives.
///
/// `base_page_size` is the system's page size in bytes: used where the peer names none.
///
/// # Errors
///
/// [`PagerError::Protocol`] when this can never become a handshake, [`PagerError::Unsupported`] for page sizes
/// other than the system's and 2 MiB.
pub fn parse_handshake(bytes: &[u8], base_page_size: u64) -> Result<Option<Handshake>, PagerError> {
    let bytes = bytes.get(..LONGEST_MESSAGE).unwrap_or(bytes);
    let regions = match read(bytes) {
        None => return incomplete(bytes),
        Some(Err(error)) if error.is_eof() || ends_within_number(bytes) => return incomplete(bytes),
        Some(Err(error)) => {
            return Err(PagerError::Protocol(format!(
                "the handshake is not Firecracker's array of regions: {error}"
            )));
        }
        Some(Ok(regions)) => regions,
    };
    let page_size = common_page_size(&regions, base_page_size)?;
    let regions = regions
        .iter()
        .map(|region| Region {
            address: region.base_host_virt_addr,
            len: region.size,
            source_offset: region.offset,
        })
        .collect();
    Ok(Some(Handshake { regions, page_size }))
}

fn read(bytes: &[u8]) -> Option<serde_json::Result<Vec<GuestRegion>>> {
    serde_json::Deserializer::from_slice(bytes).into_iter().next()
}

/// In a field that is skipped, `serde_json` calls the end of its input within `-1.5e-7` a wrong number and not an end. One
/// digit more tells.
fn ends_within_number(bytes: &[u8]) -> bool {
    matches!(bytes.last(), Some(b'-' | b'+' | b'.' | b'e' | b'E'))
        && read(&[bytes, b"0"].concat())
            .is_some_and(|read| read.map_or_else(|error| error.is_eof(), |_| true))
}

fn incomplete(bytes: &[u8]) -> Result<Option<Handshake>, PagerError> {
    if bytes.len() < LONGEST_MESSAGE {
        return Ok(None);
    }
    Err(PagerError::Protocol(format!("the handshake is still incomplete after {LONGEST_MESSAGE} bytes")))
}

fn common_page_size(regions: &[GuestRegion], base: u64) -> Result<u64, PagerError> {
    let mut sizes = regions.iter().map(|region| region.page_size.or(region.page_size_kib).unwrap_or(base));
    let first = sizes.next().unwrap_or(base);
    if let Some(other) = sizes.find(|&size| size != first) {
        return Err(PagerError::Unsupported(format!(
            "regions of different page sizes ({first} and {other} bytes)"
        )));
    }
    if first != base && first != HUGE_PAGE {
        return Err(PagerError::Unsupported(format!(
            "pages of {first} bytes: only the system's {base} and {HUGE_PAGE} are served"
        )));
    }
    Ok(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1_1: &str = r#"[{"base_host_virt_addr":139637976727552,"size":1048576,"offset":0}]"#;
    const V1_7: &str =
        r#"[{"base_host_virt_addr":139637976727552,"size":2097152,"offset":0,"page_size_kib":2097152}]"#;
    const V1_12: &str = r#"[{"base_host_virt_addr":139637976727552,"size":1048576,"offset":0,"page_size":4096,"page_size_kib":4096},{"base_host_virt_addr":139637979873280,"size":4096,"offset":1048576,"page_size":4096,"page_size_kib":4096}]"#;

    fn parsed(text: &str) -> Handshake {
        parse_handshake(text.as_bytes(), 4096).unwrap().unwrap()
    }

    #[test]
    fn every_version_is_understood() {
        assert_eq!(parsed(V1_1).page_size, 4096);
        assert_eq!(parsed(V1_1).regions[0].len, 1 << 20);
        assert_eq!(parsed(V1_7).page_size, HUGE_PAGE, "page_size_kib holds bytes");
        assert_eq!(parsed(V1_12).regions[1].source_offset, 1 << 20);
    }

    #[test]
    fn every_proper_prefix_is_incomplete_and_none_is_an_error() {
        for end in 0..V1_12.len() {
            assert_eq!(parse_handshake(&V1_12.as_bytes()[..end], 4096).unwrap(), None, "{end} bytes");
        }
    }

    #[test]
    fn a_number_of_an_unknown_field_may_be_cut_anywhere() {
        let future = r#"[{"base_host_virt_addr":4096,"size":4096,"offset":0,"weight":-1.5e-7}]"#;

        for end in 0..future.len() {
            assert_eq!(parse_handshake(&future.as_bytes()[..end], 4096).unwrap(), None, "{end} bytes");
        }
        assert_eq!(parsed(future).regions.len(), 1);
        assert!(parse_handshake(br#"[{"weight":1e,"#, 4096).is_err());
    }

    #[test]
    fn unknown_fields_and_bytes_behind_the_array_are_accepted() {
        let future = r#"[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":4096,"gpa_start":7}] {"next":1}"#;

        assert_eq!(parsed(future).regions.len(), 1);
    }

    #[test]
    fn what_can_never_be_a_handshake_is_refused_at_once() {
        for text in [
            "GET / HTTP/1.1\r\n",
            "{}",
            "[1]",
            r#"[{"size":1}]"#,
            r#"[{"base_host_virt_addr":-1,"size":1,"offset":0}]"#,
            "\u{0}",
        ] {
            assert!(matches!(parse_handshake(text.as_bytes(), 4096), Err(PagerError::Protocol(_))), "{text}");
        }
    }

    #[test]
    fn an_endless_message_is_refused() {
        let endless = vec![b' '; LONGEST_MESSAGE];

        assert!(matches!(parse_handshake(&endless, 4096), Err(PagerError::Protocol(_))));
    }

    #[test]
    fn page_sizes_that_are_mixed_or_not_served_are_refused() {
        let mixed = r#"[{"base_host_virt_addr":0,"size":1,"offset":0,"page_size":4096},{"base_host_virt_addr":0,"size":1,"offset":0,"page_size":2097152}]"#;
        let odd = r#"[{"base_host_virt_addr":0,"size":1,"offset":0,"page_size":1073741824}]"#;

        for text in [mixed, odd] {
            assert!(
                matches!(parse_handshake(text.as_bytes(), 4096), Err(PagerError::Unsupported(_))),
                "{text}"
            );
        }
    }
}
