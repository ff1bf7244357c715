//! What reads cost: of a disk that was measured, or of a usual one.

use std::path::{Path, PathBuf};

use flashlm_formats::regular::read_regular;
use flashlm_io::DiskProfile;
use flashlm_runtime::planner::{ReadCost, ReadCostError};

/// A virtual disk as measured on the machine of `docs/measurements/ordering.md`: 16 KiB reads 0.75 GB/s, 64 KiB 1.4 GB/s.
const USUAL_REQUEST_NS: f64 = 14_000.0;
const USUAL_BYTE_NS: f64 = 0.5;
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
    #[error("{} is no disk profile; `flashlm disk PATH` makes one: {source}", path.display())]
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

/// A disk of 14 us a read and 2 GB/s.
pub fn usual_cost() -> ReadCost {
    ReadCost::new(USUAL_REQUEST_NS, USUAL_BYTE_NS).expect("the constants are positive")
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
    let mut points: Vec<(u64, f64)> = profile.random.iter().map(|r| (r.read_bytes, r.bytes_per_s())).collect();
    // Of each size the depth that served it best.
    points.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1)));
    points.dedup_by_key(|p| p.0);
    ReadCost::fit(&points).map_err(|source| DiskProfileError::Fit { path, source })
}
