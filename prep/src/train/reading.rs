//! What a token's reading takes with a predictor: its choices replayed through the runtime's cache and planner.
//!
//! The storage order is not known yet; a simple one stands for it, the path by what fires together.

use flashlm::cache::PolicyKind;
use flashlm::disk_cost::ReadCost;
use flashlm::planner::PlanLimits;
use flashlm::replay::{ReplayOptions, WantedSets, replay};
use flashlm_formats::bundle::{FlashLayout, LayoutError, LayoutOptions};
use flashlm_formats::ids::{NeuronId, Position};
use flashlm_formats::model::ModelSpec;
use rayon::prelude::*;

use super::activity::TrainingSet;
use super::scores::NeuronScores;
use crate::coactivation::PairOptions;
use crate::expected_run::ExpectedRun;
use crate::ordering::{LayerTraining, OrderingOptions, Path, PathObjective, Strategy, positions};

/// Cache sizes, in thousandths of a layer.
const SIZES: [u32; 13] = [0, 30, 60, 100, 150, 200, 250, 300, 400, 500, 650, 800, 1000];
/// Tokens that fill the caches, and tokens that count, at most.
const WARM_UP: usize = 1024;
const COUNTED: usize = 1024;
/// What computing takes for each byte of a neuron that is chosen, cached or not, in nanoseconds: measured, at the geometry of OPT-1.3B
/// with and without false alarms (docs/measurements/predictors.md).
const COMPUTED_BYTE_NS: f64 = 0.4;
/// Largest request.
const REQUEST_BYTES_MAX: u64 = 1 << 20;

/// How the neurons of any layer are read.
pub(super) struct Reading {
    layout: FlashLayout,
    cost: ReadCost,
    /// Cache sizes that are looked at, in groups.
    pub(super) slots: Vec<u32>,
}

impl Reading {
    pub(super) fn new(spec: &ModelSpec, run: &ExpectedRun) -> Result<Self, LayoutError> {
        let layout = FlashLayout::new(spec, run.ffn, LayoutOptions::default())?;
        let mut slots = SIZES.map(|size| (layout.groups() as u64 * u64::from(size) / 1000) as u32).to_vec();
        // A small layer has fewer sizes.
        slots.dedup();
        Ok(Self { layout, cost: run.cost, slots })
    }

    pub(super) fn group_bytes(&self) -> u64 {
        self.layout.group_bytes() as u64
    }

    /// Bytes of a neuron.
    fn neuron_bytes(&self) -> f64 {
        self.layout.group_bytes() as f64 / self.layout.records_per_group() as f64
    }

    /// The most nanoseconds that a neuron can take: a request of its own.
    pub(super) fn neuron_ns_max(&self) -> f64 {
        self.cost.nanoseconds(1, self.group_bytes()) + COMPUTED_BYTE_NS * self.neuron_bytes()
    }

    fn limits(&self) -> PlanLimits {
        PlanLimits::for_cost(&self.cost, self.group_bytes(), REQUEST_BYTES_MAX)
    }

    /// Where this layer's neurons lie, and the tokens that its reads are looked at for.
    pub(super) fn layer(&self, set: &TrainingSet) -> LayerReading<'_> {
        let (before, mut tokens) = (set.targets().part(false), set.targets().part(true));
        let mut fired: WantedSets<NeuronId> = WantedSets::new(set.targets().ffn() as u32);
        before.iter().for_each(|&token| fired.push(set.targets().of(token as usize).0.iter().copied().map(NeuronId)));
        let options = OrderingOptions {
            records: self.layout.records_per_group() as u32,
            policy: PolicyKind::DEFAULT,
            slots: 0,
            limits: self.limits(),
            pairs: PairOptions::default(),
        };
        let order = Path { objective: PathObjective::Active }.order(&LayerTraining::new(&fired, options));
        tokens.truncate(COUNTED);
        let warm_up = before.len().min(WARM_UP);
        tokens.splice(..0, before[before.len() - warm_up..].iter().copied());
        LayerReading { reading: self, position: positions(&order), tokens, warm_up }
    }
}

/// How the neurons of a layer are read.
pub(super) struct LayerReading<'a> {
    pub(super) reading: &'a Reading,
    position: Vec<Position>,
    /// Tokens to train on, which fill the caches, and then those held out, which count.
    tokens: Vec<u32>,
    warm_up: usize,
}

impl LayerReading<'_> {
    /// Nanoseconds of a token for each cache size where the neurons that score above `threshold` are computed and, unless they are cached,
    /// read.
    pub(super) fn token_ns(&self, predictor: &dyn NeuronScores, set: &TrainingSet, threshold: f32) -> Vec<f64> {
        let mut wanted: WantedSets<NeuronId> = WantedSets::new(predictor.neurons() as u32);
        predictor.scores(set.records(), &self.tokens, &mut |_, scores| {
            for scores in scores.chunks_exact(predictor.neurons()) {
                let chosen = (0..).zip(scores).filter(|(_, score)| **score > threshold);
                wanted.push(chosen.map(|(neuron, _)| NeuronId(neuron)));
            }
        });
        self.of_demand(&wanted)
    }

    /// The same for what tokens want.
    fn of_demand(&self, wanted: &WantedSets<NeuronId>) -> Vec<f64> {
        let Self { reading, position, warm_up, .. } = self;
        let (warm_up, limits) = (*warm_up, reading.limits());
        let groups = wanted.stored(position, reading.layout.records_per_group() as u32);
        let counted = wanted.tokens().saturating_sub(warm_up).max(1) as f64;
        let chosen: usize = wanted.iter().skip(warm_up).map(<[NeuronId]>::len).sum();
        let computing = COMPUTED_BYTE_NS * reading.neuron_bytes() * chosen as f64 / counted;
        let with = |&slots: &u32| {
            let counts = replay(&groups, &ReplayOptions { policy: PolicyKind::DEFAULT, slots, limits, warm_up });
            reading.cost.nanoseconds(counts.reads, counts.bytes) / counted + computing
        };
        reading.slots.par_iter().map(with).collect()
    }
}
