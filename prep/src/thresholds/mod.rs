//! Thresholds for models whose neurons are never exactly zero: below which magnitude a neuron may be left out.
//!
//! One number is chosen for the whole model: the share of each layer's squared output energy that is cut off. From it follow a
//! threshold for every layer and, measured on calibration text with the neurons below really left out, the perplexity. Several
//! shares go through the model side by side with the model as it is, layer by layer, so that one layer is in memory at a time.
//! What is chosen on the documents to train on is then held against those that are held out, and lowered until it keeps there
//! what was allowed.
//!
//! A threshold decides which neurons predictors learn to find. It does not know them, and nothing that is computed is ever
//! thrown away for it.

mod file;
mod passes;
mod spread;

use std::ops::Range;
use std::path::Path;

use flashlm::error::RuntimeError;
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::model::ModelSpec;
use flashlm_kernels::Threads;
use serde::{Deserialize, Serialize};

use crate::layers::PassError;
use crate::record::{Calibration, RecordError};
use crate::states::StatesError;
use passes::{Copy, Passes, Scores, positions, work};

pub use file::{ThresholdFile, ThresholdFileError};
pub use spread::Spread;

/// Shares of a token's squared energy in a layer that are tried.
pub const CUTS: [f64; 8] = [0.0005, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2];
/// Share of the tokens that thresholds are verified on: a loss of a per cent needs many positions to be seen.
pub const VERIFIED: f64 = 0.5;
/// Loss of perplexity that is allowed where nothing is said.
pub const DEFAULT_LOSS: f64 = 0.01;
/// Times that a share is lowered, at most, until held-out text keeps the loss that was allowed; then nothing is left out.
const ROUNDS: usize = 8;
/// Positions that either part must have.
const NEEDED: usize = 20;

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

/// What the chosen thresholds do to documents that they were not chosen on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verified {
    /// Scored positions.
    pub positions: usize,
    /// Perplexity of the model as it is.
    pub perplexity: f64,
    /// Perplexity with neurons below the thresholds left out.
    pub with_thresholds: f64,
    /// The loss of perplexity, as a share.
    pub loss: f64,
    /// Its standard error; loss and error together are within what was allowed.
    pub error: f64,
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
    /// The share of squared energy that is cut off: where between those tried the loss is what was allowed, or less, if held-out
    /// documents lost more.
    pub cut: f64,
    /// What follows: a threshold for each layer.
    pub thresholds: Vec<f32>,
    /// Neurons above it, for each layer, over all documents.
    pub active: Vec<f64>,
    /// On held-out documents; files of earlier versions do not have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified: Option<Verified>,
}

impl Measured {
    /// Neurons above the chosen thresholds, mean over layers.
    pub fn mean_active(&self) -> f64 {
        self.active.iter().sum::<f64>() / self.active.len().max(1) as f64
    }
}

/// Tokens to measure on where nothing is said. In a large model a token costs more.
pub fn default_tokens(spec: &ModelSpec) -> usize {
    if spec.hidden_size >= 2048 { 2048 } else { 4096 }
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
    #[error(
        "{training} positions to choose thresholds on and {held_out} held out to verify them; at least {NEEDED} of each are needed"
    )]
    TooShort {
        /// Scored positions to choose on.
        training: usize,
        /// Scored positions held out.
        held_out: usize,
    },
}

/// Finds thresholds for `checkpoint` that cost at most `loss` of perplexity: chosen on the documents of `calibration` that are to be
/// trained on, and lowered until those held out keep it, with a standard error to spare. Scratch files, which have no
/// names, go to the directory `scratch`; `progress` is told the work done and the work in all, which may grow.
pub fn find_thresholds(
    checkpoint: &Checkpoint,
    calibration: &Calibration,
    loss: f64,
    threads: &Threads,
    scratch: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Measured, ThresholdError> {
    let flags = calibration.split().flags(calibration.tokens.len());
    let (held_out, training): (Vec<Range<usize>>, Vec<_>) = calibration.ranges().partition(|range| flags[range.start]);
    if positions(&training).min(positions(&held_out)) < NEEDED {
        return Err(ThresholdError::TooShort { training: positions(&training), held_out: positions(&held_out) });
    }
    let spec = checkpoint.spec();
    let (chosen_on, round) = ((1 + CUTS.len() as u64) * work(spec, &training), work(spec, &held_out));
    let (mut done, total) = (0, std::cell::Cell::new(chosen_on + 2 * round));
    let mut tell = |more: u64| {
        done += more;
        progress(done, total.get().max(done));
    };
    let tokens = &calibration.tokens;
    let mut passes = Passes { checkpoint, tokens, threads, scratch, progress: &mut tell };
    let copies: Vec<Copy<'_>> = std::iter::once(Copy::Whole).chain(CUTS.map(Copy::Share)).collect();
    let (scores, mut spreads) = passes.run(&training, &copies)?;
    let mean = |of: &dyn Fn(&Spread) -> f64| spreads.iter().map(of).sum::<f64>() / spreads.len() as f64;
    let levels: Vec<Level> = CUTS
        .iter()
        .zip(&scores[1..])
        .map(|(&cut, copy)| Level {
            cut,
            active: mean(&|spread| spread.active(spread.threshold(cut))),
            perplexity: copy.perplexity(),
            top1_agreement: copy.agreement(&scores[0]),
        })
        .collect();
    let dense = scores[0].perplexity();
    let mut cut = cut_for(loss, dense, &levels);

    let mut whole: Option<(Scores, Vec<Spread>)> = None;
    let mut rounds = 0;
    let (thresholds, verified) = loop {
        let thresholds: Vec<f32> = spreads.iter().map(|spread| spread.threshold(cut)).collect();
        let copies = [Copy::Whole, Copy::Thresholds(&thresholds)];
        let (mut scores, found) = passes.run(&held_out, &copies[usize::from(whole.is_some())..])?;
        let Some(with) = scores.pop() else { unreachable!("a copy was sent through") };
        let (whole, _) = whole.get_or_insert_with(|| (scores.pop().unwrap_or_default(), found));
        let (lost, error) = with.loss_against(whole);
        if lost + error <= loss || cut == 0.0 {
            let (positions, perplexity) = (whole.losses.len(), whole.perplexity());
            break (
                thresholds,
                Verified { positions, perplexity, with_thresholds: with.perplexity(), loss: lost, error },
            );
        }
        rounds += 1;
        // Loss grows about as the share does.
        cut = if rounds < ROUNDS { cut * (loss / (lost + error)).clamp(0.2, 0.8) } else { 0.0 };
        total.set(total.get() + round);
    };
    // How many are active is said of all documents.
    let held_out_spreads = whole.map(|(_, spreads)| spreads).unwrap_or_default();
    spreads.iter_mut().zip(&held_out_spreads).for_each(|(spread, other)| spread.merge(other));
    let active = spreads.iter().zip(&thresholds).map(|(spread, &t)| spread.active(t)).collect();
    let positions = positions(&training);
    let verified = Some(verified);
    Ok(Measured { positions, perplexity: dense, levels, loss_allowed: loss, cut, thresholds, active, verified })
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
