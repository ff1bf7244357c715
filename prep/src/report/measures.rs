//! What the report counts in a recording, layer by layer. One layer is in memory at a time for each thread, and of it a
//! sample of whole sequences.

use std::ops::Range;

use flashlm::cache::PolicyKind;
use flashlm::disk_cost::ReadCost;
use flashlm::planner::PlanLimits;
use flashlm::replay::{ReplayOptions, WantedSets, replay};
use flashlm_formats::ids::{GroupId, NeuronId, Position};
use flashlm_formats::orders::OrderFile;
use flashlm_formats::recording::{LayerRecording, Recording};
use serde::{Deserialize, Serialize};

use crate::coactivation::LayerActivity;
use crate::ordering::positions;

/// Windows that reuse is measured for, in tokens.
pub(super) const WINDOWS: usize = 8;
/// Caches that are tried, in percent of the layer.
pub(super) const CACHE_PERCENT: [u32; 11] = [0, 5, 10, 15, 20, 30, 40, 50, 60, 80, 100];
/// Side of a co-activation matrix, at most.
const BINS_MAX: usize = 128;
/// Tokens that co-activation is counted on, at most.
const MATRIX_TOKENS_MAX: usize = 4096;
/// Largest read that is planned.
const REQUEST_BYTES_MAX: u64 = 1 << 20;

/// How neurons lie on flash, and what reading costs there.
#[derive(Clone, Copy, Debug)]
pub struct Storage {
    /// Neuron records in a group.
    pub records_per_group: u32,
    /// Bytes of a group.
    pub group_bytes: u64,
    /// What reads cost.
    pub cost: ReadCost,
}

/// A layer's figures.
#[derive(Serialize, Deserialize)]
pub struct LayerMeasures {
    pub(super) layer: usize,
    /// Over the whole recording.
    pub(super) active_fraction: f64,
    /// Share of all tokens at which a neuron fires, hottest neuron first.
    pub(super) rates: Vec<f64>,
    /// On the sample.
    pub(super) activity: LayerActivity,
    /// Identity, frequency, and the chosen order where there is one.
    pub(super) orders: Vec<OrderMeasures>,
}

/// What one order of a layer's neurons makes of the sample.
#[derive(Serialize, Deserialize)]
pub(super) struct OrderMeasures {
    pub(super) name: String,
    /// The strategy behind it.
    pub(super) strategy: String,
    pub(super) runs: RunLengths,
    /// Predicted milliseconds per token at [`CACHE_PERCENT`].
    pub(super) ms_per_token: Vec<f64>,
    /// Bytes read per token there.
    pub(super) bytes_per_token: Vec<f64>,
    /// Made when asked for.
    pub(super) matrix: Option<Matrix>,
}

impl LayerMeasures {
    /// Whether this is the layer whose co-activation is shown.
    pub(super) fn has_matrix(&self) -> bool {
        self.orders.iter().any(|order| order.matrix.is_some())
    }
}

/// Whole sequences spread over the recording, `tokens_max` tokens or one sequence at least. Of those held out, if only these may
/// be taken and there are some.
pub(super) fn sample(recording: &Recording, tokens_max: usize, held_out: bool) -> Vec<Range<usize>> {
    let flags = recording.split().flags(recording.tokens().len());
    let apart = |sequence: &Range<usize>| flags[sequence.clone()].iter().all(|held_out| *held_out);
    let mut sequences: Vec<Range<usize>> = recording.sequences().collect();
    if held_out && sequences.iter().any(apart) {
        sequences.retain(apart);
    }
    let tokens: usize = sequences.iter().map(ExactSizeIterator::len).sum();
    let mean = (tokens / sequences.len().max(1)).max(1);
    let count = (tokens_max / mean).clamp(1, sequences.len().max(1));
    (0..count).map(|at| sequences[at * sequences.len() / count].clone()).collect()
}

