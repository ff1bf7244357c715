//! From a recording to storage orders: for each layer the strategies are tried on what is to be trained on, judged on what is held out,
//! and the best is written.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;

use flashlm::cache::PolicyKind;
use flashlm::disk_cost::ReadCost;
use flashlm::replay::WantedSets;
use flashlm_formats::bundle::{DEFAULT_ALIGNMENT, FlashLayout, LayoutError, LayoutOptions};
use flashlm_formats::ids::NeuronId;
use flashlm_formats::model::ModelSpec;
use flashlm_formats::orders::{GroupShape, LayerScores, ORDERS_JSON, OrderFile, OrderFileError, OrderSummary};
use flashlm_formats::publish::create_directory;
use flashlm_formats::recording::{Recording, RecordingError, Split};
use flashlm_formats::weight_format::WeightFormat;

use super::score::{ScoreOptions, Trial};
use super::strategy::{Identity, LayerTraining, OrderingOptions, Strategy, StrategyKind};
use crate::coactivation::PairOptions;
use crate::demand::{WantedError, behind_a_warm_up, best_policy, wanted_sets};
use crate::expected_run::ExpectedRun;

/// Tokens that fill the cache before a score counts: of the text that orders are made from, or the first of another recording.
const WARM_UP: usize = 512;
/// Tokens, of those that orders are made from, that a layer's policy is chosen on.
const POLICY_TOKENS: usize = 4096;
/// What stands for the policy where every layer has its own.
const BY_LAYER: &str = "by layer";
/// Who made an order that was made elsewhere.
const IMPORTED: &str = "imported";

/// How a recording's layers are ordered.
#[derive(Clone, Debug)]
pub struct OrderOptions {
    /// The only strategy; without one the best of all is taken.
    pub strategy: Option<StrategyKind>,
    /// Order what the predictors in this directory choose, instead of the neurons that fired.
    pub predictors: Option<PathBuf>,
    /// Tokens that an order is made from, at most; none where orders are imported.
    pub tokens: usize,
    /// The policy of the cache before the disk; without one each layer has what a bundle would note for it.
    pub policy: Option<PolicyKind>,
    /// Its size as a share of the layer; without one about what half of the model's size leaves for it.
    pub cache: Option<f64>,
    /// How a bundle will store neurons.
    pub dtype: WeightFormat,
    /// Groups are padded to a multiple of this.
    pub alignment: usize,
    /// Neuron records in a group; without a number as many as a bundle has.
    pub records: Option<usize>,
    /// Largest read.
    pub request_bytes_max: u64,
    /// What reads cost.
    pub cost: ReadCost,
}

impl OrderOptions {
    /// The best of all strategies, for neurons stored so, in groups as a bundle has them, on a usual disk.
    pub fn new(dtype: WeightFormat) -> Self {
        Self {
            strategy: None,
            predictors: None,
            tokens: 100_000,
            policy: None,
            cache: None,
            dtype,
            alignment: DEFAULT_ALIGNMENT,
            records: None,
            request_bytes_max: 1 << 20,
            cost: ReadCost::USUAL,
        }
    }

    fn layout(&self, model: &ModelSpec) -> Result<FlashLayout, LayoutError> {
        match self.records {
            Some(records) => {
                let row_bytes = self.dtype.row_bytes(model.hidden_size);
                FlashLayout::with_records(model.ffn().size, model.ffn().vectors(), row_bytes, records, self.alignment)
            }
            None => {
                let options = LayoutOptions { alignment: self.alignment, ..LayoutOptions::default() };
                FlashLayout::new(model, self.dtype, options)
            }
        }
    }

    /// The checkpoint's order comes first: all others are compared with it.
    fn kinds(&self) -> Vec<StrategyKind> {
        self.strategy.map_or_else(|| StrategyKind::ALL.to_vec(), |only| vec![StrategyKind::Identity, only])
    }
}

