//! Which neurons recorded tokens need: those that fired, or those that a trained predictor chooses; and how often a neuron cache
//! would have them.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use flashlm::cache::PolicyKind;
use flashlm::error::RuntimeError;
use flashlm::neurons::predictor::PredictorTensors;
use flashlm::planner::PlanLimits;
use flashlm::replay::{ReplayOptions, WantedSets, replay};
use flashlm::tensors::SharedBytes;
use flashlm_formats::bundle::{LayerSparsity, ReusePoint};
use flashlm_formats::ids::{GroupId, Id, NeuronId, Position};
use flashlm_formats::predictors::{PredictorFileError, read_predictor};
use flashlm_formats::recording::{LayerRecording, RecordingError, Split};
use flashlm_kernels::Threads;
use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

/// Tokens whose inputs are in memory at once.
const BLOCK: usize = 512;
/// Tokens that fill the caches before misses count, and tokens that they are counted on, at most.
const WARM_UP: usize = 2048;
const COUNTED: usize = 2048;
/// Cache sizes of a reuse curve, in thousandths of the layer.
const SIZES: [u32; 18] = [0, 20, 40, 60, 80, 100, 120, 140, 160, 180, 200, 250, 300, 400, 500, 650, 800, 1000];

/// Half-lives that are tried for a layer's cache, and the cache sizes that they are judged by, in thousandths of the layer.
const HALF_LIVES: [u32; 7] = [4, 8, 16, 32, 128, 256, 1024];
const JUDGED_SIZES: [u32; 3] = [100, 250, 500];
/// The share of the default policy's misses that another half-life must save to be noted.
const GAIN_LEAST: f64 = 0.01;

