//! Copies of a model going through the same text side by side, each with other neurons left out, layer by layer.

use std::ops::Range;
use std::path::Path;

use flashlm::error::RuntimeError;
use flashlm::forward::head::Head;
use flashlm::forward::weights::{LayerWeights, OuterWeights};
use flashlm::neurons::hook::{Activations, Cutoff, FfnHook};
use flashlm::sampler::greedy;
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::model::ModelSpec;
use flashlm_kernels::{MatmulScratch, Threads};

use super::{Spread, ThresholdError};
use crate::evaluate::log_sum_exp;
use crate::layers::LayerRunner;
use crate::record::{CheckpointTensors, layer_ffn};
use crate::states::{HiddenStates, StatesError};

/// Positions whose logits are computed together.
const HEAD_ROWS: usize = 32;

/// What a copy leaves out.
pub(super) enum Copy<'a> {
    /// Nothing.
    Whole,
    /// In each layer the weakest neurons with this share of the energy, as the whole model before it shows it.
    Share(f64),
    /// In each layer the neurons up to its threshold.
    Thresholds(&'a [f32]),
}

/// What a copy makes of the text.
#[derive(Default)]
pub(super) struct Scores {
    /// Of each scored position, in nats.
    pub(super) losses: Vec<f64>,
    /// The likeliest token there.
    pub(super) best: Vec<u32>,
}

impl Scores {
    pub(super) fn perplexity(&self) -> f64 {
        (self.losses.iter().sum::<f64>() / self.losses.len().max(1) as f64).exp()
    }

    /// Share of positions where the likeliest token is the other's.
    pub(super) fn agreement(&self, other: &Self) -> f64 {
        let same = self.best.iter().zip(&other.best).filter(|(a, b)| a == b).count();
        same as f64 / self.best.len().max(1) as f64
    }

    /// How much more perplexity this is than the other's, as a share, and the standard error of that.
    pub(super) fn loss_against(&self, other: &Self) -> (f64, f64) {
        let differences = || self.losses.iter().zip(&other.losses).map(|(a, b)| a - b);
        let count = self.losses.len().max(2) as f64;
        let mean = differences().sum::<f64>() / count;
        let variance = differences().map(|d| (d - mean).powi(2)).sum::<f64>() / (count - 1.0);
        (mean.exp_m1(), mean.exp() * (variance / count).sqrt())
    }
}

/// Positions that are scored in these sequences: all but the last of each.
pub(super) fn positions(ranges: &[Range<usize>]) -> usize {
    ranges.iter().map(|range| range.len().saturating_sub(1)).sum()
}

/// Work of one copy that goes through `ranges`: weights that are multiplied.
pub(super) fn work(spec: &ModelSpec, ranges: &[Range<usize>]) -> u64 {
    let tokens: usize = ranges.iter().map(ExactSizeIterator::len).sum();
    (tokens * spec.layers.len() * layer_work(spec) + positions(ranges) * spec.vocab_size * spec.embed_size) as u64
}

/// Work of one token in one layer.
fn layer_work(spec: &ModelSpec) -> usize {
    (spec.ffn().vectors() * spec.ffn().size + spec.attention().qkv_size() + spec.hidden_size) * spec.hidden_size
}

pub(super) struct Passes<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) tokens: &'a [u32],
    pub(super) threads: &'a Threads,
    pub(super) scratch: &'a Path,
    pub(super) work: Work<'a>,
}

/// How much of the work is done.
pub(super) struct Work<'a> {
    pub(super) done: u64,
    /// All there is to do, as far as that is known.
    pub(super) total: u64,
    /// Is told both.
    pub(super) progress: &'a mut dyn FnMut(u64, u64),
}

impl Work<'_> {
    fn add(&mut self, done: u64) {
        self.done += done;
        (self.progress)(self.done, self.total.max(self.done));
    }

    /// There is more to do than was said.
    pub(super) fn expect(&mut self, more: u64) {
        self.total += more;
    }
}

