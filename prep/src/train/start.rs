//! Where training starts: a linear predictor from the inputs' moments, with directions chosen in one of several ways.
//!
//! With the [`Projection`] that the activity comes from: its best low-rank approximation in the metric of the inputs, that is the
//! leading singular vectors of `D W L`, with `L` the Cholesky factor of the inputs' covariance and `D` nothing, or a weight
//! for each neuron from its firing rate and spread. Without: principal components of the inputs, with the decoder in closed
//! form after them.
//!
//! Everything comes from symmetric matrices `[hidden, hidden]`, whose eigenvectors serve every rank; linfa-reduction's `Pca`
//! works on a centred f64 copy of the inputs (1.3 GB for a layer of OPT-6.7B) and knows no metric.

use std::sync::Arc;

use flashlm_formats::predictors::StartKind;
use flashlm_kernels::{View, product};
use linfa::traits::{Fit, Transformer};
use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use super::activity::{Activity, Inputs, TrainingSet, thin};
use super::curve::{Curve, JUDGED_MISSES};
use super::moments::{Moments, moments};
use super::params::TrainError;
use super::predictor::LowRankPredictor;
use super::projection::Projection;
use super::quantised::QuantisedProjection;
use super::scores::{LOGIT_SPREAD, SPREAD_TOKENS, spread};
use super::unit::Unit;
use crate::linear::{add_gram, cholesky, eigen, mirror, parallel_product, solve_transposed};

/// Inputs, or rows of the projection, that are taken at once.
const BLOCK: usize = 512;
/// Added to the covariance's diagonal, of its mean: directions in which the inputs do not vary stay finite.
const RIDGE: f32 = 1e-6;
/// Keeps neurons that hardly fire, or hardly vary, from weighing nothing or everything.
const RATE_LEAST: f32 = 1e-5;
const SPREAD_LEAST: f32 = 1e-3;

/// Finds directions of the inputs to start from, on some tokens of a dataset: a linfa estimator.
#[derive(Clone)]
pub(crate) struct StartParams {
    /// Tokens to learn from.
    pub(crate) tokens: Vec<u32>,
    /// The weights that the activity comes from, where they are known.
    pub(crate) projection: Option<Arc<Projection>>,
}

/// All directions of the inputs, the most telling first, in one order for each way to choose them.
pub(crate) struct Starts {
    params: StartParams,
    moments: Moments,
    bases: Vec<Basis>,
}

/// Directions in falling order, as columns of `[hidden, hidden]` matrices.
struct Basis {
    kind: StartKind,
    /// A feature is an input's product with a column.
    encoder: Vec<f32>,
    /// What the projection is multiplied by for the decoder; without, the decoder is in closed form.
    back: Option<Vec<f32>>,
}

/// A predictor to train on from.
pub(crate) struct Start {
    pub(crate) kind: StartKind,
    /// Its false positives, at the misses that fits are judged at.
    pub(crate) cost: f64,
    pub(crate) predictor: LowRankPredictor,
}

/// The leading directions: from inputs to features of unit variance. A linfa transformer.
pub(crate) struct Directions<'a> {
    mean: &'a [f32],
    /// `[hidden, rank]`.
    encoder_t: Array2<f32>,
}

impl Fit<Inputs, Activity, TrainError> for StartParams {
    type Object = Starts;

    fn fit(&self, set: &TrainingSet) -> Result<Starts, TrainError> {
        let moments = moments(set, &self.tokens);
        let d = moments.mean.len();
        let mut bases = vec![principal(&moments.covariance, d)?];
        let varies = (0..d).any(|i| moments.covariance[i * d + i] != 0.0);
        if let Some(projection) = self.projection.as_ref().filter(|_| varies) {
            bases.extend(in_the_inputs_metric(projection, &moments.covariance, &rates(set, &self.tokens))?);
        }
        Ok(Starts { params: self.clone(), moments, bases })
    }
}

impl Starts {
    /// What fits measure the inputs in.
    pub(super) fn unit(&self) -> Unit {
        Unit::of(&self.moments)
    }

    /// Of the starts for `rank` the one with the least false positives among `judged` tokens.
    pub(crate) fn best(&self, set: &TrainingSet, rank: usize, judged: &[u32]) -> Start {
        let starts = self.bases.iter().map(|basis| {
            let start = self.start(basis, set, rank);
            let curve = Curve::measure(&start, set, judged);
            Start { kind: basis.kind, cost: curve.at_misses(JUDGED_MISSES).false_positive_rate, predictor: start }
        });
        starts.min_by(|a, b| a.cost.total_cmp(&b.cost)).expect("at least the principal components")
    }

    /// The other kind of predictor, from the same moments.
    pub(crate) fn quantised(&self, set: &TrainingSet) -> Result<Option<QuantisedProjection>, TrainError> {
        let quantised = |p: &Arc<Projection>| QuantisedProjection::new(p, &self.moments, set, &self.params.tokens);
        self.params.projection.as_ref().map(quantised).transpose()
    }