/// Why it cannot be said what tokens want.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WantedError {
    /// The recording.
    #[error(transparent)]
    Recording(#[from] RecordingError),
    /// The predictor's file.
    #[error(transparent)]
    Predictors(#[from] PredictorFileError),
    /// The predictor does not suit the recording.
    #[error(transparent)]
    Predictor(#[from] RuntimeError),
    /// The system refused a thread.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
}

/// A layer's neurons that each of these tokens wants, at most `tokens_max` tokens: with the directory that `train` wrote those
/// that its predictor chooses, else those that fired.
pub fn wanted_sets(
    recorded: &mut LayerRecording,
    parts: &[Range<usize>],
    tokens_max: usize,
    chosen_by: Option<(&Path, usize)>,
) -> Result<WantedSets<NeuronId>, WantedError> {
    if let Some((dir, layer)) = chosen_by {
        let file: SharedBytes = Arc::new(read_predictor(dir, layer)?);
        return chosen_sets(recorded, parts, tokens_max, (&PredictorTensors::parse(&file)?, ""));
    }
    let mut sets = WantedSets::new(recorded.ffn() as u32);
    for token in parts.iter().cloned().flatten().take(tokens_max) {
        sets.push(recorded.active(token).map(|n| NeuronId(n as u32)));
    }
    Ok(sets)
}

/// The same for the predictor whose tensors have this prefix: of a file, whose neurons are in the checkpoint's order, or of a bundle,
/// where they are in storage order.
pub fn chosen_sets<T: Id>(
    recorded: &mut LayerRecording,
    parts: &[Range<usize>],
    tokens_max: usize,
    (tensors, prefix): (&PredictorTensors<'_>, &str),
) -> Result<WantedSets<T>, WantedError> {
    let mut sets = WantedSets::new(recorded.ffn() as u32);
    let (hidden, neurons) = (recorded.hidden(), recorded.ffn());
    let mut inputs = Vec::new();
    let mut left = tokens_max;
    for part in parts {
        let mut start = part.start;
        while start < part.end && left > 0 {
            let tokens = (part.end - start).min(BLOCK).min(left);
            inputs.resize(tokens * hidden, f16::ZERO);
            recorded.read_inputs(start..start + tokens, &mut inputs)?;
            // A predictor decides about one token at a time, as it does in decoding.
            let chosen: Vec<Vec<Vec<T>>> = inputs
                .par_chunks(tokens.div_ceil(rayon::current_num_threads()).max(1) * hidden)
                .map(|inputs| -> Result<_, WantedError> {
                    let threads = Threads::new(NonZeroUsize::MIN).map_err(WantedError::Thread)?;
                    let mut predictor = tensors.predictor(prefix, hidden, neurons)?;
                    let (mut input, mut scores) = (vec![0.0; hidden], vec![0.0; neurons]);
                    let choose = |row: &[f16]| {
                        row.convert_to_f32_slice(&mut input);
                        predictor.scores(&threads, &input, &mut scores);
                        scores.iter().enumerate().filter(|(_, s)| **s > 0.0).map(|(n, _)| T::new(n as u32)).collect()
                    };
                    Ok(inputs.chunks_exact(hidden).map(choose).collect())
                })
                .collect::<Result<_, _>>()?;
            chosen.into_iter().flatten().for_each(|token| sets.push(token));
            start += tokens;
            left -= tokens;
        }
    }
    Ok(sets)
}

/// What one layer's neurons do, for the bundle: how many are active and predicted, and what caches of several sizes miss.
///
/// Tokens to train on fill the caches, misses are counted on those held out, as are the neurons that the predictor chooses;
/// `position` is the place of each neuron in storage order.
pub fn measure_reuse(
    recorded: &mut LayerRecording,
    split: &Split,
    predictor: (&Path, usize),
    position: &[Position],
    records_per_group: u32,
) -> Result<LayerSparsity, WantedError> {
    let (parts, warm_up) = behind_a_warm_up(split, WARM_UP);
    let wanted = wanted_sets(recorded, &parts, warm_up + COUNTED, Some(predictor))?;
    let counted = wanted.tokens().saturating_sub(warm_up).max(1);
    let needed: usize = wanted.iter().skip(warm_up).map(<[NeuronId]>::len).sum();
    let predicted = needed as f64 / (counted as f64 * f64::from(wanted.layer_size()));
    let missed = missed_share(recorded, parts.iter().cloned().flatten().skip(warm_up), wanted.iter().skip(warm_up));
    let groups = wanted.stored(position, records_per_group);
    drop(wanted);
    let half_life = best_half_life(&groups, warm_up);
    let (active, predicted) = (recorded.active_fraction() as f32, Some(predicted as f32));
    Ok(LayerSparsity { active, predicted, missed, half_life, reuse: reuse_curve(&groups, warm_up, half_life) })
}

/// The share of the neurons that are active at these tokens and not among those chosen; `None` where none is active.
fn missed_share<'a>(
    recorded: &LayerRecording,
    tokens: impl Iterator<Item = usize>,
    chosen: impl Iterator<Item = &'a [NeuronId]>,
) -> Option<f32> {
    let (mut active, mut missed) = (0u64, 0u64);
    for (token, chosen) in tokens.zip(chosen) {
        for neuron in recorded.active(token) {
            active += 1;
            missed += u64::from(chosen.binary_search(&NeuronId(neuron as u32)).is_err());
        }
    }
    (active > 0).then(|| (missed as f64 / active as f64) as f32)
}

/// What caches of several sizes miss of these groups, behind the tokens that fill them.
pub fn reuse_curve(groups: &WantedSets<GroupId>, warm_up: usize, half_life: Option<u32>) -> Vec<ReusePoint> {
    let policy = lfu(half_life);
    let sizes = SIZES.map(|size| (u64::from(groups.layer_size()) * u64::from(size) / 1000) as u32);
    let mut reuse: Vec<ReusePoint> = sizes
        .into_par_iter()
        .map(|slots| {
            let limits = PlanLimits::adjacent_only(1);
            let counts = replay(groups, &ReplayOptions { policy, slots, limits, warm_up });
            let mean = |count: u64| count as f32 / counts.tokens.max(1) as f32;
            ReusePoint { slots, missed: mean(counts.missed), runs: mean(counts.runs) }
        })
        .collect();
    // A layer of few groups has fewer sizes.
    reuse.dedup_by_key(|point| point.slots);
    reuse
}

/// The policy that a bundle notes for a layer of this demand.
pub fn best_policy(groups: &WantedSets<GroupId>, warm_up: usize) -> PolicyKind {
    lfu(best_half_life(groups, warm_up))
}

fn lfu(half_life: Option<u32>) -> PolicyKind {
    half_life.map_or(PolicyKind::DEFAULT, |half_life| PolicyKind::Lfu { half_life })
}

/// The half-life that misses least over caches of several sizes; none where the usual one is hardly worse.
fn best_half_life(groups: &WantedSets<GroupId>, warm_up: usize) -> Option<u32> {
    let missed = |policy: PolicyKind| -> f64 {
        let share = |size: u32| {
            let slots = (u64::from(groups.layer_size()) * u64::from(size) / 1000) as u32;
            let limits = PlanLimits::adjacent_only(1);
            let counts = replay(groups, &ReplayOptions { policy, slots, limits, warm_up });
            counts.missed as f64 / counts.wanted.max(1) as f64
        };
        JUDGED_SIZES.map(share).iter().sum()
    };
    let with = |half_life| (missed(PolicyKind::Lfu { half_life }), half_life);
    let tried: Vec<(f64, u32)> = HALF_LIVES.into_par_iter().map(with).collect();
    let (least, best) = tried.into_iter().min_by(|a, b| a.0.total_cmp(&b.0))?;
    (least < (1.0 - GAIN_LEAST) * missed(PolicyKind::DEFAULT)).then_some(best)
}

/// The tokens held out, after the last of those to train on, at most this many, which fill a cache; and the number of these.
pub fn behind_a_warm_up(split: &Split, tokens_max: usize) -> (Vec<Range<usize>>, usize) {
    let before = Split::tokens(&split.training);
    let last = skipped(&split.training, before.saturating_sub(tokens_max));
    (last.into_iter().chain(split.held_out.iter().cloned()).collect(), before.min(tokens_max))
}

/// What is left of `parts` behind the first `tokens`.
fn skipped(parts: &[Range<usize>], mut tokens: usize) -> Vec<Range<usize>> {
    let mut left = Vec::new();
    for part in parts {
        let skip = tokens.min(part.len());
        tokens -= skip;
        if skip < part.len() {
            left.push(part.start + skip..part.end);
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_chosen_is_not_missed() {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/recording-tiny-opt");
        let layer = flashlm_formats::recording::Recording::open(&dir).unwrap().layer(0).unwrap();
        let active = |token: usize| layer.active(token).map(|n| NeuronId(n as u32)).collect::<Vec<_>>();
        // All of a token, none of another, and of a third every second.
        let half: Vec<NeuronId> = active(2).into_iter().step_by(2).collect();
        let chosen: [&[NeuronId]; 3] = [&active(0), &[], &half];
        let all = [0, 1, 2].map(|token| active(token).len());
        let expected = (all[1] + all[2] - half.len()) as f32 / all.iter().sum::<usize>() as f32;
        assert_eq!(missed_share(&layer, 0..3, chosen.into_iter()), Some(expected));
        assert!((0.1..0.9).contains(&expected), "{expected}");
        assert_eq!(missed_share(&layer, 0..0, std::iter::empty()), None);
    }

    #[test]
    fn the_last_tokens_stay() {
        assert_eq!(skipped(&[0..3, 10..14, 20..21], 4), [11..14, 20..21]);
        assert_eq!(skipped(&[0..3, 10..14], 0), [0..3, 10..14]);
        assert_eq!(skipped(std::slice::from_ref(&(0..3)), 9), [] as [Range<usize>; 0]);
    }
}