/// Why layers cannot be ordered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OrderError {
    /// The recording.
    #[error(transparent)]
    Recording(#[from] RecordingError),
    /// What tokens want.
    #[error(transparent)]
    Wanted(#[from] WantedError),
    /// The order's file.
    #[error(transparent)]
    File(#[from] OrderFileError),
    /// Groups that cannot be.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Too little text.
    #[error("{} has too few tokens to make orders from some and judge them on others", dir.display())]
    TooShort {
        /// The recording.
        dir: PathBuf,
    },
    /// The recording to judge on is of another model.
    #[error("--score-on: {found} neurons a layer, the recording has {expected}")]
    OtherModel {
        /// Neurons of a layer in the recording that orders are made from.
        expected: usize,
        /// In the other.
        found: usize,
    },
    /// The file system.
    #[error("cannot write {}: {source}", path.display())]
    Io {
        /// What was to be written.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

/// All that the layers of a recording share when they are ordered.
#[derive(Debug)]
pub struct Ordering {
    out: PathBuf,
    asked: OrderOptions,
    score: ScoreOptions,
    make: OrderingOptions,
    groups: GroupShape,
    /// What orders are made from, and what they are judged on: in that, the first `warm_up` tokens fill the cache.
    training: Vec<Range<usize>>,
    judged: Vec<Range<usize>>,
    other: Option<Recording>,
}

impl Ordering {
    /// Checks the options. Orders are judged on `other`, or on documents of the recording that they were not made from; they will be
    /// written to `out`.
    ///
    /// # Errors
    /// If there are too few tokens, or another model's.
    pub fn new(
        asked: OrderOptions,
        recording: &Recording,
        other: Option<Recording>,
        out: &Path,
    ) -> Result<Self, OrderError> {
        let model = &recording.info().model;
        let layout = asked.layout(model)?;
        let (records, groups) = (layout.records_per_group() as u32, layout.groups() as u32);
        let usual = || ExpectedRun::new(asked.dtype).cache_share(model);
        let slots = (f64::from(groups) * asked.cache.unwrap_or_else(usual)) as u32;
        let whole =
            |recording: &Recording| -> Vec<Range<usize>> { std::iter::once(0..recording.tokens().len()).collect() };
        let (training, judged, warm_up) = match &other {
            Some(other) => (whole(recording), whole(other), WARM_UP.min(other.tokens().len() / 2)),
            None => {
                let (judged, warm_up) = behind_a_warm_up(recording.split(), WARM_UP);
                (recording.split().training.clone(), judged, warm_up)
            }
        };
        if training.is_empty() || Split::tokens(&judged) <= warm_up {
            return Err(OrderError::TooShort { dir: recording.dir().to_path_buf() });
        }
        let found = other.as_ref().map_or(model.ffn().size, |other| other.info().model.ffn().size);
        if found != model.ffn().size {
            return Err(OrderError::OtherModel { expected: model.ffn().size, found });
        }
        let score = ScoreOptions {
            records,
            group_bytes: layout.group_bytes() as u64,
            request_bytes_max: asked.request_bytes_max,
            cost: asked.cost,
            policy: asked.policy.unwrap_or(PolicyKind::DEFAULT),
            slots,
            warm_up,
        };
        create_directory(out).map_err(|source| OrderError::Io { path: out.to_path_buf(), source })?;
        let make = OrderingOptions {
            records,
            policy: score.policy,
            slots,
            limits: score.limits(),
            pairs: PairOptions::default(),
        };
        let groups = GroupShape::from(&layout);
        Ok(Ordering { out: out.to_path_buf(), asked, score, make, groups, training, judged, other })
    }

    /// Strategies that are tried on each layer.
    pub fn strategies(&self) -> usize {
        self.asked.kinds().len()
    }

    /// Orders one layer and writes its order; `tried` is called after each strategy.
    ///
    /// # Errors
    /// If the recording or a predictor cannot be read, or the order not be written.
    pub fn layer(
        &self,
        recording: &Recording,
        layer: usize,
        tried: &(dyn Fn() + Sync),
    ) -> Result<LayerScores, OrderError> {
        let mut recorded = recording.layer(layer)?;
        let training = wanted_sets(&mut recorded, &self.training, self.asked.tokens, self.chosen_by(layer))?;
        drop(recorded);
        let held_out = self.held_out(recording, layer)?;
        let begin = Instant::now();
        let policy = self.policy(&training);
        let input = LayerTraining::new(&training, OrderingOptions { policy, ..self.make });
        let score = ScoreOptions { policy, ..self.score };
        let mut trial = Trial::new(&held_out, &score);
        for (at, kind) in self.asked.kinds().iter().enumerate() {
            let strategy = kind.strategy();
            // The first is taken only where all are tried.
            trial.judge(strategy.name(), strategy.order(&input), at > 0 || self.asked.strategy.is_none());
            tried();
        }
        self.write(recording, layer, policy, trial, begin)
    }

    /// Judges an order that was made elsewhere, and writes it. It lists every neuron of the layer once.
    ///
    /// # Errors
    /// As [`Ordering::layer`].
    pub fn import(&self, recording: &Recording, layer: usize, order: Vec<NeuronId>) -> Result<LayerScores, OrderError> {
        let held_out = self.held_out(recording, layer)?;
        let begin = Instant::now();
        let policy = match self.asked.policy {
            Some(policy) => policy,
            None => self.policy(&wanted_sets(
                &mut recording.layer(layer)?,
                &self.training,
                usize::MAX,
                self.chosen_by(layer),
            )?),
        };
        let score = ScoreOptions { policy, ..self.score };
        let mut trial = Trial::new(&held_out, &score);
        trial.judge(Identity.name(), (0..held_out.layer_size()).map(NeuronId).collect(), false);
        trial.judge(IMPORTED, order, true);
        self.write(recording, layer, policy, trial, begin)
    }

    fn chosen_by(&self, layer: usize) -> Option<(&Path, usize)> {
        self.asked.predictors.as_deref().map(|dir| (dir, layer))
    }

    /// The policy of a layer that wants this in training, whatever the order: neurons are looked at each for itself, in caches that hold as
    /// large a share of them.
    fn policy(&self, training: &WantedSets<NeuronId>) -> PolicyKind {
        self.asked.policy.unwrap_or_else(|| {
            let last = training.tokens().saturating_sub(POLICY_TOKENS);
            let recent = training.after(last).alone();
            best_policy(&recent, recent.tokens() / 2)
        })
    }

    /// What the tokens want that orders are judged on.
    fn held_out(&self, recording: &Recording, layer: usize) -> Result<WantedSets<NeuronId>, OrderError> {
        let mut scored = self.other.as_ref().unwrap_or(recording).layer(layer)?;
        Ok(wanted_sets(&mut scored, &self.judged, usize::MAX, self.chosen_by(layer))?)
    }

    fn write(
        &self,
        recording: &Recording,
        layer: usize,
        policy: PolicyKind,
        trial: Trial,
        begin: Instant,
    ) -> Result<LayerScores, OrderError> {
        let (best, strategies) = trial.end();
        let seconds = begin.elapsed().as_secs_f64();
        let chosen = best.strategy.to_owned();
        let file = OrderFile {
            layer,
            strategy: chosen.clone(),
            recording: recording.info().id.clone(),
            groups: Some(self.groups),
            order: best.order,
        };
        let path = file.write(&self.out)?;
        let file = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(LayerScores { layer, chosen, file, policy: policy.to_string(), strategies, seconds })
    }

    /// What reading the ordered neurons is taken to cost.
    pub fn cost(&self) -> ReadCost {
        self.score.cost
    }

    /// Writes `orders.json` for layers that are ordered.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn finish(&self, recording: &Recording, layers: Vec<LayerScores>) -> Result<OrderSummary, OrderError> {
        let summary = OrderSummary {
            format: OrderSummary::FORMAT.into(),
            version: OrderSummary::VERSION,
            recording: recording.info().id.clone(),
            scored_on: self.other.as_ref().unwrap_or(recording).info().id.clone(),
            training_tokens: Split::tokens(&self.training).min(self.asked.tokens),
            scored_tokens: (Split::tokens(&self.judged) - self.score.warm_up) as u64,
            records_per_group: self.score.records,
            group_bytes: self.score.group_bytes,
            policy: self.asked.policy.map_or_else(|| BY_LAYER.into(), |policy| policy.to_string()),
            slots: self.score.slots,
            request_ns: self.score.cost.request_ns(),
            byte_ns: self.score.cost.byte_ns(),
            layers,
        };
        summary.write(&self.out).map_err(|source| OrderError::Io { path: self.out.join(ORDERS_JSON), source })?;
        Ok(summary)
    }
}
