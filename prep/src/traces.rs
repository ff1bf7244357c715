//! What tokens need, as arrays of numpy, for programs that try cache policies of their own.
//!
//! A layer is two files of `<u4`, one dimension each: `layer-NNN.offsets.npy`, where each token's groups begin among the ids and
//! where the last ones end, and `layer-NNN.ids.npy`, the groups, ascending for each token.

use std::io;
use std::path::{Path, PathBuf};

use flashlm::replay::WantedSets;
use flashlm_formats::ids::GroupId;
use flashlm_formats::publish::publish_bytes;
use flashlm_formats::regular::read_regular;

/// Longest file that is read: four thousand million numbers are the most that offsets can count.
const BYTES_MAX: u64 = 16 << 30;
const MAGIC: &[u8] = b"\x93NUMPY";
/// The header ends at a multiple of this.
const ALIGNMENT: usize = 64;

/// A trace cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TraceError {
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
    /// More than offsets can count.
    #[error("layer {layer} needs {needed} groups over all tokens, a trace holds 4294967295; give fewer --tokens")]
    TooLong {
        /// The layer.
        layer: usize,
        /// Needed groups.
        needed: usize,
    },
}

fn path_of(dir: &Path, layer: usize, what: &str) -> PathBuf {
    dir.join(format!("layer-{layer:03}.{what}.npy"))
}

/// The layers that have a trace in `dir`, ascending.
///
/// # Errors
/// `Io`.
pub fn layers(dir: &Path) -> Result<Vec<usize>, TraceError> {
    let failed = |source| TraceError::Io { path: dir.to_owned(), source };
    let mut layers = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("layer-")?.strip_suffix(".offsets.npy"));
        layers.extend(number.and_then(|number| number.parse::<usize>().ok()));
    }
    layers.sort_unstable();
    Ok(layers)
}

/// Writes what the tokens of a layer need into `dir`.
///
/// # Errors
/// `Io`, and `TooLong`.
pub fn write(dir: &Path, layer: usize, sets: &WantedSets<GroupId>) -> Result<(), TraceError> {
    if u32::try_from(sets.requests()).is_err() {
        return Err(TraceError::TooLong { layer, needed: sets.requests() });
    }
    let mut offsets = vec![0];
    let mut ids = Vec::with_capacity(sets.requests());
    for token in sets.iter() {
        ids.extend(token.iter().map(|group| group.0));
        offsets.push(ids.len() as u32);
    }
    for (what, values) in [("ids", ids), ("offsets", offsets)] {
        let path = path_of(dir, layer, what);
        publish_bytes(&path, &npy(&values)).map_err(|source| TraceError::Io { path, source })?;
    }
    Ok(())
}

/// Reads what the tokens of a layer need; a layer has `groups`, or as many as the largest id says.
///
/// # Errors
/// `Io`, and `Invalid`.
pub fn read(dir: &Path, layer: usize, groups: Option<u32>) -> Result<WantedSets<GroupId>, TraceError> {
    let path = path_of(dir, layer, "offsets");
    let (offsets, ids) = (read_npy(&path)?, read_npy(&path_of(dir, layer, "ids"))?);
    let invalid = |path, expected, found| Err(TraceError::Invalid { path, expected, found });
    if offsets.first() != Some(&0) || !offsets.is_sorted() || offsets.last().is_none_or(|&l| l as usize != ids.len()) {
        let found = format!("{:?} to {:?}, {} ids", offsets.first(), offsets.last(), ids.len());
        return invalid(path, "offsets that begin with 0, never fall and end with the number of ids", found);
    }
    let needed = ids.iter().max().map_or(0, |&id| id.saturating_add(1));
    let groups = groups.unwrap_or(needed);
    let mut sets = WantedSets::new(groups);
    for (token, bounds) in offsets.windows(2).enumerate() {
        let of_token = &ids[bounds[0] as usize..bounds[1] as usize];
        if !of_token.is_sorted_by(|a, b| a < b) || of_token.last().is_some_and(|&id| id >= groups) {
            let path = path_of(dir, layer, "ids");
            let found = format!("others of token {token}, with {groups} groups");
            return invalid(path, "ascending ids of each token, below the number of groups", found);
        }
        sets.push(of_token.iter().copied().map(GroupId));
    }
    Ok(sets)
}

/// An array of one dimension.
fn npy(values: &[u32]) -> Vec<u8> {
    let header = format!("{{'descr': '<u4', 'fortran_order': False, 'shape': ({},), }}", values.len());
    let before = MAGIC.len() + 4;
    let length = (before + header.len() + 1).next_multiple_of(ALIGNMENT) - before;
    let mut bytes = [MAGIC, &[1, 0], &(length as u16).to_le_bytes(), header.as_bytes()].concat();
    bytes.resize(before + length - 1, b' ');
    bytes.push(b'\n');
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    bytes
}

fn read_npy(path: &Path) -> Result<Vec<u32>, TraceError> {
    let bytes = read_regular(path, BYTES_MAX).map_err(|source| TraceError::Io { path: path.to_owned(), source })?;
    let invalid = |found: &str| TraceError::Invalid {
        path: path.to_owned(),
        expected: "an array of numpy of one dimension, '<u4'",
        found: found.to_owned(),
    };
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
    let plain = header.contains("'descr':'<u4'") && header.contains("'fortran_order':False");
    match values {
        Some(values) if plain && values.checked_mul(4) == Some(data.len()) => {
            Ok(data.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect())
        }
        _ => Err(invalid(&format!("{} with {} bytes", header.chars().take(100).collect::<String>(), data.len()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traces_come_back_and_others_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut sets = WantedSets::new(9);
        for token in [&[0u32, 7][..], &[], &[3]] {
            sets.push(token.iter().copied().map(GroupId));
        }
        write(dir.path(), 12, &sets).unwrap();
        assert_eq!(layers(dir.path()).unwrap(), [12]);
        assert_eq!(read(dir.path(), 12, Some(9)).unwrap(), sets);
        assert_eq!(read(dir.path(), 12, None).unwrap().layer_size(), 8);
        let refused = |groups| matches!(read(dir.path(), 12, groups), Err(TraceError::Invalid { .. }));
        assert!(refused(Some(7)));
        let (ids, offsets) = (path_of(dir.path(), 12, "ids"), path_of(dir.path(), 12, "offsets"));
        let good = std::fs::read(&ids).unwrap();
        assert_eq!(good.len(), 128 + 3 * 4, "the header is padded");
        let text = String::from_utf8_lossy(&good[10..128]).into_owned();
        let other = |from: &str, to: &str| [&good[..10], text.replace(from, to).as_bytes(), &good[128..]].concat();
        let bad = [
            other("<u4", "<i4"),
            other("(3,)", "(4,)"),
            other("False", "True "),
            good[1..].to_vec(),
            good[..60].to_vec(),
            good[..130].to_vec(),
            npy(&[7, 0, 3]),
            npy(&[0, 7]),
            Vec::new(),
        ];
        for bytes in bad {
            std::fs::write(&ids, bytes).unwrap();
            assert!(refused(None));
        }
        std::fs::write(&ids, &good).unwrap();
        for bad in [&[][..], &[1, 2, 2, 3], &[0, 2, 1, 3], &[0, 2, 2, 4]] {
            std::fs::write(&offsets, npy(bad)).unwrap();
            assert!(refused(None), "{bad:?}");
        }
        assert!(matches!(read(dir.path(), 13, None), Err(TraceError::Io { .. })));
    }
}
