//! From a recording to predictor files: trial, ranks, training, thresholds, report.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use flashlm_formats::predictors::{
    DTypeCurve, LOOK_AHEAD, LayerReport, OperatingPoint, PredictorForm, RankCurve, SeedPoint, TrainReport,
    predictor_path, write_predictor,
};
use flashlm_formats::publish::create_directory;
use linfa::ParamGuard;

use super::activity::{TrainingSet, training_set};
use super::curve::{Curve, JUDGED_MISSES};
use super::fitted::Fitted;
use super::look_ahead::train_look_ahead;
use super::options::{RankChoice, Shape, TrainOptions, TrainingData, everything, held_out_tokens, threshold};
use super::params::TrainError;
use super::projection::Projection;
use super::rank::{Memory, can_pay, choose_forms, form_bytes, ladder, predictor_bytes};
use super::reading::Reading;

/// Tokens that the trials of [`choose_ranks`] use at most: to train on, and as many as that in all with those held out.
pub const TRIAL_TOKENS: usize = 8192;
const TRIAL_EPOCHS: usize = 3;
/// No layer gets more than this many times its share of the size budget.
const LAYER_SHARE_MAX: f64 = 3.0;
/// Misses at which the report's curves have their points.
pub(super) const CURVE_MISSES: [f64; 9] = [0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.10, 0.15];
/// Held-out tokens that thresholds are taken from, at most.
pub(super) const CALIBRATION_TOKENS: usize = 16_384;

/// Called as training goes on; the binary draws bars with it.
pub trait Progress {
    /// A layer's trial is done.
    fn tried(&self, layer: usize, curve: &RankCurve);
    /// A layer's predictor is trained and written.
    fn trained(&self, report: &LayerReport);
}

/// Trains predictors for the chosen layers and writes them, with `predictors.json`, into `out`.
///
/// Layers are trained one after the other with all threads inside each; a layer's result depends on the recording and the
/// options alone, not on which other layers are trained. [`RankChoice::Auto`] looks at every layer of the model.
pub fn train_recording(
    data: TrainingData<'_>,
    options: &TrainOptions,
    out: &Path,
    progress: &dyn Progress,
) -> Result<TrainReport, TrainError> {
    let recording = data.recording;
    let model = &recording.info().model;
    let layers = options.layers.clone();
    if layers.is_empty() || layers.end > model.layers.len() {
        return Err(TrainError::Layers { first: layers.start, end: layers.end, layers: model.layers.len() });
    }
    let (hidden, ffn) = (model.hidden_size, model.ffn().size);
    options.check()?;
    let asked = match &options.rank {
        RankChoice::Fixed(form) => std::slice::from_ref(form),
        RankChoice::Each(forms) => forms,
        RankChoice::Auto => &[],
    };
    let ranks = asked.iter().filter_map(|form| if let PredictorForm::LowRank(rank) = form { Some(rank) } else { None });
    if let Some(&rank) = ranks.chain(&options.look_ahead).find(|&&rank| rank > hidden.min(ffn)) {
        return Err(TrainError::Rank { rank, hidden, ffn });
    }
    let mut trials = vec![None; model.layers.len()];
    let ranks = match &options.rank {
        RankChoice::Fixed(rank) => vec![*rank; model.layers.len()],
        RankChoice::Each(ranks) if ranks.len() == model.layers.len() => ranks.clone(),
        RankChoice::Each(ranks) => {
            return Err(TrainError::Parameter {
                name: "ranks",
                value: ranks.len() as f64,
                expected: "one rank for each layer of the model",
            });
        }
        RankChoice::Auto => {
            let (ranks, curves) = choose_ranks(data, options, progress)?;
            trials = curves.into_iter().map(Some).collect();
            ranks
        }
    };

    let mut reports = Vec::new();
    for layer in layers {
        let mut report = train_layer(data, options, layer, &ranks, out)?;
        report.trial = trials[layer].take();
        progress.trained(&report);
        reports.push(report);
    }
    write_report(&recording.info().id, reports, out)
}

/// Writes `predictors.json`, and `timings.json` beside it, which alone depends on the machine.
pub fn write_report(recording: &str, layers: Vec<LayerReport>, out: &Path) -> Result<TrainReport, TrainError> {
    let report = TrainReport::new(recording, layers);
    report.write(out)?;
    Ok(report)
}

