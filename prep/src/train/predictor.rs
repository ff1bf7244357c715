use flashlm_formats::bundle::PredictorDType;
use flashlm_kernels::{View, product};
use half::f16;
use linfa::dataset::Records;
use linfa::traits::PredictInplace;
use ndarray::{Array1, Array2, Axis};
use rayon::prelude::*;

use super::activity::Inputs;
use super::params::LowRankPredictorParams;
use super::scores::{NeuronScores, predict};

/// A fitted predictor: `logits = decoder (encoder x) + bias`, predicted where a logit is positive.
///
/// With `relu`, `decoder relu(encoder x) + bias`.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRankPredictor {
    /// `[rank, hidden]`.
    pub encoder: Array2<f32>,
    /// `[ffn, rank]`.
    pub decoder: Array2<f32>,
    /// `[ffn]`.
    pub bias: Array1<f32>,
    /// Whether negative features count as zero: so in predictors that others trained.
    pub relu: bool,
}

/// Tokens whose logits are formed at once.
const BLOCK: usize = 256;
/// Neurons of a piece of a product.
const NEURONS: usize = 512;

impl LowRankPredictor {
    /// Parameters for a predictor of the given rank, to be checked and fitted.
    pub fn params(rank: usize) -> LowRankPredictorParams {
        LowRankPredictorParams::new(rank)
    }

    /// Rows of the encoder.
    pub fn rank(&self) -> usize {
        self.encoder.nrows()
    }

    /// The same for these neurons alone.
    pub(super) fn with_rows(self, rows: &[u32]) -> Self {
        let rows: Vec<usize> = rows.iter().map(|&row| row as usize).collect();
        LowRankPredictor {
            decoder: self.decoder.select(Axis(0), &rows),
            bias: self.bias.select(Axis(0), &rows),
            ..self
        }
    }

    /// The predictor as it is after being stored as `dtype` and read again.
    pub fn rounded(&self, dtype: PredictorDType) -> Self {
        let round = |matrix: &Array2<f32>| match dtype {
            PredictorDType::F16 => matrix.mapv(|v| f16::from_f32(v).to_f32()),
            _ => {
                let (bytes, scales) = quantise_rows(matrix);
                let width = matrix.ncols();
                Array2::from_shape_fn(matrix.dim(), |(i, j)| bytes[i * width + j] as f32 * scales[i])
            }
        };
        LowRankPredictor { encoder: round(&self.encoder), decoder: round(&self.decoder), ..self.clone() }
    }

    /// Gives the decoder's columns equal lengths and hands the factors to the encoder's rows, which have scales of their
    /// own: so one scale for a decoder row wastes no bits. Changes no logit but for rounding.
    pub(crate) fn balance_components(&mut self) {
        for (mut row, mut column) in self.encoder.rows_mut().into_iter().zip(self.decoder.columns_mut()) {
            let square: f64 = column.iter().map(|&v| v as f64 * v as f64).sum();
            let length = (square / column.len() as f64).sqrt() as f32;
            if length > 0.0 {
                column.mapv_inplace(|v| v / length);
                row.mapv_inplace(|v| v * length);
            }
        }
    }

    pub(crate) fn is_finite(&self) -> bool {
        let finite = |mut values: ndarray::iter::Iter<'_, f32, ndarray::Ix2>| values.all(|v| v.is_finite());
        finite(self.encoder.iter()) && finite(self.decoder.iter()) && self.bias.iter().all(|v| v.is_finite())
    }
}

impl NeuronScores for LowRankPredictor {
    fn neurons(&self) -> usize {
        self.bias.len()
    }

