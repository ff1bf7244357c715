//! Thresholds for models whose neurons are never exactly zero: below which magnitude a neuron may be left out.
//!
//! One number is chosen for the whole model: the share of each layer's squared output energy that is cut off. From it follow a
//! threshold for every layer and, measured on calibration text with the neurons below really left out, the perplexity. Several
//! shares go through the model side by side with the model as it is, layer by layer, so that one layer is in memory at a time.
//!
//! A threshold decides which neurons predictors learn to find. It does not know them, and nothing that is computed is ever
//! thrown away for it.

mod file;
mod spread;

use std::path::Path;

use flashlm_formats::checkpoint::Checkpoint;
use flashlm_kernels::Threads;
use flashlm_runtime::error::RuntimeError;
use flashlm_runtime::model::ffn::{FfnCall, FfnObserver, FfnSource, ObservedActivations};
use flashlm_runtime::model::forward::{Head, HeadScratch};
use flashlm_runtime::model::weights::{LayerWeights, OuterWeights};
use flashlm_runtime::sampler::greedy;
use serde::{Deserialize, Serialize};

use crate::evaluate::log_sum_exp;
use crate::layers::{LayerRunner, PassError};
use crate::record::{Calibration, CheckpointTensors, RecordError, layer_ffn};
use crate::states::{self, HiddenStates, StatesError};

pub use file::{ThresholdFile, ThresholdFileError};
pub use spread::Spread;

/// Shares of a token's squared energy in a layer that are tried.
pub const CUTS: [f64; 8] = [0.0005, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2];

/// One share that was tried.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Level {
    /// Share of a token's squared energy in each layer that is cut off, in the mean over tokens.
    pub cut: f64,
    /// Neurons above the threshold, mean over layers.
    pub active: f64,
    /// Perplexity with the others left out.
    pub perplexity: f64,
    /// Share of positions where the likeliest token stays the same.
    pub top1_agreement: f64,
}

/// What was measured, and what follows from it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// Scored positions.
    pub positions: usize,
    /// Perplexity of the model as it is.
    pub perplexity: f64,
    /// Every share that was tried, ascending.
    pub levels: Vec<Level>,
    /// The loss of perplexity that was allowed, as a share.
    pub loss_allowed: f64,
    /// The share of squared energy that should cost just that, between those tried.
    pub cut: f64,
    /// What follows: a threshold for each layer.
    pub thresholds: Vec<f32>,
    /// Neurons above it, for each layer.
    pub active: Vec<f64>,
}

impl Measured {
    /// Neurons above the chosen thresholds, mean over layers.
    pub fn mean_active(&self) -> f64 {
        self.active.iter().sum::<f64>() / self.active.len().max(1) as f64
    }
}

