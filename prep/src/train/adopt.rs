//! Predictors that somebody else trained, given a threshold on our recording and written as our own.

use std::path::Path;

use flashlm_formats::bundle::PredictorDType;
use flashlm_formats::predictors::{DTypeCurve, LayerReport, predictor_path, write_predictor};
use flashlm_formats::publish::create_directory;

use super::activity::{thin, training_set};
use super::curve::Curve;
use super::fitted::Fitted;
use super::options::{Shape, TrainOptions, TrainingData, everything, threshold};
use super::params::TrainError;
use super::pipeline::{CALIBRATION_TOKENS, CURVE_MISSES};
use super::predictor::LowRankPredictor;
use super::rank::predictor_bytes;
use super::scores::NeuronScores;

/// Largest score after scaling: within the range that curves count in.
const LARGEST: f32 = 16.0;

/// Chooses a threshold for `layer`'s predictor on the recording, as the options ask, measures it also on the other one where there
/// is one, and writes it into `out`.
///
/// Only the sign after the threshold counts, so scores are scaled to a common range first.
///
/// # Errors
/// `Shape` if it is a predictor of another model.
pub fn adopt_layer(
    data: TrainingData<'_>,
    options: &TrainOptions,
    layer: usize,
    mut predictor: LowRankPredictor,
    out: &Path,
) -> Result<LayerReport, TrainError> {
    options.check()?;
    let TrainingData { recording, validation, .. } = data;
    create_directory(out).map_err(|source| TrainError::Io { path: out.to_path_buf(), source })?;
    let shape = Shape::new(recording, options);
    let found = (predictor.encoder.ncols(), predictor.neurons());
    if found != (shape.hidden, shape.ffn) || predictor.decoder.dim() != (shape.ffn, predictor.rank()) {
        return Err(TrainError::Foreign {
            layer,
            what: format!(
                "{} inputs and {} neurons where the model has {} and {}",
                found.0, found.1, shape.hidden, shape.ffn
            ),
        });
    }
    if !predictor.is_finite() {
        return Err(TrainError::Foreign { layer, what: "numbers that are infinite or none".into() });
    }
    let set = training_set(recording, layer, layer)?;
    // The threshold is all that is chosen here: on the one part, and judged on the other.
    let [mut tokens, mut held_out] = [false, true].map(|held_out| set.targets().part(held_out));
    thin(&mut tokens, CALIBRATION_TOKENS);
    thin(&mut held_out, CALIBRATION_TOKENS);
    predictor.balance_components();
    let mut largest = 0f32;
    predictor
        .scores(set.records(), &tokens, &mut |_, logits| largest = logits.iter().fold(largest, |m, z| m.max(z.abs())));
    if largest > 0.0 {
        let scale = LARGEST / largest;
        predictor.decoder.mapv_inplace(|v| v * scale);
        predictor.bias.mapv_inplace(|v| v * scale);
    }
    let curve_as = |dtype, tokens: &[u32]| Curve::measure(&predictor.rounded(dtype), &set, tokens);
    let threshold = threshold(&curve_as(options.dtype, &tokens), options);
    let calibration = curve_as(options.dtype, &held_out);
    let other = validation.map(|v| training_set(v, layer, layer)).transpose()?;
    let measure = |dtype| match &other {
        Some(other) => Curve::measure(&predictor.rounded(dtype), other, &everything(other)),
        None => curve_as(dtype, &held_out),
    };
    let curves = [PredictorDType::F16, PredictorDType::Int8].map(|dtype| (dtype, measure(dtype)));
    let stored = &curves.iter().find(|(dtype, _)| *dtype == options.dtype).expect("both are there").1;
    let on_other = other.is_some().then(|| stored.at_threshold(threshold));
    let rank = predictor.rank();
    let fitted = Fitted::low_rank(predictor, options.dtype);
    fitted.as_stored().map_err(TrainError::in_layer(layer))?;
    let shifted = fitted.shifted(threshold);
    let path = predictor_path(out, layer);
    write_predictor(&path, &[shifted.part("")]).map_err(|source| TrainError::Io { path, source })?;
    let bytes = |dtype| predictor_bytes(rank, shape.rows(shape.ffn), dtype);
    let points = |curve: &Curve| CURVE_MISSES.iter().map(|&m| curve.at_misses(m)).collect();
    Ok(LayerReport {
        layer,
        rank,
        dtype: options.dtype,
        neurons: shape.ffn,
        rows: None,
        bytes: bytes(options.dtype),
        ffn_bytes: shape.ffn_bytes,
        held_out: calibration.at_threshold(threshold),
        validation: on_other,
        curves: curves.iter().map(|(d, c)| DTypeCurve { dtype: *d, bytes: bytes(*d), points: points(c) }).collect(),
        look_ahead: None,
        trial: None,
        seconds: 0.0,
        fit: None,
    })
}
