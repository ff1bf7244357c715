//! Why a model could not be prepared.

use std::io;
use std::path::{Path, PathBuf};

use flashlm::budget::human_bytes;
use flashlm::error::RuntimeError;
use flashlm_formats::bundle::{BundleError, LayoutError};
use flashlm_formats::checkpoint::CheckpointError;
use flashlm_formats::destination::DestinationError;
use flashlm_formats::orders::OrderFileError;
use flashlm_formats::predictors::{PredictorFileError, TrainReportError};
use flashlm_formats::recording::RecordingError;
use flashlm_formats::thresholds::ThresholdFileError;

use crate::demand::WantedError;
use crate::gain;
use crate::ordering::OrderError;
use crate::own_text::OwnTextError;
use crate::pack::PackError;
use crate::record::documents::DocumentsError;
use crate::record::{RecordError, TextError};
use crate::report::ReportError;
use crate::rounding::RoundingError;
use crate::threads::ThreadsError;
use crate::thresholds::ThresholdError;
use crate::tokenizer::TokenizerError;
use crate::train::TrainError;

/// Why a model could not be prepared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrepareError {
    /// An option that no preparation can follow.
    #[error("{name}: {value}, expected {expected}")]
    Option {
        /// Which one.
        name: &'static str,
        /// What was given.
        value: String,
        /// What would be possible.
        expected: &'static str,
    },
    /// A rank that no predictor of the model can have.
    #[error("--look-ahead {rank}: predictors of this model have a rank of {most} at most")]
    LookAheadRank {
        /// What was given.
        rank: usize,
        /// The highest possible.
        most: usize,
    },
    /// The output or the work directory cannot be taken.
    #[error(transparent)]
    Destination(#[from] DestinationError),
    /// A bundle of somebody else stands at the output.
    #[error(
        "{} exists, and is not as it was packed from {}, so it is left alone: give another output, or allow it to be replaced \
         (--force)",
        output.display(),
        work.display()
    )]
    OtherBundle {
        /// The bundle.
        output: PathBuf,
        /// The work directory.
        work: PathBuf,
    },
    /// An input or the output stands where files are removed.
    #[error(
        "{} lies in the work directory {}, where it may be removed: move it, or give another --work",
        file.display(),
        work.display()
    )]
    InsideWork {
        /// The file.
        file: PathBuf,
        /// The work directory.
        work: PathBuf,
    },
    /// There is less memory than is needed.
    #[error(
        "preparing this model needs at least {} of memory, and {} can be used here (flashlm doctor says what limits it): fewer --tokens \
         or a shorter --sequence-tokens need less",
        human_bytes(*needed),
        human_bytes(*available)
    )]
    Memory {
        /// Bytes needed.
        needed: u64,
        /// Bytes that can be taken.
        available: u64,
    },
    /// Most neurons are needed.
    #[error(
        "preparing this model gains next to nothing, so nothing was done: use a ReLU (relufied) version of it, allow a loss \
         (--quality-loss 5%), run it without predictors (flashlm-prep convert {} -o {}), or continue all the same (--anyway)",
        checkpoint.display(),
        output.display()
    )]
    TooDense {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// The bundle that is not made.
        output: PathBuf,
        /// Share of the neurons that a token needs.
        active: f64,
    },
    /// Predictors find nothing to leave out.
    #[error("{}; nothing more was done (--anyway continues)", gain::pointless(*admitted, checkpoint, output))]
    Pointless {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// The bundle that is not made.
        output: PathBuf,
        /// Share of the neurons that the predictors tried admit.
        admitted: f64,
    },
    /// The file system.
    #[error("{doing} {}: {source}", path.display())]
    Io {
        /// What was not possible.
        doing: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Its tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The files of text.
    #[error(transparent)]
    Documents(#[from] DocumentsError),
    /// The text.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The text that the model writes.
    #[error(transparent)]
    OwnText(#[from] OwnTextError),
    /// Thresholds.
    #[error(transparent)]
    Thresholds(#[from] ThresholdError),
    /// The file of thresholds.
    #[error(transparent)]
    ThresholdFile(#[from] ThresholdFileError),
    /// Recording.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The recording's files.
    #[error(transparent)]
    Recording(#[from] RecordingError),
    /// Training.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// The predictors' files.
    #[error(transparent)]
    Predictors(#[from] PredictorFileError),
    /// Ordering.
    #[error(transparent)]
    Order(#[from] OrderError),
    /// The orders' files.
    #[error(transparent)]
    OrderFile(#[from] OrderFileError),
    /// Measuring reuse.
    #[error(transparent)]
    Wanted(#[from] WantedError),
    /// The bundle's layout.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The report.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// The predictors' summary.
    #[error(transparent)]
    TrainReport(#[from] TrainReportError),
    /// Rounding weights for their inputs.
    #[error(transparent)]
    Rounding(#[from] RoundingError),
    /// Packing.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// The bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// Threads.
    #[error(transparent)]
    Threads(#[from] ThreadsError),
    /// The runtime.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
}

/// For `map_err`: what was being done, and with what.
pub(super) fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PrepareError {
    move |source| PrepareError::Io { doing, path: path.to_path_buf(), source }
}
