//! The figures of an evaluation, as docs define them: rates pooled over tokens for each layer, perplexity, divergence.

use flashlm::error::RuntimeError;
use flashlm::neurons::hook::{Activations, FfnHook};
use flashlm::sampler::greedy;
use flashlm_formats::ids::Position;
use serde::Serialize;

/// What a predictor does in one layer, pooled over tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LayerErrors {
    /// Missed neurons among active ones.
    pub false_negative_rate: f64,
    /// False alarms among inactive ones; none where nothing chooses and all neurons are computed.
    pub false_positive_rate: Option<f64>,
    /// Active neurons among all: above the layer's threshold, if it has one.
    pub active_fraction: f64,
    /// Predicted neurons among all.
    pub predicted_fraction: f64,
    /// Share of the sum of `|activation| * |down column|` that is kept.
    pub energy_recall: f64,
}

/// Sums over scored positions.
#[derive(Clone, Copy, Debug, Default)]
pub struct Comparison {
    positions: usize,
    nll_dense: f64,
    nll_bundle: f64,
    kl: f64,
    agreed: usize,
}

/// Perplexity of both models.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Perplexity {
    /// The checkpoint's.
    pub dense: f64,
    /// The bundle's.
    pub bundle: f64,
}

/// The result of an evaluation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// Perplexity of both.
    pub perplexity: Perplexity,
    /// Share of positions at which both find the same token likeliest.
    pub top1_agreement: f64,
    /// Mean divergence of the bundle's distribution from the checkpoint's, in nats.
    pub kl_mean: f64,
    /// Scored positions.
    pub positions: usize,
    /// Bytes of all predictors.
    pub predictor_bytes: u64,
    /// Bytes of all FFN weights.
    pub ffn_bytes: u64,
    /// By layer.
    pub layers: Vec<LayerErrors>,
}

impl Evaluation {
    pub(super) fn new(sums: Comparison, layers: Vec<LayerErrors>, predictor_bytes: u64, ffn_bytes: u64) -> Self {
        let n = sums.positions.max(1) as f64;
        Self {
            perplexity: Perplexity { dense: (sums.nll_dense / n).exp(), bundle: (sums.nll_bundle / n).exp() },
            top1_agreement: sums.agreed as f64 / n,
            kl_mean: sums.kl / n,
            positions: sums.positions,
            predictor_bytes,
            ffn_bytes,
            layers,
        }
    }

    /// Plain mean of a rate over layers.
    pub fn mean(&self, rate: impl Fn(&LayerErrors) -> f64) -> f64 {
        self.layers.iter().map(rate).sum::<f64>() / self.layers.len().max(1) as f64
    }

    /// Likewise of one that not every evaluation has.
    pub fn mean_of_some(&self, rate: impl Fn(&LayerErrors) -> Option<f64>) -> Option<f64> {
        let rates = self.layers.iter().map(rate).collect::<Option<Vec<_>>>()?;
        Some(rates.iter().sum::<f64>() / rates.len().max(1) as f64)
    }
}

/// Adds one position, whose next token is `next`.
pub(super) fn compare(sums: &mut Comparison, dense: &[f32], bundle: &[f32], next: u32) {
    let (log_dense, log_bundle) = (log_sum_exp(dense), log_sum_exp(bundle));
    sums.positions += 1;
    sums.nll_dense += log_dense - f64::from(dense[next as usize]);
    sums.nll_bundle += log_bundle - f64::from(bundle[next as usize]);
    sums.agreed += usize::from(greedy(dense) == greedy(bundle));
    for (&d, &b) in dense.iter().zip(bundle) {
        let (d, b) = (f64::from(d) - log_dense, f64::from(b) - log_bundle);
        sums.kl += d.exp() * (d - b);
    }
}

/// The logarithm of the sum of exponentials.
pub(crate) fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    f64::from(max) + logits.iter().map(|l| f64::from(l - max).exp()).sum::<f64>().ln()
}

/// Counts what a layer's predictor does.
pub(super) struct LayerObserver {
    down_norms: Vec<f32>,
    /// Magnitude above which a neuron is active.
    threshold: f32,
    /// The active ones are what is computed.
    only_active: bool,
    /// Something chose which neurons are computed.
    chosen: bool,
    tokens: usize,
    active: u64,
    predicted: u64,
    hits: u64,
    energy: f64,
    energy_kept: f64,
}

