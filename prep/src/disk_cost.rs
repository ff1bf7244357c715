//! What reads cost by a disk profile in a file.

use std::path::{Path, PathBuf};

use flashlm::disk_cost::{ReadCost, ReadCostError};
use flashlm_formats::regular::read_regular;
use flashlm_io::DiskProfile;

/// Longest profile of a disk.
const PROFILE_BYTES_MAX: u64 = 16 << 20;

/// A disk profile cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskProfileError {
    /// The file cannot be read.
    #[error("cannot read the disk profile {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is something else.
    #[error("{} is not a disk profile; `flashlm disk PATH` makes one: {source}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// Rates that no disk has.
    #[error("{}: a profile with impossible rates, or of another version; measure again", path.display())]
    Unsound {
        /// The file.
        path: PathBuf,
    },
    /// Nothing can be fitted to it.
    #[error("{}: {source}", path.display())]
    Fit {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: ReadCostError,
    },
}

/// The cost that fits a profile as `flashlm disk` keeps it.
///
/// # Errors
/// If the file is no profile, or none that a cost can be fitted to.
pub fn profiled_cost(path: &Path) -> Result<ReadCost, DiskProfileError> {
    let path = path.to_owned();
    let text = match read_regular(&path, PROFILE_BYTES_MAX) {
        Ok(text) => text,
        Err(source) => return Err(DiskProfileError::Io { path, source }),
    };
    let profile: DiskProfile = match serde_json::from_slice(&text) {
        Ok(profile) => profile,
        Err(source) => return Err(DiskProfileError::Malformed { path, source }),
    };
    if !profile.is_sound() {
        return Err(DiskProfileError::Unsound { path });
    }
    ReadCost::of_profile(&profile).map_err(|source| DiskProfileError::Fit { path, source })
}