    fn start(&self, basis: &Basis, set: &TrainingSet, rank: usize) -> LowRankPredictor {
        let d = self.moments.mean.len();
        let directions = Directions { mean: &self.moments.mean, encoder_t: leading(&basis.encoder, d, rank) };
        match (&basis.back, &self.params.projection) {
            (Some(back), Some(projection)) => {
                let mut start = directions.approximate(projection, &leading(back, d, rank));
                let mut sample = self.params.tokens.clone();
                thin(&mut sample, SPREAD_TOKENS);
                let scale = LOGIT_SPREAD / spread(&start, set, &sample);
                start.decoder *= scale;
                start.bias *= scale;
                start
            }
            _ => directions.separate(set, &self.params.tokens),
        }
    }
}

/// The first columns of a matrix `[d, d]`.
fn leading(columns: &[f32], d: usize, count: usize) -> Array2<f32> {
    ArrayView2::from_shape((d, d), columns).expect("a square").slice(ndarray::s![.., ..count]).to_owned()
}

/// How often each neuron fires among `tokens`.
fn rates(set: &TrainingSet, tokens: &[u32]) -> Vec<f32> {
    let mut counts = vec![0u32; set.targets().ffn()];
    for &token in tokens {
        set.targets().of(token as usize).0.iter().for_each(|&n| counts[n as usize] += 1);
    }
    counts.iter().map(|&count| count as f32 / tokens.len() as f32).collect()
}

/// Principal components, scaled to features of unit variance.
fn principal(covariance: &[f32], d: usize) -> Result<Basis, TrainError> {
    let degenerate = TrainError::Degenerate { directions: d };
    let (values, mut encoder) = eigen(covariance, d).ok_or(degenerate)?;
    let least = values[0] * RIDGE;
    if !least.is_finite() {
        return Err(TrainError::Degenerate { directions: d });
    }
    if least <= 0.0 {
        // Inputs that are always the same have no directions, and need none: biases alone say what fires.
        encoder.fill(0.0);
        return Ok(Basis { kind: StartKind::Principal, encoder, back: None });
    }
    for row in encoder.chunks_exact_mut(d) {
        row.iter_mut().zip(&values).for_each(|(v, &variance)| *v /= variance.max(least).sqrt());
    }
    Ok(Basis { kind: StartKind::Principal, encoder, back: None })
}

/// Singular vectors of the projection in the metric of the inputs: plain, and with weights for the neurons.
fn in_the_inputs_metric(projection: &Projection, covariance: &[f32], rates: &[f32]) -> Result<[Basis; 2], TrainError> {
    let d = projection.hidden();
    let degenerate = || TrainError::Degenerate { directions: d };
    let mean = (0..d).map(|i| covariance[i * d + i]).sum::<f32>() / d as f32;
    // More where that is less than single precision rounds off: of few tokens, or where a few inputs are far larger than others.
    let factor = [1.0, 10.0, 100.0, 1000.0, 10_000.0].iter().find_map(|times| {
        let mut ridged = covariance.to_vec();
        (0..d).for_each(|i| ridged[i * d + i] += times * RIDGE * mean);
        cholesky(ridged, d)
    });
    let factor = factor.ok_or_else(degenerate)?;

    // The singular vectors of `D W L` are the eigenvectors of `L^T W^T D^2 W L`, which is summed over blocks of rows.
    let mut grams = [vec![0.0; d * d], vec![0.0; d * d]];
    let (mut rows, mut products) = (Vec::new(), Vec::new());
    for first in (0..rates.len()).step_by(BLOCK) {
        let neurons = first..(first + BLOCK).min(rates.len());
        projection.rows(neurons.clone(), &mut rows);
        products.resize(rows.len(), 0.0);
        parallel_product(&mut products, d, &rows, d, View::rows(&factor, d, d, d));
        add_gram(&mut grams[0], d, &products);
        for (row, &rate) in products.chunks_exact_mut(d).zip(&rates[neurons]) {
            let spread = row.iter().map(|v| v * v).sum::<f32>().sqrt();
            let weight = (rate + RATE_LEAST).sqrt() / (spread + SPREAD_LEAST);
            row.iter_mut().for_each(|v| *v *= weight);
        }
        add_gram(&mut grams[1], d, &products);
    }
    let basis = |kind, gram: &mut Vec<f32>| -> Result<Basis, TrainError> {
        mirror(gram, d);
        let (_, mut encoder) = eigen(gram, d).ok_or_else(degenerate)?;
        let mut back = std::mem::take(gram);
        parallel_product(&mut back, d, &factor, d, View::rows(&encoder, d, d, d));
        solve_transposed(&factor, d, &mut encoder, d);
        Ok(Basis { kind, encoder, back: Some(back) })
    };
    let [plain, weighted] = &mut grams;
    Ok([basis(StartKind::Projection, plain)?, basis(StartKind::WeightedProjection, weighted)?])
}