/// The predictor of every layer for [`RankChoice::Auto`], from a short trial of each layer of the model, and the trials.
pub fn choose_ranks(
    data: TrainingData<'_>,
    options: &TrainOptions,
    progress: &dyn Progress,
) -> Result<(Vec<PredictorForm>, Vec<RankCurve>), TrainError> {
    let recording = data.recording;
    let shape = Shape::new(recording, options);
    let spec = &recording.info().model;
    let layers = spec.layers.len();
    let reading = Reading::new(spec, &options.run)?;
    let mut curves = Vec::with_capacity(layers);
    for layer in 0..layers {
        let set = training_set(recording, layer, layer)?;
        let curve = trial(&set, data.projection(layer, &set)?, options, &shape, &reading)
            .map_err(TrainError::in_layer(layer))?;
        progress.tried(layer, &curve);
        curves.push(curve);
    }
    let budget = (options.size_budget * (shape.ffn_bytes * layers as u64) as f64) as u64;
    let (bytes, slot_bytes) = (options.run.room(spec) as u64, reading.group_bytes());
    let ranks = choose_forms(&curves, &Memory { bytes, predictors_max: budget, slot_bytes })?;
    Ok((ranks, curves))
}

/// Fits each rank of the ladder briefly.
fn trial(
    set: &TrainingSet,
    projection: Option<Arc<Projection>>,
    options: &TrainOptions,
    shape: &Shape,
    reading: &Reading,
) -> Result<RankCurve, TrainError> {
    let params = options.fit.clone().projection(projection);
    let params = params.epochs(TRIAL_EPOCHS).tokens_max(TRIAL_TOKENS.min(options.fit.0.tokens_max)).batch(128);
    let mut params = params.check()?;
    let starts = params.starts(set)?;
    let held_out = held_out_tokens(set, TRIAL_TOKENS / 2);
    let layer_reading = reading.layer(set);
    let mut curve = RankCurve {
        ranks: Vec::new(),
        bytes: Vec::new(),
        costs: Vec::new(),
        admitted: Vec::new(),
        slots: reading.slots.clone(),
        token_ns: Vec::new(),
    };
    let rows = set.targets().fire();
    let bytes = |form| form_bytes(form, shape.rows(rows.len()), options.dtype);
    let most = (LAYER_SHARE_MAX * options.size_budget * shape.ffn_bytes as f64) as u64;
    let mut tried = |form, predictor: Fitted| {
        let predictor = predictor.with_rows(&rows);
        let measured = Curve::measure(&predictor, set, &held_out);
        let (cost, threshold) = (measured.at_misses(JUDGED_MISSES).false_positive_rate, threshold(&measured, options));
        let mut token_ns = layer_reading.token_ns(&predictor, set, threshold);
        // A short trial may do worse with a higher rank; training to the end does not.
        if let Some(before) = curve.token_ns.last() {
            token_ns.iter_mut().zip(before).for_each(|(ns, before)| *ns = ns.min(*before));
        }
        let point = measured.at_threshold(threshold);
        curve.admitted.push(point.predicted_fraction);
        curve.ranks.push(form);
        curve.bytes.push(bytes(form));
        curve.costs.push(curve.costs.last().map_or(cost, |least: &f64| least.min(cost)));
        curve.token_ns.push(token_ns);
        point.false_positive_rate * (1.0 - point.active_fraction) * shape.ffn as f64
    };
    // The projection needs no training, and is as good as no rank of its size and more.
    let projection = starts.quantised(set)?.filter(|_| bytes(PredictorForm::PROJECTION) <= most);
    let most = if projection.is_some() { bytes(PredictorForm::PROJECTION) } else { most };
    let mut last: Option<(u64, f64)> = None;
    for rank in ladder(shape.hidden, shape.ffn) {
        let bytes = bytes(PredictorForm::LowRank(rank));
        if bytes > most && last.is_some() {
            break;
        }
        // Where so little remains that no raise could pay, higher ranks need not be tried.
        if last.is_some_and(|(smaller, alarms)| !can_pay(alarms * reading.neuron_ns_max(), bytes - smaller)) {
            break;
        }
        params.rank = rank;
        let (predictor, _) = params.fit_from(&starts, set)?;
        last = Some((bytes, tried(PredictorForm::LowRank(rank), Fitted::low_rank(predictor, options.dtype))));
    }
    if let Some(projection) = projection {
        tried(PredictorForm::PROJECTION, projection.into());
    }
    Ok(curve)
}