    fn scores(&self, inputs: &Inputs, tokens: &[u32], take: &mut dyn FnMut(&[u32], &[f32])) {
        let (rank, ffn, hidden) = (self.rank(), self.neurons(), self.encoder.ncols());
        let encoder = self.encoder.as_slice().expect("standard layout");
        let decoder = self.decoder.as_slice().expect("standard layout");
        let bias = self.bias.as_slice().expect("standard layout");
        let (mut rows, mut features, mut logits) = (Vec::new(), Vec::new(), Vec::new());
        for block in tokens.chunks(BLOCK) {
            let count = block.len();
            inputs.gather(block, &mut rows);
            features.resize(count * rank, 0.0);
            let x = View::rows(&rows, count, hidden, hidden);
            product(&mut features, rank, false, x, View::rows(encoder, rank, hidden, hidden).t());
            if self.relu {
                features.iter_mut().for_each(|h| *h = h.max(0.0));
            }
            let pieces: Vec<Vec<f32>> = decoder
                .par_chunks(NEURONS * rank)
                .zip(bias.par_chunks(NEURONS))
                .map(|(weights, bias)| {
                    let width = bias.len();
                    let mut piece = vec![0.0; count * width];
                    let h = View::rows(&features, count, rank, rank);
                    product(&mut piece, width, false, h, View::rows(weights, width, rank, rank).t());
                    for row in piece.chunks_exact_mut(width) {
                        row.iter_mut().zip(bias).for_each(|(z, b)| *z += b);
                    }
                    piece
                })
                .collect();
            logits.resize(count * ffn, 0.0);
            let mut first = 0;
            for piece in &pieces {
                let width = piece.len() / count;
                for (to, from) in logits.chunks_exact_mut(ffn).zip(piece.chunks_exact(width)) {
                    to[first..first + width].copy_from_slice(from);
                }
                first += width;
            }
            take(block, &logits);
        }
    }
}

impl PredictInplace<Inputs, Array2<bool>> for LowRankPredictor {
    fn predict_inplace(&self, inputs: &Inputs, predicted: &mut Array2<bool>) {
        predict(self, inputs, predicted);
    }

    fn default_target(&self, inputs: &Inputs) -> Array2<bool> {
        Array2::from_elem((inputs.nsamples(), self.neurons()), false)
    }
}

/// Rows as bytes with one scale each: `value = byte * scale`, bytes from -127 to 127.
pub(crate) fn quantise_rows(matrix: &Array2<f32>) -> (Vec<i8>, Vec<f32>) {
    let mut scales = Vec::with_capacity(matrix.nrows());
    let mut bytes = Vec::with_capacity(matrix.len());
    for row in matrix.rows() {
        let largest = row.iter().fold(0f32, |m, v| m.max(v.abs()));
        let scale = if largest > 0.0 { largest / 127.0 } else { 1.0 };
        bytes.extend(row.iter().map(|v| (v / scale).round_ties_even().clamp(-127.0, 127.0) as i8));
        scales.push(scale);
    }
    (bytes, scales)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn balancing_changes_no_logit() {
        let mut predictor = LowRankPredictor {
            encoder: Array2::from_shape_fn((2, 3), |(i, j)| (1 + i * 3 + j) as f32),
            decoder: Array2::from_shape_fn((4, 2), |(i, j)| if j == 0 { 100.0 } else { 0.01 * (i as f32 + 1.0) }),
            bias: Array1::zeros(4),
            relu: false,
        };
        let before = predictor.decoder.dot(&predictor.encoder);
        predictor.balance_components();
        let after = predictor.decoder.dot(&predictor.encoder);
        for (a, b) in before.iter().zip(&after) {
            assert!((a - b).abs() < 1e-3 * a.abs(), "{a} {b}");
        }
        let lengths = predictor.decoder.mapv(|v| v * v).sum_axis(ndarray::Axis(0));
        assert!((lengths[0] - 4.0).abs() < 1e-4 && (lengths[1] - 4.0).abs() < 1e-4, "{lengths}");
    }

    #[test]
    fn bytes_are_within_half_a_step() {
        let matrix = Array2::from_shape_fn((3, 5), |(i, j)| (i as f32 - 1.0) * (j as f32 * 0.3 - 0.7));
        let (bytes, scales) = quantise_rows(&matrix);
        for ((i, j), v) in matrix.indexed_iter() {
            assert!((bytes[i * 5 + j] as f32 * scales[i] - v).abs() <= 0.5001 * scales[i]);
        }
        assert_eq!(scales[1], 1.0);
    }
}
