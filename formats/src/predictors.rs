//! What `flashlm-prep train` leaves: a directory with the predictor of each layer, and what is known
//! of them. `docs/predictors.md` describes both.
//!
//! Knows nothing of how predictors are trained.

mod file;
mod report;
mod training;

pub use file::{
    LOOK_AHEAD, PredictorFileError, PredictorPart, RELU, StoredElements, StoredMatrix, predictor_path, read_predictor,
    write_predictor,
};
pub use report::{
    DTypeCurve, LayerReport, LayerTraining, LookAheadReport, OperatingPoint, PREDICTORS_JSON, PredictorForm, RankCurve,
    TrainReport, TrainReportError,
};
pub use training::{EpochLog, FitLog, SeedPoint, StartKind};
