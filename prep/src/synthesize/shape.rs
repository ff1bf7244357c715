//! What makes random weights fire as trained ones do: which neurons how often, and how well that can be foretold.
//!
//! The inputs of a feed-forward layer come out of a norm, so each coordinate of them is close to normal over tokens, times the
//! norm's gain. A few **latent** coordinates get a large gain and so nearly all of the variance: inputs of low effective rank,
//! whatever the residual stream holds. The rest is noise that no small predictor can follow; its share decides how much a
//! predictor must over-fetch. A neuron fires where its row times the input exceeds its **threshold**, a normal quantile chosen
//! for its rate. Rates follow a Beta law, most neurons rare and some hot. Rows of a group of neurons share a part of their
//! direction: they fire together.
//!
//! Knows nothing of files and tensors' names.

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

use super::SynthesizeOptions;
use super::normal::{above, square_above, threshold};

/// Truly active share of the first layer, of the middle one and of the last, as published for OPT-6.7B.
const ACTIVE: [f64; 3] = [0.0156, 0.0266, 0.0536];
/// What lies between them is above straight lines by this much at most, so that the mean over layers is 3.3 %, still rising.
const ACTIVE_BULGE: [f64; 2] = [0.0020, 0.0076];
/// Neurons that a predictor of 95 % recall fetches, for each active one.
const OVER_FETCH: f64 = 3.03;
/// Beta(c m, c (1 - m)) with mean m: (0.2, 1.8) where 10 % are predicted.
const CONCENTRATION: f64 = 2.0;
/// Share of the inputs' variance outside of the latent coordinates.
pub(super) const NOISE: f64 = 0.16;
/// Neurons of like rate that share a part of their direction, and the share.
const GROUP: usize = 24;
pub(super) const GROUP_SHARE: f64 = 0.6;
/// What each layer's feed-forward part adds to the variance of the residual stream.
const ADDED: f64 = 0.06;

/// The constant coordinate of models without biases: what the norm's bias puts there.
pub(super) const CONSTANT: f64 = 4.0;

/// The coordinates that all layers share.
pub(super) struct Shape {
    /// Coordinates with most of the variance, ascending.
    pub(super) latent: Vec<usize>,
    /// A coordinate that is the same for every token.
    pub(super) constant: usize,
    pub(super) latent_gain: f64,
    pub(super) rest_gain: f64,
}

impl Shape {
    pub(super) fn new(hidden: usize, seed: u64) -> Self {
        let count = (hidden / 16).clamp(1, 96);
        let mut all: Vec<usize> = (0..hidden).collect();
        shuffle(&mut all, &mut Xoshiro256PlusPlus::seed_from_u64(seed ^ 0x6c61_7465_6e74));
        let (constant, mut latent) = (all[count], all[..count].to_vec());
        latent.sort_unstable();
        let gain = |share: f64, of: usize| (share * hidden as f64 / of as f64).sqrt();
        Shape { latent_gain: gain(1.0 - NOISE, count), rest_gain: gain(NOISE, hidden - count - 1), latent, constant }
    }

    /// The norm's gain at each coordinate.
    pub(super) fn gains(&self, hidden: usize, constant: bool) -> Vec<f64> {
        let mut gains = vec![self.rest_gain; hidden];
        self.latent.iter().for_each(|&at| gains[at] = self.latent_gain);
        if constant {
            gains[self.constant] = 0.0;
        }
        gains
    }
}

/// One layer's neurons.
pub(super) struct LayerShape {
    /// Threshold of each neuron, in deviations of its row times the input.
    pub(super) thresholds: Vec<f32>,
    /// Group of each neuron.
    pub(super) groups: Vec<u32>,
    /// Deviation of the down projection's elements, in deviations of the residual stream.
    pub(super) down_deviation: f64,
}

impl LayerShape {
    /// The shape of layer `layer` of `layers`. Neurons `i` and `i + ffn / 2` have the same rate: their down vectors are each
    /// other's negative, so that what the layer adds has no part that is the same for all tokens.
    pub(super) fn new(ffn: usize, layer: usize, layers: usize, options: SynthesizeOptions) -> Self {
        let mut stream =
            Xoshiro256PlusPlus::seed_from_u64(options.seed ^ (layer as u64 + 1).wrapping_mul(0x0073_6861_7065));
        let half = ffn.div_ceil(2);
        // By rising rate; the neurons are shuffled, so that the checkpoint's order knows nothing of rates and groups.
        let chosen = thresholds(half, active_share(layer, layers));
        let mut ranks: Vec<usize> = (0..half).collect();
        shuffle(&mut ranks, &mut stream);
        let thresholds = (0..ffn).map(|neuron| chosen[ranks[neuron % half]] as f32).collect();
        // Neurons with opposite down vectors are in different groups, else they would cancel each other.
        let group = |neuron: usize| 2 * (ranks[neuron % half] / GROUP) + neuron / half;
        let groups = (0..ffn).map(|neuron| group(neuron) as u32).collect();
        let energy = 2.0 * chosen.iter().map(|&t| square_above(t)).sum::<f64>();
        LayerShape { thresholds, groups, down_deviation: (ADDED / energy.max(1e-6)).sqrt() }
    }
}

/// Deviation of the residual stream before layer `layer`, in deviations of the embeddings.
pub(super) fn stream_deviation(layer: usize) -> f64 {
    (1.0 + ADDED).powf(layer as f64 / 2.0)
}

