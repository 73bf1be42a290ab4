//! Numbers and bytes as people write them, in options and commands alike.

use crate::failure::Failure;

/// A count or an address: decimal, or hexadecimal behind `0x`.
///
/// # Errors
/// Anything else, or a number above `u64::MAX`; `name` says whose value it was.
pub(crate) fn number(name: &str, text: &str) -> Result<u64, Failure> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| Failure::new(format!("{name}: expected a number, got {text:?}")))
}

/// A count that has to fit the address space. See [`number`].
///
/// # Errors
/// As [`number`].
pub(crate) fn count(name: &str, text: &str) -> Result<usize, Failure> {
    usize::try_from(number(name, text)?)
        .map_err(|_| Failure::new(format!("{name}: {text} does not fit this machine's addresses")))
}

/// Bytes: a [`number`] with an optional suffix K, M or G (powers of 1024).
///
/// # Errors
/// As [`number`], also when the suffix takes the value above `u64::MAX`.
pub(crate) fn bytes(name: &str, text: &str) -> Result<u64, Failure> {
    let (digits, unit) = match text.char_indices().next_back() {
        Some((at, 'K')) => (&text[..at], 1u64 << 10),
        Some((at, 'M')) => (&text[..at], 1 << 20),
        Some((at, 'G')) => (&text[..at], 1 << 30),
        _ => (text, 1),
    };
    number(name, digits)?
        .checked_mul(unit)
        .ok_or_else(|| Failure::new(format!("{name}: {text} is more than 2^64 bytes")))
}

/// Lower-case hexadecimal digits, two a byte.
pub(crate) fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes behind hexadecimal digits.
///
/// # Errors
/// An odd number of digits, none at all, or another character.
pub(crate) fn from_hex(name: &str, text: &str) -> Result<Vec<u8>, Failure> {
    let refused = || Failure::new(format!("{name}: expected pairs of hexadecimal digits, got {text:?}"));
    let digits = text.as_bytes();
    if digits.is_empty() || !digits.len().is_multiple_of(2) {
        return Err(refused());
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|value| u8::try_from(value).ok());
    digits
        .chunks_exact(2)
        .map(|pair| match pair {
            &[high, low] => Some(digit(high)? << 4 | digit(low)?),
            _ => None,
        })
        .collect::<Option<Vec<u8>>>()
        .ok_or_else(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_with_a_suffix_are_powers_of_1024() {
        let values = ["4096", "0x1000", "4K", "3M", "2G"].map(|text| bytes("n", text).unwrap());

        assert_eq!(values, [4096, 4096, 4096, 3 << 20, 2 << 30]);
    }

    #[test]
    fn bytes_that_are_no_number_are_refused() {
        for text in ["", "K", "-1", "4k", "1T", "4 K", "0x", "16777216000000G"] {
            assert!(bytes("n", text).is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn hex_survives_the_round_trip() {
        let bytes: Vec<u8> = (0..=255).collect();

        assert_eq!(from_hex("h", &to_hex(&bytes)).unwrap(), bytes);
    }

    #[test]
    fn hex_with_an_odd_digit_or_a_foreign_character_is_refused() {
        for text in ["", "a", "abc", "zz", "+1", "é"] {
            assert!(from_hex("h", text).is_err(), "{text:?} was accepted");
        }
    }
}
