use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use flashlm::cache::PolicyKind;
use flashlm::planner::PlanLimits;
use flashlm::replay::{ReplayOptions, WantedSets, replay_with};
use flashlm_formats::ids::{GroupId, NeuronId};

use super::clusters::cluster_path;
use super::gaps::GapSavings;
use super::greedy::greedy_path;
use super::local_search::LocalSearch;
use super::path::{PairWeights, candidates};
use crate::coactivation::{PairGraph, PairOptions};

/// What orders are to be good for.
#[derive(Clone, Copy, Debug)]
pub struct OrderingOptions {
    /// Neuron records in a group.
    pub records: u32,
    /// The cache that is between wanting and reading.
    pub policy: PolicyKind,
    /// Slots of that cache, in groups.
    pub slots: u32,
    /// Size of a group and cost of a request.
    pub limits: PlanLimits,
    /// Bounds of the pair counts.
    pub pairs: PairOptions,
}

/// What an order is made from. Work that several strategies build on is done once and kept.
#[derive(Debug)]
pub struct LayerTraining<'a> {
    wanted: &'a WantedSets<NeuronId>,
    options: OrderingOptions,
    active_pairs: OnceLock<PairGraph>,
    missed_pairs: OnceLock<PairGraph>,
    improved: OnceLock<Vec<NeuronId>>,
}

impl<'a> LayerTraining<'a> {
    /// `wanted` are the neurons that each training token wants.
    pub fn new(wanted: &'a WantedSets<NeuronId>, options: OrderingOptions) -> Self {
        let records = options.records.max(1);
        LayerTraining {
            wanted,
            options: OrderingOptions { records, ..options },
            active_pairs: OnceLock::new(),
            missed_pairs: OnceLock::new(),
            improved: OnceLock::new(),
        }
    }

    /// The neurons that each training token wants.
    pub fn wanted(&self) -> &WantedSets<NeuronId> {
        self.wanted
    }

    /// The options.
    pub fn options(&self) -> &OrderingOptions {
        &self.options
    }

    /// Pairs of what each token is missing with a cache of single neurons.
    fn missed_pairs(&self) -> &PairGraph {
        self.missed_pairs.get_or_init(|| {
            let missed = self.replayed(&self.wanted.alone(), self.options.slots.saturating_mul(self.options.records));
            PairGraph::count(&missed, &self.options.pairs)
        })
    }

    fn active_pairs(&self) -> &PairGraph {
        self.active_pairs.get_or_init(|| PairGraph::count(self.wanted, &self.options.pairs))
    }

    /// Pairs that should be neighbours. With one record to a group those that are missed together: what is cached is not
    /// read. With several those that are active together: they come, stay and go as one.
    fn pairs(&self) -> &PairGraph {
        if self.options.records > 1 { self.active_pairs() } else { self.missed_pairs() }
    }

    fn improved(&self) -> &[NeuronId] {
        self.improved.get_or_init(|| {
            let graph = self.pairs();
            let near = candidates(graph, CANDIDATES);
            let search = LocalSearch::new(greedy_path(graph), &near, PairWeights::new(graph));
            neurons(search.run(STEPS_PER_NEURON * graph.neurons() as u64).0)
        })
    }

    /// What each token is missing with the cache.
    fn replayed(&self, sets: &WantedSets<GroupId>, slots: u32) -> WantedSets<GroupId> {
        let OrderingOptions { policy, limits, .. } = self.options;
        let mut missed = WantedSets::new(sets.layer_size());
        let options = ReplayOptions { policy, slots, limits, warm_up: usize::MAX };
        replay_with(sets, &options, |_, missing| missed.push(missing.iter().copied()));
        missed
    }
}

/// A way to make an order. Deterministic, at any number of threads.
pub trait Strategy: fmt::Debug + Sync {
    /// Name, for tables and files.
    fn name(&self) -> &'static str;

    /// The order: `order[position] = neuron`, every neuron once.
    fn order(&self, training: &LayerTraining) -> Vec<NeuronId>;
}

/// As in the checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct Identity;

/// The most often active first.
#[derive(Clone, Copy, Debug)]
pub struct Frequency;

/// A path on which neighbours are read together often.
#[derive(Clone, Copy, Debug)]
pub struct Path {
    /// What the path is to be good for.
    pub objective: PathObjective,
}

/// What a [`Path`] is to be good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PathObjective {
    /// Greedy, on all active neurons: the method as published.
    Active,
    /// Greedy, on the neurons that the cache misses.
    Missed,
    /// Greedy on whichever of the two suits the groups, improved by local search.
    Improved,
    /// The same, improved further with gaps read through, on whole groups.
    Gaps,
}

/// Clusters of neurons that go together, improved with gaps read through, on whole groups.
#[derive(Clone, Copy, Debug)]
pub struct Clusters;

impl Strategy for Identity {
    fn name(&self) -> &'static str {
        "identity"
    }

    fn order(&self, training: &LayerTraining) -> Vec<NeuronId> {
        (0..training.wanted().layer_size()).map(NeuronId).collect()
    }
}

