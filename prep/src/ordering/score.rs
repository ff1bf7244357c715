use flashlm::cache::PolicyKind;
use flashlm::disk_cost::ReadCost;
use flashlm::planner::PlanLimits;
use flashlm::replay::{ReplayCounts, ReplayOptions, WantedSets, replay};
use flashlm_formats::ids::{NeuronId, Position};
use flashlm_formats::orders::{ReadFigures, StrategyScore};

use super::positions;

/// What an order is judged by.
#[derive(Clone, Copy, Debug)]
pub struct ScoreOptions {
    /// Neuron records in a group.
    pub records: u32,
    /// Bytes of a group.
    pub group_bytes: u64,
    /// Largest request.
    pub request_bytes_max: u64,
    /// What reading costs.
    pub cost: ReadCost,
    /// The cache.
    pub policy: PolicyKind,
    /// Slots of the cache, in groups.
    pub slots: u32,
    /// Tokens that fill the cache and are not counted.
    pub warm_up: usize,
}

impl ScoreOptions {
    /// What plans respect.
    pub fn limits(&self) -> PlanLimits {
        PlanLimits::for_cost(&self.cost, self.group_bytes, self.request_bytes_max)
    }
}

/// What an order costs on sequences that it was not made from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OrderScore {
    /// All that a token wants is read, neighbours together, gaps never: what the order does by itself.
    pub wanted: ReplayCounts,
    /// What the cache misses is read, neighbours together, gaps never.
    pub missed: ReplayCounts,
    /// What the cache misses is read as the runtime does it: through gaps where that is cheaper, in bounded requests.
    pub planned: ReplayCounts,
    /// Predicted time of the last, in milliseconds per token: the score.
    pub ms_per_token: f64,
}

impl OrderScore {
    /// As `orders.json` says it of the order that `strategy` made.
    pub fn of_strategy(&self, strategy: &str) -> StrategyScore {
        let figures = |counts: &ReplayCounts| ReadFigures {
            reads_per_token: counts.reads_per_token(),
            bytes_per_token: counts.bytes_per_token(),
            mean_run_groups: counts.mean_run_groups(),
            mean_read_groups: counts.mean_read_groups(),
        };
        StrategyScore {
            strategy: strategy.into(),
            wanted: figures(&self.wanted),
            missed: figures(&self.missed),
            planned: figures(&self.planned),
            hit_rate: self.planned.hit_rate(),
            predicted_ms_per_token: self.ms_per_token,
        }
    }
}

/// Replays `wanted`, held out, with neuron `n` at `position[n]`.
pub fn score(wanted: &WantedSets<NeuronId>, position: &[Position], options: &ScoreOptions) -> OrderScore {
    let groups = wanted.stored(position, options.records);
    let adjacent = PlanLimits::adjacent_only(options.group_bytes);
    let base =
        ReplayOptions { policy: options.policy, slots: options.slots, limits: adjacent, warm_up: options.warm_up };
    let planned = replay(&groups, &ReplayOptions { limits: options.limits(), ..base });
    OrderScore {
        wanted: replay(&groups, &ReplayOptions { slots: 0, policy: PolicyKind::Window(0), ..base }),
        missed: replay(&groups, &base),
        planned,
        ms_per_token: planned.ms_per_token(&options.cost),
    }
}

/// Orders of a layer, judged on the same tokens.
pub(super) struct Trial<'a> {
    wanted: &'a WantedSets<NeuronId>,
    options: &'a ScoreOptions,
    scores: Vec<StrategyScore>,
    best: Option<Judged>,
}

/// An order, who made it, and its predicted time.
pub(super) struct Judged {
    pub(super) strategy: &'static str,
    pub(super) order: Vec<NeuronId>,
    ms_per_token: f64,
}

impl<'a> Trial<'a> {
    /// On `wanted`, neurons that orders were not made from.
    pub(super) fn new(wanted: &'a WantedSets<NeuronId>, options: &'a ScoreOptions) -> Self {
        Trial { wanted, options, scores: Vec::new(), best: None }
    }

    /// Judges an order. One that is not `eligible` is there to compare with.
    pub(super) fn judge(&mut self, strategy: &'static str, order: Vec<NeuronId>, eligible: bool) {
        let result = score(self.wanted, &positions(&order), self.options);
        self.scores.push(result.of_strategy(strategy));
        let ms_per_token = result.ms_per_token;
        if eligible && self.best.as_ref().is_none_or(|best| ms_per_token < best.ms_per_token) {
            self.best = Some(Judged { strategy, order, ms_per_token });
        }
    }

    /// The order of the least predicted time, of equals the one judged first, and the scores of all.
    ///
    /// # Panics
    /// Where none was eligible.
    pub(super) fn end(self) -> (Judged, Vec<StrategyScore>) {
        (self.best.expect("at least one order is eligible"), self.scores)
    }
}
