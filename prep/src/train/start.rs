//! Where training starts: the encoder from principal components of the inputs, the decoder in closed form behind it.
//!
//! linfa-reduction's `Pca` is not used: it works on a centred f64 copy of the inputs (655 MB for a layer of OPT-6.7B) and
//! finds one component after the other, too slow for rank 1024 of 4096. The start needs no single components, only the
//! subspace that the leading ones span, with features of unit variance in it: that is a subspace iteration on the
//! covariance and two Cholesky factors, nearly all of it matrix products.

use flashlm_kernels::{View, product};
use rayon::prelude::*;

use super::activity::TrainingSet;
use super::linear::{PIECE, normalise_columns, orthonormalise, parallel_product};
use super::params::TrainError;
use super::random::Random;

const ITERATIONS: usize = 6;
/// Inputs read at once.
const BLOCK: usize = 512;
/// Tokens that the covariance is taken from, at most, for each dimension.
const TOKENS_PER_DIMENSION: usize = 4;

/// A linear predictor before training.
pub(crate) struct Start {
    /// Transposed encoder, `[hidden, rank]`.
    pub(crate) encoder_t: Vec<f32>,
    /// `[ffn, rank]`.
    pub(crate) decoder: Vec<f32>,
    /// `[ffn]`.
    pub(crate) bias: Vec<f32>,
}

/// Mean `[d]` and covariance `[d, d]` of (a sample of) the inputs.
fn covariance(set: &TrainingSet, tokens: &[u32], d: usize) -> (Vec<f32>, Vec<f32>) {
    let step = (tokens.len() / (TOKENS_PER_DIMENSION * d)).max(1);
    let sample: Vec<u32> = tokens.iter().copied().step_by(step).collect();
    let (mut block, mut mean) = (Vec::new(), vec![0f64; d]);
    for part in sample.chunks(BLOCK) {
        set.records().gather(part, &mut block);
        for row in block.chunks_exact(d) {
            mean.iter_mut().zip(row).for_each(|(m, &x)| *m += x as f64);
        }
    }
    let mean: Vec<f32> = mean.iter().map(|&m| (m / sample.len() as f64) as f32).collect();
    let mut cov = vec![0.0; d * d];
    for part in sample.chunks(BLOCK) {
        set.records().gather(part, &mut block);
        let scale = 1.0 / (sample.len() as f32).sqrt();
        for row in block.chunks_exact_mut(d) {
            row.iter_mut().zip(&mean).for_each(|(x, m)| *x = (*x - m) * scale);
        }
        cov.par_chunks_mut(PIECE * d).enumerate().for_each(|(i, y)| {
            let columns = View::rows(&block[i * PIECE..], part.len(), y.len() / d, d);
            product(y, d, true, columns.t(), View::rows(&block, part.len(), d, d));
        });
    }
    (mean, cov)
}

/// The start for `rank` on the given tokens.
pub(crate) fn start(set: &TrainingSet, tokens: &[u32], d: usize, rank: usize, seed: u64) -> Result<Start, TrainError> {
    let degenerate = TrainError::Degenerate { rank };
    let (mean, cov) = covariance(set, tokens, d);
    let mut random = Random::new(seed ^ 0x0073_7461_7274);
    let mut q: Vec<f32> = (0..d * rank).map(|_| random.signed()).collect();
    let mut c_q = vec![0.0; d * rank];
    for _ in 0..ITERATIONS {
        parallel_product(&mut c_q, rank, &cov, d, View::rows(&q, d, rank, rank));
        std::mem::swap(&mut q, &mut c_q);
        // Twice: the first pass is inexact where columns were nearly parallel.
        for _ in 0..2 {
            normalise_columns(&mut q, rank);
            let copy = q.clone();
            if orthonormalise(&mut q, &copy, rank).is_none() {
                return Err(degenerate);
            }
        }
    }
    // Features of unit variance: orthonormal in the covariance's inner product.
    parallel_product(&mut c_q, rank, &cov, d, View::rows(&q, d, rank, rank));
    if orthonormalise(&mut q, &c_q, rank).is_none() {
        return Err(degenerate);
    }
    let encoder_t = q;

    // Behind whitened features the slope of a neuron is the difference of its active tokens' mean feature to the whole mean.
    let ffn = set.targets().ffn();
    let (mut decoder, mut count) = (vec![0.0; ffn * rank], vec![0u32; ffn]);
    let (mut block, mut features) = (Vec::new(), Vec::new());
    for part in tokens.chunks(BLOCK) {
        set.records().gather(part, &mut block);
        for row in block.chunks_exact_mut(d) {
            row.iter_mut().zip(&mean).for_each(|(x, m)| *x -= m);
        }
        features.resize(part.len() * rank, 0.0);
        parallel_product(&mut features, rank, &block, d, View::rows(&encoder_t, d, rank, rank));
        let width = ffn.div_ceil(16).max(64);
        decoder.par_chunks_mut(width * rank).zip(count.par_chunks_mut(width)).enumerate().for_each(
            |(i, (w, count))| {
                let first = i * width;
                for (row, &token) in part.iter().enumerate() {
                    let feature = &features[row * rank..][..rank];
                    for &n in set.targets().neurons_of(token as usize, first, first + count.len()).0 {
                        let n = n as usize - first;
                        count[n] += 1;
                        w[n * rank..][..rank].iter_mut().zip(feature).for_each(|(w, f)| *w += f);
                    }
                }
            },
        );
    }
    let mut mean_feature = vec![0.0; rank];
    product(&mut mean_feature, rank, false, View::rows(&mean, 1, d, d), View::rows(&encoder_t, d, rank, rank));
    let total = tokens.len() as f32;
    let bias = decoder
        .chunks_exact_mut(rank)
        .zip(&count)
        .map(|(w, &count)| {
            let p = (count as f32 / total).clamp(1e-4, 1.0 - 1e-4);
            // Counts of rare neurons are shrunk: a few tokens say little about a direction.
            w.iter_mut().for_each(|w| *w /= (count as f32 + 4.0) * (1.0 - p));
            let offset: f32 = w.iter().zip(&mean_feature).map(|(w, f)| w * f).sum();
            (p / (1.0 - p)).ln() - offset
        })
        .collect();
    Ok(Start { encoder_t, decoder, bias })
}
