//! What `training.json` says of a fit.

use serde::{Deserialize, Serialize};

/// How one fit went: where it began, and each epoch on held-out tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FitLog {
    /// The start that was best on held-out tokens.
    pub start: StartKind,
    /// False positives of that start where 3 % of the active pairs are missed.
    pub start_false_positive_rate: f64,
    /// All epochs in turn.
    pub epochs: Vec<EpochLog>,
    /// Index of the epoch whose weights were kept; none where no epoch was better than the start.
    pub kept: Option<usize>,
}

/// What a fit started from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StartKind {
    /// Principal components of the inputs.
    Principal,
    /// Leading singular vectors of the projection in the metric of the inputs.
    Projection,
    /// The same with a weight for each neuron.
    WeightedProjection,
}

/// One pass over the training tokens, judged on those held out.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochLog {
    /// Mean of the logistic loss over (token, neuron) pairs, active pairs weighted as in training.
    pub loss: f64,
    /// False positives where 3 % of the active pairs are missed.
    pub false_positive_rate: f64,
}

/// What a layer's predictor misses, and what it predicts in vain, when it is trained with one seed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SeedPoint {
    /// The seed.
    pub seed: u64,
    /// Missed / active.
    pub false_negative_rate: f64,
    /// False alarms / inactive.
    pub false_positive_rate: f64,
}
