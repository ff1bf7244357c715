//! What to train and how, and what follows from it for every fit: the tokens that are held out, thresholds, sizes.

use std::ops::Range;
use std::sync::Arc;

use flashlm_formats::bundle::PredictorDType;
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::model::{DType, ModelSpec};
use flashlm_formats::predictors::{FitLog, PredictorForm};
use flashlm_formats::recording::Recording;
use flashlm_formats::weight_format::WeightFormat;
use linfa::ParamGuard;

use super::activity::{TrainingSet, thin};
use super::curve::Curve;
use super::params::{LowRankPredictorParams, TrainError};
use super::predictor::LowRankPredictor;
use super::projection::Projection;
use super::rank::RowsOf;
use crate::expected_run::ExpectedRun;

/// Share of the recorded active neurons that the recorded model's weights make active; inputs are recorded in half precision.
const AGREEMENT_LEAST: f64 = 0.95;

/// How each layer's predictor is chosen.
#[derive(Clone, Debug, PartialEq)]
pub enum RankChoice {
    /// By a short trial on every layer, under the size budget.
    Auto,
    /// The same for all layers.
    Fixed(PredictorForm),
    /// One for each layer of the model.
    Each(Vec<PredictorForm>),
}

/// What to train and how.
#[derive(Clone, Debug)]
pub struct TrainOptions {
    /// Layers to train.
    pub layers: Range<usize>,
    /// Their ranks.
    pub rank: RankChoice,
    /// How they are stored.
    pub dtype: PredictorDType,
    /// Share of the active pairs that a layer's predictor must find on held-out tokens.
    pub recall: f64,
    /// The threshold falls below what `recall` asks for while each neuron read still brings this share of the mean energy
    /// of an active one.
    pub worth: f64,
    /// The threshold also falls until this many times as many neurons are predicted as are active.
    pub over_fetch: f64,
    /// In place of all three: a neuron is predicted where this probability, which the trained logit stands for, is exceeded.
    pub fixed_threshold: Option<f64>,
    /// Bytes of all predictors as a share of the FFN's, at most, for [`RankChoice::Auto`].
    pub size_budget: f64,
    /// The run that predictors are to make fast, likewise.
    pub run: ExpectedRun,
    /// Bytes of one weight of the model, which the budget is counted against.
    pub weight_bytes: usize,
    /// Rank of the look-ahead predictors; none without.
    pub look_ahead: Option<usize>,
    /// Measure the next layer's own predictor as a look-ahead too, which takes another training for each layer.
    pub compare_look_ahead: bool,
    /// Everything else about the fit; its rank does not count.
    pub fit: LowRankPredictorParams,
}

impl TrainOptions {
    /// The defaults for a model: all layers, automatic ranks, int8.
    pub fn new(layers: usize) -> Self {
        TrainOptions {
            layers: 0..layers,
            rank: RankChoice::Auto,
            dtype: PredictorDType::Int8,
            recall: 0.96,
            worth: 0.05,
            over_fetch: 0.0,
            fixed_threshold: None,
            size_budget: 0.09,
            run: ExpectedRun::new(WeightFormat::Plain(DType::F16)),
            weight_bytes: 2,
            look_ahead: None,
            compare_look_ahead: true,
            fit: LowRankPredictor::params(1),
        }
    }
}

/// What predictors are trained from.
#[derive(Clone, Copy)]
pub struct TrainingData<'a> {
    /// Inputs and activity, to train on and to hold out.
    pub recording: &'a Recording,
    /// Another recording, to measure on as well.
    pub validation: Option<&'a Recording>,
    /// The recorded model, whose weights give a better start than the inputs alone.
    pub checkpoint: Option<&'a Checkpoint>,
}

impl<'a> TrainingData<'a> {
    /// Of a recording alone.
    pub fn new(recording: &'a Recording) -> Self {
        Self { recording, validation: None, checkpoint: None }
    }

    /// The weights that the activity of `layer`, recorded in `set`, comes from, where the checkpoint is known.
    pub(super) fn projection(&self, layer: usize, set: &TrainingSet) -> Result<Option<Arc<Projection>>, TrainError> {
        let Some(checkpoint) = self.checkpoint else { return Ok(None) };
        let (recorded, found) = (&self.recording.info().model, checkpoint.spec());
        let shape = |spec: &ModelSpec| (spec.layers.len(), spec.hidden_size, spec.ffn().size);
        if shape(recorded) != shape(found) {
            return Err(TrainError::OtherShape { recorded: shape(recorded), found: shape(found) });
        }
        let projection = Projection::read(checkpoint, layer)?;
        match projection.agreement(set) {
            Some(share) if share < AGREEMENT_LEAST => Err(TrainError::OtherWeights { layer, share: 100.0 * share }),
            _ => Ok(Some(Arc::new(projection))),
        }
    }
}

impl TrainOptions {
    /// An error where thin matrices are to be stored as only a projection can be.
    pub(super) fn check(&self) -> Result<(), TrainError> {
        match self.dtype {
            PredictorDType::F16 | PredictorDType::Int8 => Ok(()),
            PredictorDType::Int4 => Err(TrainError::DType { dtype: self.dtype.name() }),
        }
    }
}

pub(super) struct Shape {
    pub(super) hidden: usize,
    pub(super) ffn: usize,
    pub(super) ffn_bytes: u64,
}

impl Shape {
    pub(super) fn new(recording: &Recording, options: &TrainOptions) -> Self {
        let model = &recording.info().model;
        let (hidden, ffn) = (model.hidden_size, model.ffn().size);
        Self { hidden, ffn, ffn_bytes: (model.ffn().vectors() * hidden * ffn * options.weight_bytes) as u64 }
    }

    /// With rows for this many neurons.
    pub(super) fn rows(&self, rows: usize) -> RowsOf {
        RowsOf { hidden: self.hidden, neurons: self.ffn, rows }
    }
}

pub(super) fn held_out_tokens(set: &TrainingSet, most: usize) -> Vec<u32> {
    let mut tokens = set.targets().part(true);
    thin(&mut tokens, most);
    tokens
}

/// The threshold: at least the recall asked for, and lower where misses still carry energy or more over-fetch is asked for;
/// or the fixed one.
pub(super) fn threshold(curve: &Curve, options: &TrainOptions) -> f32 {
    if let Some(probability) = options.fixed_threshold {
        return (probability / (1.0 - probability)).ln() as f32;
    }
    let needed = curve.at_misses(1.0 - options.recall).threshold;
    let least = curve.at_over_fetch(options.over_fetch).threshold;
    needed.min(curve.at_worth(options.worth).threshold).min(least)
}

/// A fit with the options' parameters and this rank, and how it went.
pub(super) fn fit(
    options: &TrainOptions,
    set: &TrainingSet,
    projection: Option<Arc<Projection>>,
    rank: usize,
) -> Result<(LowRankPredictor, FitLog), TrainError> {
    let mut params = options.fit.clone().projection(projection);
    params.0.rank = rank;
    let params = params.check()?;
    params.fit_from(&params.starts(set)?, set)
}

/// All tokens of a recording.
pub(super) fn everything(set: &TrainingSet) -> Vec<u32> {
    (0..set.targets().tokens() as u32).collect()
}
