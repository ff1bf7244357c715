//! Training of the predictors: which neurons of a layer will fire, from what the layer is about to see.
//!
//! A predictor is two thin matrices, `logits = B (A x) + b` with `A` `[rank, hidden]` and `B` `[neurons, rank]`, or the projection
//! itself in four bits; a neuron is predicted where its logit is positive. [`LowRankPredictor`] is a linfa estimator: parameters,
//! checked, fitted on a dataset of recorded inputs and activity, from a start that is one too; [`QuantisedProjection`] is not
//! trained. Both are [`NeuronScores`] and predict through linfa. Around them: curves of what a threshold costs, the choice of
//! forms under a size budget, files.
//!
//! Everything follows from the recording, the checkpoint, the parameters and a seed; the number of threads changes nothing.
//! Knows nothing of bundles, and of storage orders only that there will be one: neurons are numbered as in the checkpoint.

mod activity;
mod adopt;
mod curve;
mod fit;
mod fitted;
mod look_ahead;
mod moments;
mod options;
mod params;
mod pipeline;
mod predictor;
mod projection;
mod quantised;
pub(crate) mod random;
mod rank;
mod reading;
mod scores;
mod start;
mod steps;
mod sweep;
mod unit;

pub use activity::{Activity, Inputs, TrainingSet, training_set};
pub use adopt::adopt_layer;
pub use curve::Curve;
pub use fitted::Fitted;
pub use look_ahead::LOOK_AHEAD_MISSES;
pub use options::{RankChoice, TrainOptions, TrainingData};
pub use params::{LowRankPredictorParams, LowRankPredictorValidParams, TrainError};
pub use pipeline::{Progress, TRIAL_TOKENS, choose_ranks, judge_seed, train_layer, train_recording, write_report};
pub use predictor::LowRankPredictor;
pub use projection::Projection;
pub use quantised::QuantisedProjection;
pub use rank::{Memory, RowsOf, choose_forms, form_bytes, predictor_bytes};
pub use scores::NeuronScores;
pub use sweep::{SweepEntry, sweep};

#[cfg(test)]
mod tests;
