//! Thresholds for models whose neurons are never exactly zero: below which magnitude a neuron may be left out.
//!
//! One number is chosen for the whole model: the share of each layer's squared output energy that is cut off. From it follow a
//! threshold for every layer and, measured on calibration text with the neurons below really left out, the perplexity. Several
//! shares go through the model side by side with the model as it is, layer by layer, so that one layer is in memory at a time.
//! What is chosen on the documents to train on is then checked on those that are held out, and lowered until it keeps there
//! what was allowed.
//!
//! A threshold decides which neurons predictors learn to find. It does not know them, and nothing that is computed is ever
//! discarded for it.

mod passes;
mod spread;

use std::ops::Range;
use std::path::Path;

use flashlm::error::RuntimeError;
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::model::ModelSpec;
use flashlm_formats::thresholds::{Level, Measured, Verified};
use flashlm_kernels::Threads;

use crate::layers::PassError;
use crate::record::{Calibration, RecordError};
use crate::states::StatesError;
use passes::{Copy, Passes, Work, positions, work};

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
    let parts = Parts::of(calibration)?;
    let work = Work::new(checkpoint.spec(), &parts, progress);
    let mut passes = Passes { checkpoint, tokens: &calibration.tokens, threads, scratch, work };
    let Tried { perplexity, levels, mut spreads } = try_shares(&mut passes, &parts.training)?;
    let begin = cut_for(loss, perplexity, &levels);
    let kept = lower_until_kept(&mut passes, &parts.held_out, &spreads, begin, loss)?;
    // How many are active is said of all documents.
    spreads.iter_mut().zip(&kept.spreads).for_each(|(spread, other)| spread.merge(other));
    let active = spreads.iter().zip(&kept.thresholds).map(|(spread, &t)| spread.active(t)).collect();
    Ok(Measured {
        positions: positions(&parts.training),
        perplexity,
        levels,
        loss_allowed: loss,
        cut: kept.cut,
        thresholds: kept.thresholds,
        active,
        verified: Some(kept.verified),
    })
}

/// The documents of a calibration text, as the ranges of their sequences.
struct Parts {
    /// Those to choose thresholds on.
    training: Vec<Range<usize>>,
    /// Those to verify them on.
    held_out: Vec<Range<usize>>,
}

impl Parts {
    fn of(calibration: &Calibration) -> Result<Self, ThresholdError> {
        let flags = calibration.split().flags(calibration.tokens.len());
        let (held_out, training): (Vec<_>, Vec<_>) = calibration.ranges().partition(|range| flags[range.start]);
        if positions(&training).min(positions(&held_out)) < NEEDED {
            return Err(ThresholdError::TooShort { training: positions(&training), held_out: positions(&held_out) });
        }
        Ok(Self { training, held_out })
    }
}

impl<'a> Work<'a> {
    /// All shares on the text to choose on, and one round of verification, where the model as it is goes along.
    fn new(spec: &ModelSpec, parts: &Parts, progress: &'a mut dyn FnMut(u64, u64)) -> Self {
        let copies = 1 + CUTS.len() as u64;
        let total = copies * work(spec, &parts.training) + 2 * work(spec, &parts.held_out);
        Self { done: 0, total, progress }
    }
}

/// What the shares of [`CUTS`] do to the documents to choose on.
struct Tried {
    /// Of the model as it is.
    perplexity: f64,
    levels: Vec<Level>,
    spreads: Vec<Spread>,
}

/// Sends the model as it is and with each of the shares left out through the text.
fn try_shares(passes: &mut Passes<'_>, training: &[Range<usize>]) -> Result<Tried, ThresholdError> {
    let copies: [Copy<'_>; 1 + CUTS.len()] = std::array::from_fn(|at| match at.checked_sub(1) {
        None => Copy::Whole,
        Some(at) => Copy::Share(CUTS[at]),
    });
    let ([whole, cut_off @ ..], spreads) = passes.run(training, &copies)?;
    let mean = |of: &dyn Fn(&Spread) -> f64| spreads.iter().map(of).sum::<f64>() / spreads.len() as f64;
    let levels = CUTS.iter().zip(&cut_off).map(|(&cut, scores)| Level {
        cut,
        active: mean(&|spread| spread.active(spread.threshold(cut))),
        perplexity: scores.perplexity(),
        top1_agreement: scores.agreement(&whole),
    });
    Ok(Tried { perplexity: whole.perplexity(), levels: levels.collect(), spreads })
}

/// Thresholds that keep the loss that is allowed on held-out documents.
struct Kept {
    cut: f64,
    thresholds: Vec<f32>,
    verified: Verified,
    /// How strongly neurons fire in those documents.
    spreads: Vec<Spread>,
}

/// Lowers the share `cut` until held-out documents lose no more than `loss`, the standard error included. The thresholds follow
/// from `chosen_on`, how strongly neurons fire in the other documents.
fn lower_until_kept(
    passes: &mut Passes<'_>,
    held_out: &[Range<usize>],
    chosen_on: &[Spread],
    mut cut: f64,
    loss: f64,
) -> Result<Kept, ThresholdError> {
    let at = |cut: f64| -> Vec<f32> { chosen_on.iter().map(|spread| spread.threshold(cut)).collect() };
    let mut thresholds = at(cut);
    let ([whole, mut with], spreads) = passes.run(held_out, &[Copy::Whole, Copy::Thresholds(&thresholds)])?;
    let mut rounds = 0;
    loop {
        let (lost, error) = with.loss_against(&whole);
        if lost + error <= loss || cut == 0.0 {
            let (positions, perplexity) = (whole.losses.len(), whole.perplexity());
            let verified = Verified { positions, perplexity, with_thresholds: with.perplexity(), loss: lost, error };
            return Ok(Kept { cut, thresholds, verified, spreads });
        }
        rounds += 1;
        // Loss grows about as the share does.
        cut = if rounds < ROUNDS { cut * (loss / (lost + error)).clamp(0.2, 0.8) } else { 0.0 };
        thresholds = at(cut);
        passes.work.expect(work(passes.checkpoint.spec(), held_out));
        ([with], _) = passes.run(held_out, &[Copy::Thresholds(&thresholds)])?;
    }
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