impl Strategy for Frequency {
    fn name(&self) -> &'static str {
        "frequency"
    }

    fn order(&self, training: &LayerTraining) -> Vec<NeuronId> {
        let mut uses = vec![0u64; training.wanted().layer_size() as usize];
        training.wanted().iter().flatten().for_each(|&n| uses[n.index()] += 1);
        let mut order: Vec<NeuronId> = (0..training.wanted().layer_size()).map(NeuronId).collect();
        order.sort_by_key(|&n| (std::cmp::Reverse(uses[n.index()]), n));
        order
    }
}

/// Partners that a neuron is tried beside, and that a group is when gaps are looked at, which takes longer.
const CANDIDATES: usize = 12;
const GAP_CANDIDATES: usize = 6;
/// Bounds of the local searches, in steps for each neuron or group: time grows with the size of the layer.
const STEPS_PER_NEURON: u64 = 20_000;
const GAP_STEPS_PER_GROUP: u64 = 400_000;
/// This many steps in all in any case: a few seconds, in which the search of a small layer nearly comes to its end.
const GAP_STEPS_MIN: u64 = 600_000_000;
/// Tokens of the sample that gaps are judged on.
const GAP_TOKENS_MAX: usize = 16_384;

impl Strategy for Path {
    fn name(&self) -> &'static str {
        match self.objective {
            PathObjective::Active => "path-active",
            PathObjective::Missed => "path-missed",
            PathObjective::Improved => "path-improved",
            PathObjective::Gaps => "path",
        }
    }

    fn order(&self, training: &LayerTraining) -> Vec<NeuronId> {
        match self.objective {
            PathObjective::Active => neurons(greedy_path(training.active_pairs())),
            PathObjective::Missed => neurons(greedy_path(training.missed_pairs())),
            PathObjective::Improved => training.improved().to_vec(),
            PathObjective::Gaps => improve_with_gaps(training.improved(), training),
        }
    }
}

impl Strategy for Clusters {
    fn name(&self) -> &'static str {
        "clusters"
    }

    fn order(&self, training: &LayerTraining) -> Vec<NeuronId> {
        improve_with_gaps(&neurons(cluster_path(training.pairs())), training)
    }
}

/// A path of neurons.
fn neurons(path: Vec<u32>) -> Vec<NeuronId> {
    path.into_iter().map(NeuronId).collect()
}

/// Groups as they are in `order`, moved as wholes.
fn improve_with_gaps(order: &[NeuronId], training: &LayerTraining) -> Vec<NeuronId> {
    let OrderingOptions { records, slots, limits, pairs, .. } = training.options;
    let groups = training.wanted.stored(&super::positions(order), records);
    let missed = training.replayed(&groups, slots);
    let savings = GapSavings::new(&missed, &limits, GAP_TOKENS_MAX);
    let mut near = candidates(&PairGraph::count(&missed, &pairs), GAP_CANDIDATES);
    // The last group may be short, and then must stay last: groups of a layer begin at multiples of their size.
    let whole = order.len() as u32 / records;
    near.truncate(whole as usize);
    near.iter_mut().for_each(|list| list.retain(|&group| group < whole));
    let search = LocalSearch::new((0..whole).collect(), &near, savings);
    let path = search.run((GAP_STEPS_PER_GROUP * whole as u64).max(GAP_STEPS_MIN)).0;
    let records = records as usize;
    let mut result = Vec::with_capacity(order.len());
    path.iter().for_each(|&g| result.extend_from_slice(&order[g as usize * records..][..records]));
    result.extend_from_slice(&order[whole as usize * records..]);
    result
}

/// The strategies there are, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StrategyKind {
    /// [`Identity`].
    Identity,
    /// [`Frequency`].
    Frequency,
    /// [`Path`].
    Path(PathObjective),
    /// [`Clusters`].
    Clusters,
}

impl StrategyKind {
    /// All, simplest first.
    pub const ALL: [StrategyKind; 7] = [
        StrategyKind::Identity,
        StrategyKind::Frequency,
        StrategyKind::Path(PathObjective::Active),
        StrategyKind::Path(PathObjective::Missed),
        StrategyKind::Path(PathObjective::Improved),
        StrategyKind::Path(PathObjective::Gaps),
        StrategyKind::Clusters,
    ];

    /// The strategy.
    pub fn strategy(self) -> Box<dyn Strategy> {
        match self {
            StrategyKind::Identity => Box::new(Identity),
            StrategyKind::Frequency => Box::new(Frequency),
            StrategyKind::Path(objective) => Box::new(Path { objective }),
            StrategyKind::Clusters => Box::new(Clusters),
        }
    }
}

/// A strategy's name that means nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown strategy {0:?}; known are identity, frequency, path, clusters, and the steps on the way to path: path-active, path-missed, path-improved"
)]
pub struct ParseStrategyError(String);

impl FromStr for StrategyKind {
    type Err = ParseStrategyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = StrategyKind::ALL.into_iter().find(|k| k.strategy().name() == text);
        found.ok_or_else(|| ParseStrategyError(text.to_string()))
    }
}
