//! Mean and covariance of a layer's inputs.

use linfa::dataset::Records;

use super::activity::TrainingSet;
use crate::linear::{add_gram, mirror};

/// Inputs that are taken at once.
const BLOCK: usize = 512;

/// First and second moments of some inputs.
pub(crate) struct Moments {
    /// `[d]`.
    pub(crate) mean: Vec<f32>,
    /// `[d, d]`.
    pub(crate) covariance: Vec<f32>,
}

/// The moments of the inputs of some tokens.
pub(crate) fn moments(set: &TrainingSet, tokens: &[u32]) -> Moments {
    let d = set.nfeatures();
    let (mut block, mut mean) = (Vec::new(), vec![0f64; d]);
    for part in tokens.chunks(BLOCK) {
        set.records().gather(part, &mut block);
        for row in block.chunks_exact(d) {
            mean.iter_mut().zip(row).for_each(|(m, &x)| *m += x as f64);
        }
    }
    let mean: Vec<f32> = mean.iter().map(|&m| (m / tokens.len() as f64) as f32).collect();
    let mut covariance = vec![0.0; d * d];
    let scale = 1.0 / (tokens.len() as f32).sqrt();
    for part in tokens.chunks(BLOCK) {
        set.records().gather(part, &mut block);
        for row in block.chunks_exact_mut(d) {
            row.iter_mut().zip(&mean).for_each(|(x, m)| *x = (*x - m) * scale);
        }
        add_gram(&mut covariance, d, &block);
    }
    mirror(&mut covariance, d);
    Moments { mean, covariance }
}
