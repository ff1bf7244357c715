//! Steps of a fit: mini-batch Adam on a weighted logistic loss.
//!
//! A step's work is cut into pieces of fixed size (rows of the batch, neurons of the decoder, rows of the encoder) that
//! threads take in any order; sums over pieces are formed in the pieces' order. So the number of threads changes no bit.

use flashlm_kernels::{View, product};
use linfa::dataset::Records;
use ndarray::{Array1, Array2};
use rayon::prelude::*;

use super::activity::TrainingSet;
use super::params::LowRankPredictorValidParams;
use super::predictor::LowRankPredictor;
use super::unit::Unit;

/// Neurons, rows of the encoder and rows of the batch that one piece of work takes.
const NEURONS: usize = 512;
const ENCODER_ROWS: usize = 128;
const BATCH_ROWS: usize = 64;
/// Steps over which the step size rises; in a short training a quarter of all.
const WARM_UP: usize = 40;
/// What is left of the step size at the end.
const LAST_STEP_SIZE: f32 = 0.02;
const BETAS: [f32; 2] = [0.9, 0.99];

/// Of the step size at its height, what a step has after so many of all.
fn share_of_step_size(done: usize, steps: usize) -> f32 {
    let warm_up = WARM_UP.min(steps / 4).max(1);
    let warm = ((done + 1) as f32 / warm_up as f32).min(1.0);
    let way = done as f32 / steps as f32;
    let cosine = 0.5 * (1.0 + (std::f32::consts::PI * way).cos());
    warm * (LAST_STEP_SIZE + (1.0 - LAST_STEP_SIZE) * cosine)
}

/// A parameter array with Adam's moments.
struct Adam {
    value: Vec<f32>,
    first: Vec<f32>,
    second: Vec<f32>,
    gradient: Vec<f32>,
}

impl Adam {
    fn new(value: Vec<f32>) -> Self {
        let zeros = || vec![0.0; value.len()];
        Adam { first: zeros(), second: zeros(), gradient: zeros(), value }
    }

    /// `size` is the step size with the bias corrections of both moments in it, `eps` likewise.
    fn step(&mut self, size: f32, eps: f32) {
        let parts = self.value.iter_mut().zip(&self.gradient).zip(self.first.iter_mut().zip(self.second.iter_mut()));
        for ((value, &g), (first, second)) in parts {
            *first += (1.0 - BETAS[0]) * (g - *first);
            *second += (1.0 - BETAS[1]) * (g * g - *second);
            *value -= size * *first / (second.sqrt() + eps);
        }
    }
}

/// Some neurons of the decoder and what a step needs for them.
struct DecoderPiece {
    first: usize,
    weights: Adam,
    bias: Adam,
    logits: Vec<f32>,
    back: Vec<f32>,
}

/// A predictor that is being trained.
pub(super) struct Training {
    unit: Unit,
    rank: usize,
    hidden: usize,
    ffn: usize,
    encoder_t: Vec<Adam>,
    decoder: Vec<DecoderPiece>,
    /// Of an active pair, against an inactive one's.
    pub(super) active_weight: f32,
    energy_weight: f32,
    energy_mean: f32,
    learning_rate: f32,
    steps: usize,
    done: usize,
    inputs: Vec<f32>,
    features: Vec<f32>,
    back: Vec<f32>,
}

impl Training {
    pub(super) fn new(
        params: &LowRankPredictorValidParams,
        set: &TrainingSet,
        train: &[u32],
        unit: Unit,
        start: &LowRankPredictor,
    ) -> Self {
        let mut start = start.clone();
        unit.convert(&mut start);
        let (hidden, ffn, rank) = (set.nfeatures(), set.targets().ffn(), params.rank);
        let (active, energy) = set.targets().totals(train);
        let share = (active as f64 / (train.len() as f64 * ffn as f64)).clamp(1e-6, 0.5);
        let decoder = start.decoder.as_slice().expect("standard layout").chunks(NEURONS * rank);
        let encoder_t = start.encoder.t().as_standard_layout().into_owned().into_raw_vec_and_offset().0;
        let decoder = decoder
            .zip(start.bias.as_slice().expect("standard layout").chunks(NEURONS))
            .enumerate()
            .map(|(i, (weights, bias))| DecoderPiece {
                first: i * NEURONS,
                weights: Adam::new(weights.to_vec()),
                bias: Adam::new(bias.to_vec()),
                logits: Vec::new(),
                back: Vec::new(),
            })
            .collect();
        Training {
            unit,
            rank,
            hidden,
            ffn,
            encoder_t: encoder_t.chunks(ENCODER_ROWS * rank).map(|rows| Adam::new(rows.to_vec())).collect(),
            decoder,
            active_weight: (((1.0 - share) / share) as f32).powf(params.balance),
            energy_weight: params.energy_weight,
            energy_mean: (energy / active.max(1) as f64).max(1e-30) as f32,
            learning_rate: params.learning_rate,
            steps: params.epochs * train.len().div_ceil(params.batch),
            done: 0,
            inputs: Vec::new(),
            features: Vec::new(),
            back: Vec::new(),
        }
    }