impl LayerObserver {
    /// `down_norms` in storage order; `only_active`: nothing chooses neurons but the threshold.
    pub(super) fn new(down_norms: Vec<f32>, threshold: f32, only_active: bool) -> Self {
        Self {
            down_norms,
            threshold,
            only_active,
            chosen: only_active,
            tokens: 0,
            active: 0,
            predicted: 0,
            hits: 0,
            energy: 0.0,
            energy_kept: 0.0,
        }
    }

    pub(super) fn errors(&self) -> LayerErrors {
        let all = (self.tokens * self.down_norms.len()) as f64;
        let ratio = |part: u64, of: f64| if of > 0.0 { part as f64 / of } else { 0.0 };
        LayerErrors {
            false_negative_rate: ratio(self.active - self.hits, self.active as f64),
            false_positive_rate: self.chosen.then(|| ratio(self.predicted - self.hits, all - self.active as f64)),
            active_fraction: ratio(self.active, all),
            predicted_fraction: ratio(self.predicted, all),
            energy_recall: if self.energy > 0.0 { self.energy_kept / self.energy } else { 1.0 },
        }
    }
}

impl FfnHook for LayerObserver {
    fn input(&mut self, _layer: usize, tokens: usize, _input: &[f32]) -> Result<(), RuntimeError> {
        self.tokens += tokens;
        Ok(())
    }

    fn activations(&mut self, piece: &mut Activations<'_>) -> Result<(), RuntimeError> {
        self.chosen |= piece.selection.is_some();
        for (token, row) in piece.values.chunks_exact(piece.count).enumerate() {
            for (neuron, &value) in (piece.first..).zip(row) {
                let active = value.abs() > self.threshold;
                let chosen = piece.selection.is_none_or(|s| s.contains(token, Position(neuron as u32)));
                let predicted = chosen && (active || !self.only_active);
                self.active += u64::from(active);
                self.predicted += u64::from(predicted);
                self.hits += u64::from(active && predicted);
                let energy = f64::from(value.abs() * self.down_norms[neuron]);
                self.energy += energy;
                self.energy_kept += if predicted { energy } else { 0.0 };
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_logits_agree_without_divergence() {
        let mut sums = Comparison::default();
        compare(&mut sums, &[0.0, 1.0, 2.0], &[0.0, 1.0, 2.0], 2);
        let evaluation = Evaluation::new(sums, vec![], 0, 0);
        assert_eq!(evaluation.top1_agreement, 1.0);
        assert!(evaluation.kl_mean.abs() < 1e-12);
        let expected = (1.0 + (-1f64).exp() + (-2f64).exp()).ln().exp();
        assert!((evaluation.perplexity.dense - expected).abs() < 1e-9);
    }

    #[test]
    fn rates_are_pooled_over_tokens() {
        use flashlm::neurons::selection::Selection;
        let mut observer = LayerObserver::new(vec![1.0, 2.0, 1.0, 1.0], 0.0, false);
        let mut selection = Selection::default();
        selection.reset(1, 4);
        selection.select_positive(0, &[1.0, -1.0, 1.0, -1.0]);
        observer.input(0, 1, &[]).unwrap();
        let see = |observer: &mut LayerObserver, selection| {
            let mut values = [3.0, 1.0, 0.0, 0.0];
            let mut piece = Activations { layer: 0, first: 0, count: 4, values: &mut values, selection };
            observer.activations(&mut piece).unwrap();
        };
        see(&mut observer, Some(&selection));
        let errors = observer.errors();
        assert_eq!((errors.false_negative_rate, errors.false_positive_rate), (0.5, Some(0.5)));
        assert_eq!((errors.active_fraction, errors.predicted_fraction), (0.5, 0.5));
        assert!((errors.energy_recall - 0.6).abs() < 1e-9);

        // With all of them computed nothing is a false alarm.
        let mut observer = LayerObserver::new(vec![1.0, 2.0, 1.0, 1.0], 0.0, false);
        observer.input(0, 1, &[]).unwrap();
        see(&mut observer, None);
        let errors = observer.errors();
        assert_eq!(
            (errors.false_negative_rate, errors.false_positive_rate, errors.predicted_fraction),
            (0.0, None, 1.0)
        );

        // Above a threshold fewer are active, and all energy counts.
        let mut observer = LayerObserver::new(vec![1.0, 2.0, 1.0, 1.0], 1.5, true);
        observer.input(0, 1, &[]).unwrap();
        see(&mut observer, None);
        let errors = observer.errors();
        assert_eq!((errors.active_fraction, errors.predicted_fraction), (0.25, 0.25));
        assert!((errors.energy_recall - 0.6).abs() < 1e-9);
    }
}
