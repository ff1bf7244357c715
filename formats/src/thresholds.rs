//! `thresholds.json`: what was measured and chosen, and for which checkpoint. `docs/thresholds.md`
//! describes it.
//!
//! Knows nothing of how thresholds are found.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::checkpoint::Checkpoint;
use crate::destination::THRESHOLDS_FORMAT as FORMAT;
use crate::regular::read_regular;

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

/// One share that was tried.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Level {
    /// Share of a token's squared energy in each layer that is cut off, in the mean over tokens.
    pub cut: f64,
    /// Neurons above the threshold, mean over layers.
    pub active: f64,
    /// Perplexity with the others left out.
    pub perplexity: f64,
    /// Share of positions where the likeliest token stays the same.
    pub top1_agreement: f64,
}

/// What the chosen thresholds do to documents that they were not chosen on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verified {
    /// Scored positions.
    pub positions: usize,
    /// Perplexity of the model as it is.
    pub perplexity: f64,
    /// Perplexity with neurons below the thresholds left out.
    pub with_thresholds: f64,
    /// The loss of perplexity, as a share.
    pub loss: f64,
    /// Its standard error; loss and error together are within what was allowed.
    pub error: f64,
}

/// What was measured, and what follows from it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// Scored positions.
    pub positions: usize,
    /// Perplexity of the model as it is.
    pub perplexity: f64,
    /// Every share that was tried, ascending.
    pub levels: Vec<Level>,
    /// The loss of perplexity that was allowed, as a share.
    pub loss_allowed: f64,
    /// The share of squared energy that is cut off: where between those tried the loss is what was allowed, or less, if held-out
    /// documents lost more.
    pub cut: f64,
    /// What follows: a threshold for each layer.
    pub thresholds: Vec<f32>,
    /// Neurons above it, for each layer, over all documents.
    pub active: Vec<f64>,
    /// On held-out documents; files of earlier versions do not have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified: Option<Verified>,
}

impl Measured {
    /// Neurons above the chosen thresholds, mean over layers.
    pub fn mean_active(&self) -> f64 {
        self.active.iter().sum::<f64>() / self.active.len().max(1) as f64
    }
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
        Self { format: FORMAT.into(), version: VERSION, checkpoint: checkpoint.fingerprint(), measured }
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
        let expected = checkpoint.fingerprint();
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