    /// Steps by the gradient of some tokens.
    pub(super) fn step(&mut self, set: &TrainingSet, batch: &[u32]) {
        let (rank, hidden, count) = (self.rank, self.hidden, batch.len());
        let rate = self.learning_rate * share_of_step_size(self.done, self.steps);
        self.done += 1;
        let corrections = BETAS.map(|beta| 1.0 - beta.powi(self.done.min(10_000) as i32));
        let size = rate * corrections[1].sqrt() / corrections[0];
        let eps = 1e-8 * corrections[1].sqrt();

        set.records().gather(batch, &mut self.inputs);
        self.unit.apply(&mut self.inputs);
        self.features.clear();
        self.features.resize(count * rank, 0.0);
        let (inputs, encoder_t) = (&self.inputs, &self.encoder_t);
        self.features.par_chunks_mut(BATCH_ROWS * rank).enumerate().for_each(|(i, y)| {
            let rows = y.len() / rank;
            for (part, piece) in encoder_t.iter().enumerate() {
                let width = piece.value.len() / rank;
                let x = View::rows(&inputs[i * BATCH_ROWS * hidden + part * ENCODER_ROWS..], rows, width, hidden);
                product(y, rank, part > 0, x, View::rows(&piece.value, width, rank, rank));
            }
        });

        let features = &self.features;
        let (active_weight, energy_weight, energy_mean) = (self.active_weight, self.energy_weight, self.energy_mean);
        self.decoder.par_iter_mut().for_each(|piece| {
            let width = piece.bias.value.len();
            let h = View::rows(features, count, rank, rank);
            piece.logits.resize(count * width, 0.0);
            product(&mut piece.logits, width, false, h, View::rows(&piece.weights.value, width, rank, rank).t());
            let per_token = 1.0 / count as f32;
            piece.bias.gradient.fill(0.0);
            for (row, &token) in piece.logits.chunks_exact_mut(width).zip(batch) {
                for (z, b) in row.iter_mut().zip(&piece.bias.value) {
                    *z = sigmoid(*z + b) * per_token;
                }
                let (neurons, energies) = set.targets().neurons_of(token as usize, piece.first, piece.first + width);
                for (&n, &energy) in neurons.iter().zip(energies) {
                    let relative = (energy / energy_mean).min(4.0);
                    let weight = active_weight * (1.0 - energy_weight + energy_weight * relative);
                    let g = &mut row[n as usize - piece.first];
                    *g = weight * (*g - per_token);
                }
                piece.bias.gradient.iter_mut().zip(row.iter()).for_each(|(sum, g)| *sum += g);
            }
            let g = View::rows(&piece.logits, count, width, width);
            piece.back.resize(count * rank, 0.0);
            product(&mut piece.back, rank, false, g, View::rows(&piece.weights.value, width, rank, rank));
            product(&mut piece.weights.gradient, rank, false, g.t(), h);
            piece.weights.step(size, eps);
            piece.bias.step(size, eps);
        });

        self.back.clear();
        self.back.resize(count * rank, 0.0);
        for piece in &self.decoder {
            self.back.iter_mut().zip(&piece.back).for_each(|(sum, part)| *sum += part);
        }
        let (inputs, back) = (&self.inputs, &self.back);
        self.encoder_t.par_iter_mut().enumerate().for_each(|(i, piece)| {
            let width = piece.value.len() / rank;
            let x = View::rows(&inputs[i * ENCODER_ROWS..], count, width, hidden);
            product(&mut piece.gradient, rank, false, x.t(), View::rows(back, count, rank, rank));
            piece.step(size, eps);
        });
    }

    /// As it is now.
    pub(super) fn predictor(&self) -> LowRankPredictor {
        let encoder_t: Vec<f32> = self.encoder_t.iter().flat_map(|p| p.value.iter().copied()).collect();
        let encoder_t = Array2::from_shape_vec((self.hidden, self.rank), encoder_t).expect("all rows");
        let decoder: Vec<f32> = self.decoder.iter().flat_map(|p| p.weights.value.iter().copied()).collect();
        let bias: Vec<f32> = self.decoder.iter().flat_map(|p| p.bias.value.iter().copied()).collect();
        let mut predictor = LowRankPredictor {
            encoder: encoder_t.t().as_standard_layout().into_owned(),
            decoder: Array2::from_shape_vec((self.ffn, self.rank), decoder).expect("all neurons"),
            bias: Array1::from_vec(bias),
            relu: false,
        };
        self.unit.convert_back(&mut predictor);
        predictor
    }
}

/// `1 / (1 + exp(-z))` to 3e-5, from a polynomial for the power of two: no call, so that the loop around it is vectorised.
#[inline(always)]
fn sigmoid(z: f32) -> f32 {
    let t = z.clamp(-30.0, 30.0) * -std::f32::consts::LOG2_E;
    // Rounds to nearest: adding this pushes the fraction out of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    let shifted = t + ROUND;
    let f = t - (shifted - ROUND);
    let power = 1.0 + f * (std::f32::consts::LN_2 + f * (0.240_226_5 + f * (0.055_504_1 + f * 0.009_618_1)));
    // The integer stands in the lowest bits: all others leave with the shift, and no conversion is needed.
    let scale = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    1.0 / (1.0 + power * scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_trainings_reach_the_step_size_too() {
        for steps in [1, 3, 10, 40, 1000] {
            let largest = (0..steps).map(|done| share_of_step_size(done, steps)).fold(0.0, f32::max);
            assert!(largest > 0.85 && largest <= 1.0, "{steps}: {largest}");
        }
        assert_eq!(share_of_step_size(0, 1000), 1.0 / WARM_UP as f32);
    }

    #[test]
    fn sigmoid_is_close() {
        for i in -2000..=2000 {
            let z = i as f32 * 0.02;
            let exact = 1.0 / (1.0 + (-(z as f64).clamp(-30.0, 30.0)).exp());
            assert!((sigmoid(z) as f64 - exact).abs() < 3e-5, "{z}: {} for {exact}", sigmoid(z));
        }
    }
}