/// Why thresholds could not be found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ThresholdError {
    /// The checkpoint.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The forward pass.
    #[error(transparent)]
    Pass(#[from] PassError),
    /// The forward pass.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The hidden states.
    #[error(transparent)]
    States(#[from] StatesError),
    /// Too little text.
    #[error("the text gives {found} positions to score; at least {needed} are needed")]
    TooShort {
        /// Scored positions.
        found: usize,
        /// The least.
        needed: usize,
    },
}

/// Finds thresholds for `checkpoint` that cost `loss` of perplexity on `calibration`. Scratch files go to `scratch`, which is deleted
/// afterwards; `progress` is told layers done and layers in all.
pub fn find_thresholds(
    checkpoint: &Checkpoint,
    calibration: &Calibration,
    loss: f64,
    threads: &Threads,
    scratch: &Path,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Measured, ThresholdError> {
    let ranges: Vec<_> = calibration.sequences.windows(2).map(|w| w[0] as usize..w[1] as usize).collect();
    let positions: usize = ranges.iter().map(|r| r.len().saturating_sub(1)).sum();
    const NEEDED: usize = 100;
    if positions < NEEDED {
        return Err(ThresholdError::TooShort { found: positions, needed: NEEDED });
    }
    let longest = ranges.iter().map(|r| r.len()).max().unwrap_or(0);
    let spec = checkpoint.spec();
    let mut run =
        Run { checkpoint, calibration, ranges, threads, runner: LayerRunner::new(spec, threads, longest)?, scratch };
    let found = run.layers(progress).and_then(|spreads| Ok((run.heads()?, spreads)));
    for stream in 0..=CUTS.len() {
        states::remove_dir(&run.dir(stream))?;
    }
    let (sums, spreads) = found?;

    let perplexity = |sum: &Sums| (sum.nll / positions as f64).exp();
    let mean = |of: &dyn Fn(&Spread) -> f64| spreads.iter().map(of).sum::<f64>() / spreads.len() as f64;
    let levels: Vec<Level> = CUTS
        .iter()
        .zip(&sums[1..])
        .map(|(&cut, sum)| Level {
            cut,
            active: mean(&|spread| spread.active(spread.threshold(cut))),
            perplexity: perplexity(sum),
            top1_agreement: sum.agreed as f64 / positions as f64,
        })
        .collect();
    let dense = perplexity(&sums[0]);
    let cut = cut_for(loss, dense, &levels);
    let thresholds: Vec<f32> = spreads.iter().map(|spread| spread.threshold(cut)).collect();
    let active = spreads.iter().zip(&thresholds).map(|(spread, &t)| spread.active(t)).collect();
    Ok(Measured { positions, perplexity: dense, levels, loss_allowed: loss, cut, thresholds, active })
}

/// The share between those tried at which the loss of perplexity should be `loss`, by the first level that costs more and the one before.
fn cut_for(loss: f64, dense: f64, levels: &[Level]) -> f64 {
    let mut before = (0.0, 0.0);
    for level in levels {
        let here = (level.cut, (level.perplexity / dense - 1.0).max(before.1));
        if here.1 > loss {
            return before.0 + (here.0 - before.0) * (loss - before.1) / (here.1 - before.1);
        }
        before = here;
    }
    before.0
}

/// What is summed over positions for one stream.
#[derive(Clone, Copy, Default)]
struct Sums {
    nll: f64,
    agreed: usize,
}

struct Run<'a> {
    checkpoint: &'a Checkpoint,
    calibration: &'a Calibration,
    ranges: Vec<std::ops::Range<usize>>,
    threads: &'a Threads,
    runner: LayerRunner<'a>,
    scratch: &'a Path,
}

impl Run<'_> {
    /// Stream 0 is the model as it is, the others have a share cut off each.
    fn dir(&self, stream: usize) -> std::path::PathBuf {
        self.scratch.join(format!("stream-{stream}"))
    }

    fn states(&self, stream: usize, layer: usize) -> Result<HiddenStates, StatesError> {
        let hidden = self.checkpoint.spec().hidden_size;
        HiddenStates::open(&self.dir(stream), layer, self.calibration.tokens.len(), hidden)
    }

    fn new_states(&self, stream: usize, layer: usize) -> Result<HiddenStates, StatesError> {
        let hidden = self.checkpoint.spec().hidden_size;
        HiddenStates::create(&self.dir(stream), layer, self.calibration.tokens.len(), hidden)
    }

    fn layers(&mut self, progress: &mut dyn FnMut(usize, usize)) -> Result<Vec<Spread>, ThresholdError> {
        let spec = self.checkpoint.spec();
        let outer = OuterWeights::load(spec, &mut CheckpointTensors::new(self.checkpoint))?;
        for stream in 0..=CUTS.len() {
            let mut output = self.new_states(stream, 0)?;
            self.runner.embed(&outer, &self.calibration.tokens, self.ranges.iter().cloned(), &mut output)?;
            output.publish()?;
        }
        let mut spreads = Vec::with_capacity(spec.layers);
        for layer in 0..spec.layers {
            let weights = LayerWeights::load(spec, layer, &mut CheckpointTensors::new(self.checkpoint))?;
            let (ffn, down_norms) = layer_ffn(self.checkpoint, layer)?;
            let mut ffn = WithCutoff { source: ffn, cutoff: 0.0 };
            let mut observer =
                SpreadObserver { spread: Spread::default(), down_norms, tokens: 0, activations: Vec::new() };
            for stream in 0..=CUTS.len() {
                ffn.cutoff = if stream == 0 { 0.0 } else { observer.spread.threshold(CUTS[stream - 1]) };
                let (input, mut output) = (self.states(stream, layer)?, self.new_states(stream, layer + 1)?);
                for range in self.ranges.iter().cloned() {
                    let observer = (stream == 0).then_some(&mut observer as &mut dyn FfnObserver);
                    self.runner.run(&weights, &mut ffn, range, (&input, &mut output), observer)?;
                }
                observer.take_in();
                output.publish()?;
                input.remove()?;
            }
            spreads.push(observer.spread);
            progress(layer + 1, spec.layers);
        }
        Ok(spreads)
    }

    fn heads(&mut self) -> Result<Vec<Sums>, ThresholdError> {
        let spec = self.checkpoint.spec();
        let outer = OuterWeights::load(spec, &mut CheckpointTensors::new(self.checkpoint))?;
        let head = Head { spec, weights: &outer, threads: self.threads };
        let streams = (0..=CUTS.len()).map(|stream| self.states(stream, spec.layers)).collect::<Result<Vec<_>, _>>()?;
        let (mut scratch, mut state) = (HeadScratch::new(spec), vec![0.0; spec.hidden_size]);
        let mut sums = vec![Sums::default(); streams.len()];
        for range in &self.ranges {
            for position in range.start..range.end.saturating_sub(1) {
                let mut dense_best = 0;
                for (stream, (states, sum)) in streams.iter().zip(&mut sums).enumerate() {
                    states.read(position, &mut state)?;
                    head.logits(&state, position + 1, &mut scratch)?;
                    let (logits, next) = (scratch.logits(), self.calibration.tokens[position + 1]);
                    sum.nll += log_sum_exp(logits) - f64::from(logits[next as usize]);
                    let best = greedy(logits);
                    if stream == 0 {
                        dense_best = best;
                    }
                    sum.agreed += usize::from(best == dense_best);
                }
            }
        }
        Ok(sums)
    }
}

