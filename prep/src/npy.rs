//! Arrays of numpy with one dimension of whole numbers.

use std::io;
use std::path::{Path, PathBuf};

use flashlm_formats::regular::read_regular;

const MAGIC: &[u8] = b"\x93NUMPY";
/// The header ends at a multiple of this.
const ALIGNMENT: usize = 64;
/// Longest header that is read; real ones have 118 bytes.
const HEADER_BYTES_MAX: u64 = 1 << 16;
/// The types that are read, and their bytes.
const TYPES: [(&str, usize); 6] = [("<u2", 2), ("<i2", 2), ("<u4", 4), ("<i4", 4), ("<u8", 8), ("<i8", 8)];

/// An array cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NpyError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file holds something else.
    #[error("{}: expected {expected}, found {found}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What would be right.
        expected: &'static str,
        /// What is there.
        found: String,
    },
}

/// The bytes of a file with these numbers, as `<u4`.
pub fn encode(values: &[u32]) -> Vec<u8> {
    let header = format!("{{'descr': '<u4', 'fortran_order': False, 'shape': ({},), }}", values.len());
    let before = MAGIC.len() + 4;
    let length = (before + header.len() + 1).next_multiple_of(ALIGNMENT) - before;
    let mut bytes = [MAGIC, &[1, 0], &(length as u16).to_le_bytes(), header.as_bytes()].concat();
    bytes.resize(before + length - 1, b' ');
    bytes.push(b'\n');
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    bytes
}

/// Reads at most so many numbers.
///
/// # Errors
/// `Io`, and `Invalid` where one is negative or has more than 32 bits, too.
pub fn read(path: &Path, values_max: u32) -> Result<Vec<u32>, NpyError> {
    let bytes_max = HEADER_BYTES_MAX + 8 * u64::from(values_max);
    let bytes = read_regular(path, bytes_max).map_err(|source| NpyError::Io { path: path.to_owned(), source })?;
    decode(&bytes).map_err(|(expected, found)| NpyError::Invalid { path: path.to_owned(), expected, found })
}

/// What was expected and what was found, where it is no such array.
type Refused = (&'static str, String);

fn decode(bytes: &[u8]) -> Result<Vec<u32>, Refused> {
    let array = "an array of numpy of one dimension, of whole numbers (u2, i2, u4, i4, u8 or i8)";
    let invalid = |found: &str| (array, found.to_owned());
    let rest = bytes.strip_prefix(MAGIC).ok_or_else(|| invalid("another file"))?;
    let (length, rest) = match rest {
        [1, 0, a, b, rest @ ..] => (u16::from_le_bytes([*a, *b]) as usize, rest),
        [2 | 3, 0, a, b, c, d, rest @ ..] => (u32::from_le_bytes([*a, *b, *c, *d]) as usize, rest),
        _ => return Err(invalid("an unknown version")),
    };
    let (header, data) = rest.split_at_checked(length).ok_or_else(|| invalid("less than its header"))?;
    let header: String = String::from_utf8_lossy(header).split_whitespace().collect();
    let shape = header.split_once("'shape':(").and_then(|(_, rest)| rest.split_once(",)")).map(|(shape, _)| shape);
    let values = shape.and_then(|shape| shape.parse::<usize>().ok());
    let kind = TYPES.iter().find(|(name, _)| header.contains(&format!("'descr':'{name}'")));
    let plain = header.contains("'fortran_order':False");
    let Some((values, &(name, size))) = values.zip(kind).filter(|_| plain) else {
        return Err(invalid(&header.chars().take(100).collect::<String>()));
    };
    if values.checked_mul(size) != Some(data.len()) {
        return Err(invalid(&format!("{values} numbers of type {name} in {} bytes", data.len())));
    }
    let is_signed = name.contains('i');
    let number = |(at, bytes): (usize, &[u8])| {
        // Sign extension, and eight bytes in any case.
        let negative = is_signed && bytes[size - 1] >= 0x80;
        let mut whole = [if negative { 0xFF } else { 0 }; 8];
        whole[..size].copy_from_slice(bytes);
        let whole = u64::from_le_bytes(whole);
        let found = || if negative { (whole as i64).to_string() } else { whole.to_string() };
        let number = u32::try_from(whole).ok().filter(|_| !negative);
        number.ok_or_else(|| ("numbers from 0 to 4294967295", format!("{} at position {at}", found())))
    };
    data.chunks_exact(size).enumerate().map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An array of numpy as it writes it.
    fn file(kind: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let header = format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n");
        [MAGIC, &[1, 0], &(header.len() as u16).to_le_bytes(), header.as_bytes(), data].concat()
    }

    #[test]
    fn numbers_come_back_in_every_type() {
        let good = encode(&[0, 7, u32::MAX]);
        assert_eq!(good.len(), 128 + 3 * 4, "the header is padded");
        assert_eq!(decode(&good).unwrap(), [0, 7, u32::MAX]);
        for (kind, size) in TYPES {
            let data: Vec<u8> = [1u64, 300].iter().flat_map(|v| v.to_le_bytes()[..size].to_vec()).collect();
            assert_eq!(decode(&file(kind, "(2,)", &data)).unwrap(), [1, 300], "{kind}");
        }
        assert_eq!(decode(&file("<u8", "(0,)", &[])).unwrap(), [] as [u32; 0]);
    }

    #[test]
    fn what_is_no_such_array_is_refused() {
        let good = encode(&[0, 7, 3]);
        let minus = (-1i16).to_le_bytes();
        let bad = [
            file("<f4", "(1,)", &[0; 4]),
            file(">u4", "(1,)", &[0; 4]),
            file("<u4", "(1, 1)", &[0; 4]),
            file("<u4", "(2,)", &[0; 4]),
            file("<u4", "(18446744073709551615,)", &[0; 4]),
            file("<i2", "(1,)", &minus),
            file("<u8", "(1,)", &(1u64 << 32).to_le_bytes()),
            good[1..].to_vec(),
            good[..60].to_vec(),
            good[..130].to_vec(),
            Vec::new(),
        ];
        for bytes in bad {
            assert!(decode(&bytes).is_err(), "{}", String::from_utf8_lossy(&bytes));
        }
        let (_, found) = decode(&file("<i2", "(2,)", &[[0, 0], minus].concat())).unwrap_err();
        assert_eq!(found, "-1 at position 1");
        let path = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&path, &good).unwrap();
        assert_eq!(read(path.path(), 3).unwrap(), [0, 7, 3]);
        assert!(matches!(read(Path::new("/nowhere"), 3), Err(NpyError::Io { .. })));
    }
}