/// Counts in one layer.
pub(super) fn measure(
    layer: &LayerRecording,
    number: usize,
    sample: &[Range<usize>],
    chosen: Option<&OrderFile>,
    storage: &Storage,
    with_matrix: bool,
) -> LayerMeasures {
    let neurons = layer.ffn();
    let mut sets = WantedSets::<NeuronId>::new(neurons as u32);
    let mut offsets = vec![0];
    for sequence in sample {
        for token in sequence.clone() {
            sets.push(layer.active(token).map(|n| NeuronId(n as u32)));
        }
        offsets.push(sets.tokens() as u32);
    }
    let counts = &layer.summary().active_count;
    let identity: Vec<NeuronId> = (0..neurons as u32).map(NeuronId).collect();
    let mut hottest = identity.clone();
    hottest.sort_by_key(|&n| (std::cmp::Reverse(counts[n.index()]), n));
    let rates = hottest.iter().map(|&n| counts[n.index()] as f64 / layer.tokens() as f64).collect();

    let order = |name: &str, strategy: &str, order: &[NeuronId]| {
        let position = positions(order);
        let placed = sets.placed(&position);
        let (ms_per_token, bytes_per_token) = budgets(&placed.grouped(storage.records_per_group), storage);
        OrderMeasures {
            name: name.into(),
            strategy: strategy.into(),
            runs: RunLengths::of(&placed),
            ms_per_token,
            bytes_per_token,
            matrix: with_matrix.then(|| Matrix::of(&placed)),
        }
    };
    let mut measured = vec![order("identity", "identity", &identity), order("frequency", "frequency", &hottest)];
    if let Some(chosen) = chosen {
        measured.push(order("chosen", &chosen.strategy, &chosen.order));
    }
    LayerMeasures {
        layer: number,
        active_fraction: layer.active_fraction(),
        rates,
        activity: LayerActivity::of(&sets, &offsets, WINDOWS),
        orders: measured,
    }
}

/// Predicted time and bytes per token at each size of the cache; the first half of the tokens fills it.
fn budgets(groups: &WantedSets<GroupId>, storage: &Storage) -> (Vec<f64>, Vec<f64>) {
    let limits = PlanLimits::for_cost(&storage.cost, storage.group_bytes, REQUEST_BYTES_MAX);
    CACHE_PERCENT
        .iter()
        .map(|&percent| {
            let slots = (groups.layer_size() as u64 * percent as u64 / 100) as u32;
            let options = ReplayOptions { policy: PolicyKind::DEFAULT, slots, limits, warm_up: groups.tokens() / 2 };
            let counts = replay(groups, &options);
            (counts.ms_per_token(&storage.cost), counts.bytes_per_token())
        })
        .unzip()
}

/// How many runs of adjacent active neurons there are of each length, over all tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct RunLengths {
    /// Runs by length; index 0 is not used.
    pub(super) counts: Vec<u64>,
}

impl RunLengths {
    pub(super) fn of(sets: &WantedSets<Position>) -> Self {
        let mut counts = Vec::new();
        for token in sets.iter() {
            for run in token.chunk_by(|a, b| a.after(1) == *b) {
                if counts.len() <= run.len() {
                    counts.resize(run.len() + 1, 0);
                }
                counts[run.len()] += 1;
            }
        }
        RunLengths { counts }
    }

    pub(super) fn add(&mut self, other: &RunLengths) {
        self.counts.resize(self.counts.len().max(other.counts.len()), 0);
        for (sum, count) in self.counts.iter_mut().zip(&other.counts) {
            *sum += count;
        }
    }

    /// Active neurons in a run, on average over runs.
    pub(super) fn mean(&self) -> f64 {
        let runs: u64 = self.counts.iter().sum();
        if runs == 0 { 0.0 } else { self.neurons_from(1) as f64 / runs as f64 }
    }

    /// Share of the active neurons that lie in runs of at least `length`.
    pub(super) fn share_from(&self, length: usize) -> f64 {
        let all = self.neurons_from(1);
        if all == 0 { 0.0 } else { self.neurons_from(length) as f64 / all as f64 }
    }

    fn neurons_from(&self, length: usize) -> u64 {
        self.counts.iter().enumerate().skip(length).map(|(length, &count)| length as u64 * count).sum()
    }
}

/// How often neurons fire together, in bins of neighbours.
#[derive(Serialize, Deserialize)]
pub(super) struct Matrix {
    /// Neurons of the layer.
    pub(super) neurons: usize,
    /// Share of the tokens at which a neuron of the row's bin and another one of the column's both fire, on average over pairs.
    pub(super) together: Vec<Vec<f64>>,
    /// The same for pairs of neighbours.
    pub(super) neighbours: f64,
}