/// A source whose weak neurons are left out.
pub(crate) struct WithCutoff<S> {
    pub(crate) source: S,
    /// Of this magnitude and below.
    pub(crate) cutoff: f32,
}

impl<S: FfnSource> FfnSource for WithCutoff<S> {
    fn run(&mut self, call: FfnCall<'_>) -> Result<(), RuntimeError> {
        self.source.run(FfnCall { cutoff: self.cutoff, ..call })
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

impl FfnObserver for SpreadObserver {
    fn input(&mut self, _layer: usize, tokens: usize, _input: &[f32]) -> Result<(), RuntimeError> {
        self.take_in();
        self.tokens = tokens;
        self.activations.resize(tokens * self.down_norms.len(), 0.0);
        Ok(())
    }

    fn activations(&mut self, piece: &ObservedActivations<'_>) -> Result<(), RuntimeError> {
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
    fn the_share_lies_between_the_levels_around_the_loss() {
        let level = |cut, perplexity| Level { cut, active: 0.5, perplexity, top1_agreement: 1.0 };
        let levels = [level(0.01, 10.05), level(0.02, 10.2), level(0.1, 12.0)];
        let cut = |loss| cut_for(loss, 10.0, &levels);
        assert!((cut(0.0125) - 0.015).abs() < 1e-9);
        assert!((cut(0.0025) - 0.005).abs() < 1e-9, "below the first level");
        assert_eq!(cut(9.0), 0.1, "nothing beyond what was tried");
        // A level that is better than the one before costs no less.
        let bumpy = [level(0.01, 10.1), level(0.02, 10.05), level(0.1, 10.3)];
        assert!((cut_for(0.02, 10.0, &bumpy) - 0.06).abs() < 1e-9);
    }
}
