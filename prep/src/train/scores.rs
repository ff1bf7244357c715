//! What every kind of predictor can do: score neurons.

use ndarray::Array2;

use super::activity::{Inputs, TrainingSet};

/// Scores of a layer's neurons for its inputs; a neuron is predicted where its score is above zero.
pub trait NeuronScores {
    /// Neurons of the layer.
    fn neurons(&self) -> usize;

    /// Scores of some tokens, block after block: `take` gets the block's tokens and its `[tokens, neurons]` scores.
    fn scores(&self, inputs: &Inputs, tokens: &[u32], take: &mut dyn FnMut(&[u32], &[f32]));
}

/// Logits that come from the projection's products are given this standard deviation, which the step size is made for.
pub(super) const LOGIT_SPREAD: f32 = 4.0;
/// Tokens that it is measured on, at most.
pub(super) const SPREAD_TOKENS: usize = 4096;

/// Standard deviation of all logits of some tokens.
pub(super) fn spread(predictor: &dyn NeuronScores, set: &TrainingSet, tokens: &[u32]) -> f32 {
    let (mut count, mut sum, mut squares) = (0usize, 0f64, 0f64);
    predictor.scores(set.records(), tokens, &mut |_, logits| {
        count += logits.len();
        sum += logits.iter().map(|&z| z as f64).sum::<f64>();
        squares += logits.iter().map(|&z| z as f64 * z as f64).sum::<f64>();
    });
    let mean = sum / count as f64;
    (squares / count as f64 - mean * mean).max(1e-30).sqrt() as f32
}

/// Which neurons of the first tokens are predicted: what linfa's `Predict` asks of every kind.
pub(super) fn predict(predictor: &dyn NeuronScores, inputs: &Inputs, predicted: &mut Array2<bool>) {
    let tokens: Vec<u32> = (0..predicted.nrows() as u32).collect();
    let mut row = 0;
    predictor.scores(inputs, &tokens, &mut |block, scores| {
        for scores in scores.chunks_exact(scores.len() / block.len()) {
            predicted.row_mut(row).iter_mut().zip(scores).for_each(|(p, z)| *p = *z > 0.0);
            row += 1;
        }
    });
}
