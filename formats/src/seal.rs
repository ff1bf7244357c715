//! A checksum inside a safetensors file, over everything else in it: the *seal*.
//!
//! It stands in the header's metadata as `"seal":"` and 16 hexadecimal digits, written exactly so. It is the XXH3-64 of the
//! XXH3-64s of all tensors, in the order in which they lie, 8 bytes each, and then of everything before the tensors with the
//! seal's digits as zeros. So a file can be written in one pass, its header last. Other readers see one more string.
//!
//! A file without a seal is one from elsewhere: it is not verified against anything.
//!
//! Text of our own, such as JSON, has its seal in a first line of its own: the XXH3-64 of all that follows, as 16 hexadecimal digits. What
//! has no such line is damaged.

use std::ops::Range;

use safetensors::tensor::Metadata;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// The key, and its value in a header that is not sealed yet.
pub const SEAL: (&str, &str) = ("seal", "0000000000000000");
/// What comes before the digits.
const BEFORE: &[u8] = b"\"seal\":\"";
/// Bytes of the length that precedes the header's JSON.
const LENGTH_BYTES: usize = 8;

/// A file is not as it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is damaged: its contents hash to {found:016x}, its seal says {expected:016x}")]
pub struct SealBroken {
    /// What the seal says.
    pub expected: u64,
    /// What the contents hash to.
    pub found: u64,
}

/// Puts the seal into `head`, all bytes before the tensors; `tensors` are the XXH3-64s of the tensors as they lie.
///
/// # Panics
/// If the head has no place for a seal.
pub fn seal_head(head: &mut [u8], tensors: &[u64]) {
    let digits = digits(head).expect("a head made with a place for the seal");
    let sum = format!("{:016x}", sum(head, &digits, tensors));
    head[digits].copy_from_slice(sum.as_bytes());
}

/// Holds the seal in `head` against it and the tensors' hashes.
///
/// # Errors
/// `SealBroken`. No seal is no error.
pub fn check_head(head: &[u8], tensors: &[u64]) -> Result<(), SealBroken> {
    let Some(digits) = digits(head) else { return Ok(()) };
    let found = sum(head, &digits, tensors);
    let text = std::str::from_utf8(&head[digits]).unwrap_or("");
    let expected = u64::from_str_radix(text, 16).unwrap_or(0);
    if text == format!("{found:016x}") { Ok(()) } else { Err(SealBroken { expected, found }) }
}

/// Whether `head` has a seal.
pub fn is_sealed(head: &[u8]) -> bool {
    digits(head).is_some()
}

/// Seals a whole safetensors file that was made with [`SEAL`] in its metadata.
///
/// # Panics
/// If it is no such file.
pub fn seal(file: &mut [u8]) {
    let (data, tensors) = tensors_of(file).expect("a safetensors file");
    seal_head(&mut file[..data], &tensors);
}

/// Holds a whole safetensors file against its seal. What is no safetensors file is for others to refuse.
///
/// # Errors
/// `SealBroken`.
pub fn check(file: &[u8]) -> Result<(), SealBroken> {
    tensors_of(file).map_or(Ok(()), |(data, tensors)| check_head(&file[..data], &tensors))
}

/// Text with its seal before it.
pub fn seal_text(text: &str) -> Vec<u8> {
    format!("{:016x}\n{text}", xxh3_64(text.as_bytes())).into_bytes()
}

/// The text in a file that [`seal_text`] gave.
///
/// # Errors
/// `SealBroken`, also where there is no seal.
pub fn check_text(file: &[u8]) -> Result<&[u8], SealBroken> {
    let (seal, text) = file.split_at_checked(SEAL.1.len() + 1).unwrap_or((&[], file));
    let found = xxh3_64(text);
    let expected = std::str::from_utf8(seal).ok().and_then(|seal| u64::from_str_radix(seal.trim_end(), 16).ok());
    if seal == format!("{found:016x}\n").as_bytes() {
        return Ok(text);
    }
    Err(SealBroken { expected: expected.unwrap_or(0), found })
}

/// Places of the tensors in the data, as they lie.
pub(crate) fn in_file_order(metadata: &Metadata) -> Vec<(usize, usize)> {
    let mut places: Vec<_> = metadata.tensors().into_values().map(|tensor| tensor.data_offsets).collect();
    places.sort_unstable();
    places
}

fn tensors_of(file: &[u8]) -> Option<(usize, Vec<u64>)> {
    let length = u64::from_le_bytes(*file.first_chunk::<LENGTH_BYTES>()?);
    let data = usize::try_from(length).ok()?.checked_add(LENGTH_BYTES)?;
    let metadata: Metadata = serde_json::from_slice(file.get(LENGTH_BYTES..data)?).ok()?;
    let hash = |(from, to): (usize, usize)| Some(xxh3_64(file[data..].get(from..to)?));
    let tensors = in_file_order(&metadata).into_iter().map(hash).collect::<Option<Vec<u64>>>()?;
    Some((data, tensors))
}

fn digits(head: &[u8]) -> Option<Range<usize>> {
    let start = head.windows(BEFORE.len()).position(|bytes| bytes == BEFORE)? + BEFORE.len();
    let end = start + SEAL.1.len();
    (end <= head.len()).then_some(start..end)
}

fn sum(head: &[u8], digits: &Range<usize>, tensors: &[u64]) -> u64 {
    let mut hash = Xxh3::new();
    tensors.iter().for_each(|tensor| hash.update(&tensor.to_le_bytes()));
    hash.update(&head[..digits.start]);
    hash.update(SEAL.1.as_bytes());
    hash.update(&head[digits.end..]);
    hash.digest()
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;
    use std::collections::HashMap;

    fn file(metadata: Option<HashMap<String, String>>) -> Vec<u8> {
        let data = [1, 2, 3, 4, 5, 6, 7, 8];
        let views = ["a", "b"].map(|name| (name, TensorView::new(Dtype::U8, vec![8], &data).unwrap()));
        safetensors::serialize(views, metadata).unwrap()
    }

    #[test]
    fn every_changed_byte_breaks_the_seal_or_the_file() {
        let mut sealed = file(Some(HashMap::from([(SEAL.0.to_owned(), SEAL.1.to_owned())])));
        assert!(check(&sealed).is_err());
        seal(&mut sealed);
        check(&sealed).unwrap();
        for at in 0..sealed.len() {
            let mut damaged = sealed.clone();
            damaged[at] ^= 1;
            // Where the mark itself is hit the file counts as unsealed; then everything else is as it was.
            let unsealed = !is_sealed(&damaged);
            let refused = safetensors::SafeTensors::deserialize(&damaged).is_err();
            assert!(check(&damaged).is_err() || unsealed || refused, "byte {at}");
        }
    }

    #[test]
    fn text_is_held_against_the_line_before_it() {
        for text in ["", "{}", "{\n  \"a\": 0.125\n}\n"] {
            let sealed = seal_text(text);
            assert_eq!(check_text(&sealed), Ok(text.as_bytes()));
            for at in 0..sealed.len() {
                let mut damaged = sealed.clone();
                damaged[at] ^= 1;
                assert!(check_text(&damaged).is_err() && check_text(&sealed[..at]).is_err(), "byte {at}");
                damaged = sealed.clone();
                // The other case of a hexadecimal digit, and everything else that parsers forgive.
                damaged[at] ^= 0x20;
                assert!(check_text(&damaged).is_err(), "byte {at}");
            }
        }
    }

    #[test]
    fn a_file_without_a_seal_is_not_judged() {
        check(&file(None)).unwrap();
        check(b"no safetensors").unwrap();
    }
}