/// Share of a layer's neurons that are to be active.
pub(super) fn active_share(layer: usize, layers: usize) -> f64 {
    let depth = if layers > 1 { layer as f64 / (layers - 1) as f64 } else { 0.5 };
    let (from, part) = if depth < 0.5 { (0, depth * 2.0) } else { (1, depth * 2.0 - 1.0) };
    let line = ACTIVE[from] + part * (ACTIVE[from + 1] - ACTIVE[from]);
    line + ACTIVE_BULGE[from] * (std::f64::consts::PI * part).sin().powi(2)
}

/// Thresholds of `count` neurons, of which a share `active` is active on average.
///
/// What a predictor sees of a neuron is its projection without the noise. It fetches the neuron where this is close enough to
/// the threshold, and how often that is follows the Beta law: so the thresholds are those of the law's rates, seen through the
/// noise and moved by what makes the mean right.
fn thresholds(count: usize, active: f64) -> Vec<f64> {
    let law = beta_quantiles(count, CONCENTRATION * active * OVER_FETCH, CONCENTRATION * (1.0 - active * OVER_FETCH));
    let seen: Vec<f64> = law.into_iter().map(|rate| (1.0 - NOISE).sqrt() * threshold(rate)).collect();
    let mean = |moved: f64| seen.iter().map(|t| above(t + moved)).sum::<f64>() / count as f64;
    let (mut low, mut high) = (-4.0, 4.0);
    for _ in 0..40 {
        let middle = (low + high) / 2.0;
        if mean(middle) > active { low = middle } else { high = middle }
    }
    seen.into_iter().map(|t| t + low).collect()
}

/// `count` equally likely values of a Beta distribution with `a` below 1. In `v = x^a` its density is the smooth
/// `(1 - v^(1/a))^(b - 1)`, which is summed here.
fn beta_quantiles(count: usize, a: f64, b: f64) -> Vec<f64> {
    const STEPS: usize = 1 << 15;
    let at = |step: f64| step / STEPS as f64;
    let density = |v: f64| (1.0 - v.powf(1.0 / a)).max(0.0).powf(b - 1.0);
    let mut sums = vec![0.0];
    for step in 0..STEPS {
        sums.push(sums[step] + density(at(step as f64 + 0.5)));
    }
    let (total, mut step) = (sums[STEPS], 0);
    (0..count)
        .map(|number| {
            let wanted = (number as f64 + 0.5) / count as f64 * total;
            while sums[step + 1] < wanted {
                step += 1;
            }
            let part = (wanted - sums[step]) / (sums[step + 1] - sums[step]).max(f64::MIN_POSITIVE);
            at(step as f64 + part).powf(1.0 / a)
        })
        .collect()
}

/// Fisher and Yates.
fn shuffle<T>(items: &mut [T], stream: &mut Xoshiro256PlusPlus) {
    for last in (1..items.len()).rev() {
        let other = (stream.next_u64() as u128 * (last as u128 + 1)) >> 64;
        items.swap(last, other as usize);
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;

    fn mean(values: &[f64]) -> f64 {
        values.iter().sum::<f64>() / values.len() as f64
    }

    #[test]
    fn rates_follow_the_law_that_five_tokens_unite_to_a_quarter() {
        let rates = beta_quantiles(16384, 0.2, 1.8);
        assert!((mean(&rates) - 0.1).abs() < 1e-3, "{}", mean(&rates));
        let united = mean(&rates.iter().map(|p| 1.0 - (1.0 - p).powi(5)).collect::<Vec<_>>());
        let added = mean(&rates.iter().map(|p| p * (1.0 - p).powi(4)).collect::<Vec<_>>());
        assert!((united - 0.26).abs() < 0.01 && (added - 0.026).abs() < 0.001, "{united} {added}");
    }

    #[test]
    fn layers_are_as_active_as_published() {
        let shares: Vec<f64> = (0..32).map(|layer| active_share(layer, 32)).collect();
        assert!((mean(&shares) - 0.033).abs() < 0.0005, "{}", mean(&shares));
        assert!(shares.is_sorted() && shares[0] == ACTIVE[0] && (shares[31] - ACTIVE[2]).abs() < 1e-12);
        let options = SynthesizeOptions { layers: None, seed: 3, threads: NonZeroUsize::MIN };
        for layer in [0, 16, 31] {
            let shape = LayerShape::new(4096, layer, 32, options);
            let active = mean(&shape.thresholds.iter().map(|t| above(f64::from(*t))).collect::<Vec<_>>());
            assert!((active / active_share(layer, 32) - 1.0).abs() < 1e-3, "layer {layer}: {active}");
        }
    }

    #[test]
    fn inputs_keep_their_size_and_lie_mostly_in_the_latent_coordinates() {
        let shape = Shape::new(2048, 1);
        let squares: Vec<f64> = shape.gains(2048, true).iter().map(|g| g * g).collect();
        assert!((mean(&squares) - 1.0).abs() < 1e-9);
        let latent: f64 = shape.latent.iter().map(|&at| squares[at]).sum();
        assert!((latent / squares.iter().sum::<f64>() - (1.0 - NOISE)).abs() < 1e-9);
        assert!(!shape.latent.contains(&shape.constant) && shape.latent.len() == 96);
    }
}