/// What a layer's predictor in this form misses and predicts in vain when it is trained with this seed, judged as
/// [`train_layer`] judges it. Nothing is written.
pub fn judge_seed(
    data: TrainingData<'_>,
    options: &TrainOptions,
    layer: usize,
    form: PredictorForm,
    seed: u64,
) -> Result<SeedPoint, TrainError> {
    let options = TrainOptions { fit: options.fit.clone().seed(seed), ..options.clone() };
    let set = training_set(data.recording, layer, layer)?;
    let held_out = held_out_tokens(&set, CALIBRATION_TOKENS);
    let (predictor, _) = Fitted::fit(&options, data, &set, layer, form)?;
    let stored = predictor.as_stored().map_err(TrainError::in_layer(layer))?;
    let calibration = Curve::measure(&stored, &set, &held_out);
    let threshold = threshold(&calibration, &options);
    let point = match data.validation.map(|v| training_set(v, layer, layer)).transpose()? {
        Some(other) => Curve::measure(&stored, &other, &everything(&other)).at_threshold(threshold),
        None => calibration.at_threshold(threshold),
    };
    let OperatingPoint { false_negative_rate, false_positive_rate, .. } = point;
    Ok(SeedPoint { seed, false_negative_rate, false_positive_rate })
}

/// Trains one layer's predictor and writes it into `out`; `forms` are those of all layers of the model. With a look-ahead the
/// next layer must be recorded too.
pub fn train_layer(
    data: TrainingData<'_>,
    options: &TrainOptions,
    layer: usize,
    forms: &[PredictorForm],
    out: &Path,
) -> Result<LayerReport, TrainError> {
    options.check()?;
    create_directory(out).map_err(|source| TrainError::Io { path: out.to_path_buf(), source })?;
    let TrainingData { recording, validation, .. } = data;
    let shape = Shape::new(recording, options);
    let set = training_set(recording, layer, layer)?;
    let other = validation.map(|v| training_set(v, layer, layer)).transpose()?;
    let held_out = held_out_tokens(&set, CALIBRATION_TOKENS);
    let began = Instant::now();
    let (predictor, fit) = Fitted::fit(options, data, &set, layer, forms[layer])?;
    let seconds = began.elapsed().as_secs_f64();

    let stored = predictor.as_stored().map_err(TrainError::in_layer(layer))?;
    let calibration = Curve::measure(&stored, &set, &held_out);
    let threshold = threshold(&calibration, options);
    let measure = |predictor: &Fitted| match &other {
        Some(other) => Curve::measure(predictor, other, &everything(other)),
        None => Curve::measure(predictor, &set, &held_out),
    };
    let rows = predictor.rows();
    let bytes = |dtype| predictor_bytes(predictor.rank(), shape.rows(rows.unwrap_or(shape.ffn)), dtype);
    let curves = predictor.dtypes().iter().map(|&dtype| {
        let curve = measure(&predictor.rounded(dtype));
        let points = CURVE_MISSES.iter().map(|&m| curve.at_misses(m)).collect();
        DTypeCurve { dtype, bytes: bytes(dtype), points }
    });
    let curves = curves.collect();
    let on_other = other.is_some().then(|| measure(&stored).at_threshold(threshold));

    drop((set, other));
    let ahead = match options.look_ahead {
        Some(rank) if layer + 1 < forms.len() => {
            let compare = options.compare_look_ahead.then_some(forms[layer + 1]);
            Some(train_look_ahead(data, options, layer, rank, compare)?)
        }
        _ => None,
    };

    let (rank, dtype, bytes) = (predictor.rank(), predictor.dtype(), bytes(predictor.dtype()));
    let shifted = predictor.shifted(threshold);
    let mut parts = vec![shifted.part("")];
    if let Some((small, _)) = &ahead {
        parts.push(small.part(LOOK_AHEAD));
    }
    let path = predictor_path(out, layer);
    write_predictor(&path, &parts).map_err(|source| TrainError::Io { path, source })?;
    Ok(LayerReport {
        layer,
        rank,
        dtype,
        neurons: shape.ffn,
        rows,
        bytes,
        ffn_bytes: shape.ffn_bytes,
        held_out: calibration.at_threshold(threshold),
        validation: on_other,
        curves,
        look_ahead: ahead.map(|(_, report)| report),
        trial: None,
        seconds,
        fit,
    })
}