impl Matrix {
    pub(super) fn of(sets: &WantedSets<Position>) -> Self {
        Self::with_bins(sets, BINS_MAX)
    }

    fn with_bins(sets: &WantedSets<Position>, bins_max: usize) -> Self {
        let neurons = sets.layer_size() as usize;
        let bins = neurons.min(bins_max);
        let bin_of = |position: Position| position.index() * bins / neurons;
        let mut sizes = vec![0u64; bins];
        (0..neurons as u32).for_each(|n| sizes[bin_of(Position(n))] += 1);
        let step = sets.tokens().div_ceil(MATRIX_TOKENS_MAX).max(1);
        let (mut pairs, mut active) = (vec![0u64; bins * bins], vec![0u64; bins]);
        let (mut neighbours, mut tokens) = (0u64, 0u64);
        for wanted in sets.iter().step_by(step) {
            tokens += 1;
            active.fill(0);
            wanted.iter().for_each(|&n| active[bin_of(n)] += 1);
            neighbours += wanted.windows(2).filter(|w| w[0].after(1) == w[1]).count() as u64;
            for (row, &a) in active.iter().enumerate().filter(|(_, a)| **a > 0) {
                for (column, &b) in active.iter().enumerate() {
                    pairs[row * bins + column] += a * if row == column { b - 1 } else { b };
                }
            }
        }
        let share = |count: u64, of: u64| if of == 0 { 0.0 } else { count as f64 / of as f64 };
        let cell = |row: usize, column: usize| {
            let others = if row == column { sizes[column] - 1 } else { sizes[column] };
            share(pairs[row * bins + column], tokens * sizes[row] * others)
        };
        Matrix {
            neurons,
            together: (0..bins).map(|row| (0..bins).map(|column| cell(row, column)).collect()).collect(),
            neighbours: share(neighbours, tokens * (neurons as u64).saturating_sub(1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sets(tokens: &[&[u32]]) -> WantedSets<Position> {
        let mut sets = WantedSets::new(8);
        tokens.iter().for_each(|t| sets.push(t.iter().copied().map(Position)));
        sets
    }

    #[test]
    fn runs_are_counted_by_length() {
        let mut runs = RunLengths::of(&sets(&[&[0, 1, 2, 5], &[], &[3, 5, 6]]));
        assert_eq!(runs.counts, [0, 2, 1, 1]);
        assert_eq!(runs.mean(), 7.0 / 4.0);
        assert_eq!([1, 2, 3, 4].map(|l| runs.share_from(l)), [1.0, 5.0 / 7.0, 3.0 / 7.0, 0.0]);
        runs.add(&RunLengths::of(&sets(&[&[0, 1, 2, 3, 4]])));
        assert_eq!(runs.counts, [0, 2, 1, 1, 0, 1]);
        assert_eq!(RunLengths::default().mean(), 0.0);
    }

    #[test]
    fn pairs_are_counted_without_a_neuron_and_itself() {
        let sets = sets(&[&[0, 1, 4], &[1, 5]]);
        let matrix = Matrix::with_bins(&sets, 4);
        // Bins of two neurons, two tokens. {0, 1} fire together once; four pairs of bins 0 and 2 could fire at each token.
        assert_eq!(matrix.together[0][0], 0.5);
        assert_eq!(matrix.together[0][2], 3.0 / 8.0);
        assert_eq!(matrix.together[2][0], 3.0 / 8.0);
        assert_eq!(matrix.together[1][1], 0.0);
        assert_eq!(matrix.neighbours, 1.0 / 14.0);
    }

    #[test]
    fn a_larger_cache_reads_no_more() {
        let mut sets = WantedSets::new(64);
        (0..200u32).for_each(|t| sets.push([t % 7, 20 + t * t % 40].map(GroupId)));
        let cost = ReadCost::new(1000.0, 1.0).unwrap();
        let (ms, bytes) = budgets(&sets, &Storage { records_per_group: 1, group_bytes: 4096, cost });
        assert_eq!(ms.len(), CACHE_PERCENT.len());
        assert!(ms.is_sorted_by(|a, b| a >= b) && bytes.is_sorted_by(|a, b| a >= b));
        // Both of a token are read from another place, a request each, when nothing is kept.
        assert!(ms[0] > 0.0 && bytes[0] >= 2.0 * 4096.0 * 0.9 && ms[10] == 0.0);
    }
}