impl Transformer<Array2<f32>, Array2<f32>> for Directions<'_> {
    /// Inputs `[tokens, hidden]` to features `[tokens, rank]`.
    fn transform(&self, mut inputs: Array2<f32>) -> Array2<f32> {
        let (d, rank) = self.encoder_t.dim();
        for mut row in inputs.rows_mut() {
            row.iter_mut().zip(self.mean).for_each(|(x, m)| *x -= m);
        }
        let mut features = Array2::zeros((inputs.nrows(), rank));
        let (y, x) = (features.as_slice_mut().expect("standard layout"), inputs.as_slice().expect("standard layout"));
        parallel_product(y, rank, x, d, self.columns());
        features
    }
}

impl Directions<'_> {
    fn columns(&self) -> View<'_> {
        let (d, rank) = self.encoder_t.dim();
        View::rows(self.encoder_t.as_slice().expect("standard layout"), d, rank, rank)
    }

    /// The features of the mean, were it not taken off.
    fn of_the_mean(&self) -> Vec<f32> {
        let (d, rank) = self.encoder_t.dim();
        let mut features = vec![0.0; rank];
        product(&mut features, rank, false, View::rows(self.mean, 1, d, d), self.columns());
        features
    }

    fn predictor(&self, decoder: Vec<f32>, bias: Vec<f32>) -> LowRankPredictor {
        LowRankPredictor {
            encoder: self.encoder_t.t().as_standard_layout().into_owned(),
            decoder: Array2::from_shape_vec((bias.len(), self.encoder_t.ncols()), decoder).expect("all neurons"),
            bias: bias.into(),
            relu: false,
        }
    }

    /// The projection's products, as far as these directions tell them; `back` is `[hidden, rank]`.
    fn approximate(self, projection: &Projection, back: &Array2<f32>) -> LowRankPredictor {
        let (d, rank) = back.dim();
        let ffn = projection.bias().len();
        let back = View::rows(back.as_slice().expect("standard layout"), d, rank, rank);
        let mut decoder = vec![0.0; ffn * rank];
        let mut bias = projection.bias().to_vec();
        let of_the_mean = self.of_the_mean();
        let mut rows = Vec::new();
        for first in (0..ffn).step_by(BLOCK) {
            let neurons = first..(first + BLOCK).min(ffn);
            projection.rows(neurons.clone(), &mut rows);
            let decoder = &mut decoder[neurons.start * rank..neurons.end * rank];
            parallel_product(decoder, rank, &rows, d, back);
            let of_neurons = rows.chunks_exact(d).zip(decoder.chunks_exact(rank));
            for (bias, (row, w)) in bias[neurons].iter_mut().zip(of_neurons) {
                *bias += dot(row, self.mean) - dot(w, &of_the_mean);
            }
        }
        self.predictor(decoder, bias)
    }

    /// The best linear separation of active from quiet tokens after features of unit variance: a neuron's slope is the
    /// difference of its active tokens' mean feature to the whole mean.
    fn separate(self, set: &TrainingSet, tokens: &[u32]) -> LowRankPredictor {
        let (d, rank) = self.encoder_t.dim();
        let ffn = set.targets().ffn();
        let (mut decoder, mut count) = (vec![0.0; ffn * rank], vec![0u32; ffn]);
        for part in tokens.chunks(BLOCK) {
            let mut block = Vec::new();
            set.records().gather(part, &mut block);
            let features = self.transform(Array2::from_shape_vec((part.len(), d), block).expect("all inputs"));
            let width = ffn.div_ceil(16).max(64);
            decoder.par_chunks_mut(width * rank).zip(count.par_chunks_mut(width)).enumerate().for_each(
                |(i, (w, count))| {
                    let first = i * width;
                    for (&token, feature) in part.iter().zip(features.rows()) {
                        for &n in set.targets().neurons_of(token as usize, first, first + count.len()).0 {
                            let n = n as usize - first;
                            count[n] += 1;
                            w[n * rank..][..rank].iter_mut().zip(feature).for_each(|(w, f)| *w += f);
                        }
                    }
                },
            );
        }
        let of_the_mean = self.of_the_mean();
        let total = tokens.len() as f32;
        let of_neurons = decoder.chunks_exact_mut(rank).zip(&count);
        let bias = of_neurons.map(|(w, &count)| {
            let p = (count as f32 / total).clamp(1e-4, 1.0 - 1e-4);
            // Counts of rare neurons are shrunk: a few tokens say little about a direction.
            w.iter_mut().for_each(|w| *w /= (count as f32 + 4.0) * (1.0 - p));
            (p / (1.0 - p)).ln() - dot(w, &of_the_mean)
        });
        let bias = bias.collect();
        self.predictor(decoder, bias)
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