impl Passes<'_> {
    /// Sends copies through the sequences `ranges`; also gives how strongly the neurons of each layer fire in the whole model, if
    /// the first copy is that.
    pub(super) fn run<const COPIES: usize>(
        &mut self,
        ranges: &[Range<usize>],
        copies: &[Copy<'_>; COPIES],
    ) -> Result<([Scores; COPIES], Vec<Spread>), ThresholdError> {
        let (spreads, states) = self.layers(ranges, copies)?;
        Ok((self.heads(ranges, &states)?, spreads))
    }

    fn new_states(&self) -> Result<HiddenStates, StatesError> {
        HiddenStates::temporary(self.scratch, self.tokens.len(), self.checkpoint.spec().hidden_size)
    }

    /// Also gives the states after the last layer, of every copy.
    fn layers(
        &mut self,
        ranges: &[Range<usize>],
        copies: &[Copy<'_>],
    ) -> Result<(Vec<Spread>, Vec<HiddenStates>), ThresholdError> {
        let checkpoint = self.checkpoint;
        let spec = checkpoint.spec();
        let longest = ranges.iter().map(|r| r.len()).max().unwrap_or(0);
        let mut runner = LayerRunner::new(spec, self.threads, longest)?;
        let outer = OuterWeights::load(spec, &mut CheckpointTensors::new(checkpoint))?;
        let mut states = copies.iter().map(|_| self.new_states()).collect::<Result<Vec<_>, _>>()?;
        for states in &mut states {
            runner.embed(&outer, self.tokens, ranges.iter().cloned(), states)?;
        }
        drop(outer);
        let mut spreads = Vec::with_capacity(spec.layers.len());
        for layer in 0..spec.layers.len() {
            let weights = LayerWeights::load(spec, layer, &mut CheckpointTensors::new(checkpoint))?;
            let (mut ffn, down_norms) = layer_ffn(checkpoint, layer)?;
            let mut observer =
                SpreadObserver { spread: Spread::default(), down_norms, tokens: 0, activations: Vec::new() };
            for (number, copy) in copies.iter().enumerate() {
                let cutoff = match copy {
                    Copy::Whole => 0.0,
                    Copy::Share(cut) => observer.spread.threshold(*cut),
                    Copy::Thresholds(thresholds) => thresholds[layer],
                };
                let mut output = self.new_states()?;
                for range in ranges.iter().cloned() {
                    let tokens = range.len();
                    let watcher = matches!(copy, Copy::Whole).then_some(&mut observer as &mut dyn FfnHook);
                    let mut hook = Cutoff { cutoff, watcher };
                    runner.run(&weights, &mut ffn, range, (&states[number], &mut output), Some(&mut hook))?;
                    self.work.add((tokens * layer_work(spec)) as u64);
                }
                observer.take_in();
                states[number] = output;
            }
            spreads.push(observer.spread);
        }
        Ok((spreads, states))
    }

    /// What each copy's states make of the text.
    fn heads<const COPIES: usize>(
        &mut self,
        ranges: &[Range<usize>],
        states: &[HiddenStates],
    ) -> Result<[Scores; COPIES], ThresholdError> {
        let checkpoint = self.checkpoint;
        let spec = checkpoint.spec();
        let outer = OuterWeights::load(spec, &mut CheckpointTensors::new(checkpoint))?;
        let head = Head { spec, weights: &outer, threads: self.threads };
        let (mut logits, mut scratch) = (Vec::new(), MatmulScratch::default());
        let mut all = [(); COPIES].map(|()| Scores::default());
        for (scores, states) in all.iter_mut().zip(states) {
            for range in ranges {
                let last = range.end.saturating_sub(1);
                for start in (range.start..last).step_by(HEAD_ROWS) {
                    let rows = HEAD_ROWS.min(last - start);
                    let mut block = vec![0.0; rows * spec.hidden_size];
                    states.read(start, &mut block)?;
                    head.logits_of_many(&block, start + 1, &mut logits, &mut scratch)?;
                    for (row, next) in logits.chunks_exact(spec.vocab_size).zip(&self.tokens[start + 1..]) {
                        scores.losses.push(log_sum_exp(row) - f64::from(row[*next as usize]));
                        scores.best.push(greedy(row));
                    }
                    self.work.add((rows * spec.vocab_size * spec.embed_size) as u64);
                }
            }
        }
        Ok(all)
    }
}

struct SpreadObserver {
    spread: Spread,
    down_norms: Vec<f32>,
    tokens: usize,
    /// `[tokens, neurons]` of the piece of text that goes through, put together from pieces of the neurons.
    activations: Vec<f32>,
}

impl SpreadObserver {
    /// Adds what was put together.
    fn take_in(&mut self) {
        let rows = self.activations.chunks_exact(self.down_norms.len());
        rows.take(self.tokens).for_each(|row| self.spread.add(row, &self.down_norms));
        self.tokens = 0;
    }
}

impl FfnHook for SpreadObserver {
    fn input(&mut self, _layer: usize, tokens: usize, _input: &[f32]) -> Result<(), RuntimeError> {
        self.take_in();
        self.tokens = tokens;
        self.activations.resize(tokens * self.down_norms.len(), 0.0);
        Ok(())
    }

    fn activations(&mut self, piece: &mut Activations<'_>) -> Result<(), RuntimeError> {
        let rows = self.activations.chunks_exact_mut(self.down_norms.len());
        for (row, values) in rows.zip(piece.values.chunks_exact(piece.count)) {
            row[piece.first..piece.first + piece.count].copy_from_slice(values);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_have_an_error() {
        let scores = |losses: &[f64]| Scores { losses: losses.to_vec(), best: vec![1, 2, 3, 4] };
        let dense = scores(&[1.0, 2.0, 3.0, 2.0]);
        let (loss, error) = scores(&[1.02, 2.0, 3.02, 2.0]).loss_against(&dense);
        assert!((loss - 0.01f64.exp_m1()).abs() < 1e-12);
        assert!((error - 0.01f64.exp() * (4.0 * 1e-4 / 3.0f64 / 4.0).sqrt()).abs() < 1e-12, "{error}");
        assert_eq!(dense.loss_against(&dense), (0.0, 0.0));
        assert_eq!(dense.agreement(&Scores { best: vec![1, 2, 0, 0], ..Scores::default() }), 0.5);
        assert!((dense.perplexity() - 2f64.exp()).abs() < 1e-12);
    }
}
