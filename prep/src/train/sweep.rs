//! The whole trade-off of a layer: every rank of a list, both ways to store it, many thresholds.

use flashlm_formats::predictors::{DTypeCurve, PredictorForm};
use serde::Serialize;

use super::activity::training_set;
use super::curve::Curve;
use super::fitted::Fitted;
use super::options::{Shape, TrainOptions, TrainingData, everything};
use super::params::TrainError;
use super::pipeline::CURVE_MISSES;
use super::rank::predictor_bytes;

/// What one rank gives on one layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SweepEntry {
    /// Number of the layer.
    pub layer: usize,
    /// What was fitted.
    pub rank: PredictorForm,
    /// Bytes of the layer's FFN weights.
    pub ffn_bytes: u64,
    /// Points at rising shares of misses, for each way to store it.
    pub curves: Vec<DTypeCurve>,
}

/// Trains every rank on every layer of the options and measures it on the validation recording, or where there is none on the
/// held-out tokens; nothing is stored.
pub fn sweep(
    data: TrainingData<'_>,
    options: &TrainOptions,
    forms: &[PredictorForm],
    done: &mut dyn FnMut(&SweepEntry),
) -> Result<Vec<SweepEntry>, TrainError> {
    let recording = data.recording;
    let shape = Shape::new(recording, options);
    let mut entries = Vec::new();
    for layer in options.layers.clone() {
        let set = training_set(recording, layer, layer)?;
        let other = data.validation.map(|v| training_set(v, layer, layer)).transpose()?;
        let tokens = other.as_ref().map_or_else(|| set.targets().part(true), everything);
        let measured = other.as_ref().unwrap_or(&set);
        for &form in forms {
            let (predictor, _) = Fitted::fit(options, data, &set, layer, form)?;
            let rows = predictor.rows().unwrap_or(shape.ffn);
            let curves = predictor.dtypes().iter().map(|&dtype| {
                let curve = Curve::measure(&predictor.rounded(dtype), measured, &tokens);
                DTypeCurve {
                    dtype,
                    bytes: predictor_bytes(predictor.rank(), shape.rows(rows), dtype),
                    points: CURVE_MISSES.iter().map(|&m| curve.at_misses(m)).collect(),
                }
            });
            let curves = curves.collect();
            let entry = SweepEntry { layer, rank: form, ffn_bytes: shape.ffn_bytes, curves };
            done(&entry);
            entries.push(entry);
        }
    }
    Ok(entries)
}
