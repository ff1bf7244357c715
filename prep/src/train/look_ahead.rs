//! Knowing the next layer's active neurons one layer early, from this layer's input.
//!
//! Two ways: a small predictor of its own, and the next layer's predictor used early. A look-ahead that is wrong costs time
//! and never quality, as the exact predictor decides later what is computed.

use flashlm_formats::predictors::{LookAheadReport, PredictorForm};

use super::activity::training_set;
use super::curve::Curve;
use super::fitted::Fitted;
use super::options::{Shape, TrainOptions, TrainingData, everything, fit, held_out_tokens};
use super::params::TrainError;
use super::rank::predictor_bytes;
use super::scores::NeuronScores;

/// Held-out tokens that the threshold is taken from, at most.
const CALIBRATION_TOKENS: usize = 16_384;
/// Share of the next layer's active pairs that the stored look-ahead may miss: what it misses is read a little later.
const STORED_MISSES: f64 = 0.1;
/// Misses at which the report compares both ways.
pub const LOOK_AHEAD_MISSES: [f64; 7] = [0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5];

/// Trains a look-ahead of `rank` from `layer` to the next one; gives it with its threshold in the bias.
///
/// `compare` is the form of the next layer's own predictor, when that is to be measured too. It is trained here again rather
/// than awaited, so that layers stay independent.
pub(super) fn train_look_ahead(
    data: TrainingData<'_>,
    options: &TrainOptions,
    layer: usize,
    rank: usize,
    compare: Option<PredictorForm>,
) -> Result<(Fitted, LookAheadReport), TrainError> {
    let TrainingData { recording, validation, .. } = data;
    let shape = Shape::new(recording, options);
    let set = training_set(recording, layer, layer + 1)?;
    let other = validation.map(|v| training_set(v, layer, layer + 1)).transpose()?;
    let held_out = held_out_tokens(&set, CALIBRATION_TOKENS);
    let measure = |predictor: &dyn NeuronScores| match &other {
        Some(other) => Curve::measure(predictor, other, &everything(other)),
        None => Curve::measure(predictor, &set, &held_out),
    };
    let points = |curve: &Curve| LOOK_AHEAD_MISSES.iter().map(|&m| curve.at_misses(m)).collect::<Vec<_>>();

    let in_layer = TrainError::in_layer(layer);
    let (small, _) = fit(options, &set, None, rank).map_err(&in_layer)?;
    let small = Fitted::low_rank(small, options.dtype);
    let stored = small.as_stored().map_err(&in_layer)?;
    let threshold = Curve::measure(&stored, &set, &held_out).at_misses(STORED_MISSES).threshold;
    let own = measure(&stored);
    let next_layers_points = match compare {
        Some(form) => {
            let set = training_set(recording, layer + 1, layer + 1)?;
            let (exact, _) = Fitted::fit(options, data, &set, layer + 1, form)?;
            points(&measure(&exact.rounded(options.dtype)))
        }
        None => Vec::new(),
    };
    let report = LookAheadReport {
        rank,
        bytes: predictor_bytes(rank, shape.rows(shape.ffn), options.dtype),
        own: own.at_threshold(threshold),
        own_points: points(&own),
        next_layers_points,
    };
    Ok((small.shifted(threshold), report))
}
