//! What tokens need, as arrays of numpy, for programs that try cache policies of their own.
//!
//! A layer is two files of `<u4`, one dimension each: `layer-NNN.offsets.npy`, where each token's groups begin among the ids and
//! where the last ones end, and `layer-NNN.ids.npy`, the groups, ascending for each token.

use std::io;
use std::path::{Path, PathBuf};

use flashlm::replay::WantedSets;
use flashlm_formats::ids::GroupId;
use flashlm_formats::publish::publish_bytes;

use crate::npy::{self, NpyError};

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
    /// No array.
    #[error(transparent)]
    Array(#[from] NpyError),
    /// The array holds something else.
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
        publish_bytes(&path, &npy::encode(&values)).map_err(|source| TraceError::Io { path, source })?;
    }
    Ok(())
}

/// Reads what the tokens of a layer need; a layer has `groups`, or as many as the largest id says.
///
/// # Errors
/// `Array`, and `Invalid`.
pub fn read(dir: &Path, layer: usize, groups: Option<u32>) -> Result<WantedSets<GroupId>, TraceError> {
    let path = path_of(dir, layer, "offsets");
    // As many as offsets can count.
    let (offsets, ids) = (npy::read(&path, u32::MAX)?, npy::read(&path_of(dir, layer, "ids"), u32::MAX)?);
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
        let refused = |groups| {
            let read = read(dir.path(), 12, groups);
            matches!(read, Err(TraceError::Invalid { .. } | TraceError::Array(NpyError::Invalid { .. })))
        };
        assert!(refused(Some(7)));
        let (ids, offsets) = (path_of(dir.path(), 12, "ids"), path_of(dir.path(), 12, "offsets"));
        let good = std::fs::read(&ids).unwrap();
        let bad = [npy::encode(&[7, 0, 3]), npy::encode(&[0, 7]), Vec::new()];
        for bytes in bad {
            std::fs::write(&ids, bytes).unwrap();
            assert!(refused(None));
        }
        std::fs::write(&ids, &good).unwrap();
        for bad in [&[][..], &[1, 2, 2, 3], &[0, 2, 1, 3], &[0, 2, 2, 4]] {
            std::fs::write(&offsets, npy::encode(bad)).unwrap();
            assert!(refused(None), "{bad:?}");
        }
        assert!(matches!(read(dir.path(), 13, None), Err(TraceError::Array(NpyError::Io { .. }))));
    }
}
