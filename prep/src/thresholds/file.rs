//! `thresholds.json`: what was measured and chosen, and for which checkpoint.

use std::path::{Path, PathBuf};

use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::destination::THRESHOLDS_FORMAT as FORMAT;
use flashlm_formats::regular::read_regular;
use serde::{Deserialize, Serialize};

use super::Measured;
use crate::record::text::checkpoint_fingerprint;

/// Version 1 does not say what held-out documents lose.
const VERSION: u32 = 2;
/// Far more than a model of any depth needs.
const BYTES_MAX: u64 = 16 << 20;

/// The file's contents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ThresholdFile {
    format: String,
    version: u32,
    /// Fingerprint of the checkpoint.
    checkpoint: String,
    /// What was measured and chosen.
    pub measured: Measured,
}

/// Why a file of thresholds cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ThresholdFileError {
    /// The file system.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
    /// No such file.
    #[error("{} is not a file of thresholds: {reason}; `flashlm-prep thresholds` writes one", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// Of another model.
    #[error("{} is of another checkpoint (fingerprint {found}, expected {expected}); find thresholds for this one", path.display())]
    OtherCheckpoint {
        /// The file.
        path: PathBuf,
        /// Fingerprint of the checkpoint.
        expected: String,
        /// Fingerprint found.
        found: String,
    },
}

impl ThresholdFile {
    /// Of a checkpoint without thresholds.
    pub fn new(checkpoint: &Checkpoint, measured: Measured) -> Self {
        Self { format: FORMAT.into(), version: VERSION, checkpoint: checkpoint_fingerprint(checkpoint), measured }
    }

    /// As it is written.
    pub fn to_json(&self) -> Vec<u8> {
        let mut json = serde_json::to_vec_pretty(self).unwrap_or_default();
        json.push(b'\n');
        json
    }

    /// Reads the thresholds of `checkpoint`, which has none yet, and gives them to it.
    ///
    /// # Errors
    /// If the file is none of that checkpoint.
    pub fn apply(path: &Path, checkpoint: &mut Checkpoint) -> Result<Self, ThresholdFileError> {
        let io = |source| ThresholdFileError::Io { path: path.to_owned(), source };
        let malformed = |reason: String| ThresholdFileError::Malformed { path: path.to_owned(), reason };
        let json = read_regular(path, BYTES_MAX).map_err(io)?;
        let file: Self = serde_json::from_slice(&json).map_err(|e| malformed(e.to_string()))?;
        if file.format != FORMAT || !(1..=VERSION).contains(&file.version) {
            return Err(malformed(format!("it says {:?} version {}", file.format, file.version)));
        }
        let expected = checkpoint_fingerprint(checkpoint);
        if file.checkpoint != expected {
            return Err(ThresholdFileError::OtherCheckpoint {
                path: path.to_owned(),
                expected,
                found: file.checkpoint,
            });
        }
        checkpoint.set_thresholds(file.measured.thresholds.clone()).map_err(|e| malformed(e.to_string()))?;
        Ok(file)
    }
}
