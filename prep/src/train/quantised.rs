//! The second kind of predictor: the projection itself, in four-bit integers.
//!
//! Where a layer's products need many directions, these bytes tell more than as many bytes of low rank. Rounding is made for
//! the layer's inputs ([`crate::quantise::quantise_rows_for`]), and nothing is trained.

use flashlm_formats::bundle::PredictorDType;
use flashlm_formats::weight_format::{GroupSize, SCALE_BYTES, WeightFormat};
use flashlm_kernels::{Element, Matrix, ScaleGroup, matvec_serial};
use half::bf16;
use linfa::dataset::Records;
use linfa::traits::PredictInplace;
use ndarray::{Array1, Array2};
use rayon::prelude::*;

use super::activity::{Inputs, TrainingSet, thin};
use super::moments::Moments;
use super::params::TrainError;
use super::projection::Projection;
use super::scores::{LOGIT_SPREAD, NeuronScores, SPREAD_TOKENS, predict, spread};
use crate::quantise::{Metric, quantise_rows_for};

/// Neurons that are quantised at once.
const NEURONS: usize = 1024;
/// Tokens whose scores are formed at once.
const BLOCK: usize = 256;
const GROUP: ScaleGroup = ScaleGroup::new(PredictorDType::INT4_GROUP).expect("a group");

/// A quantised projection: `scores = Q x + bias`.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantisedProjection {
    hidden: usize,
    /// Half bytes, `[neurons, hidden]`.
    values: Vec<u8>,
    /// bf16, for groups of each row.
    scales: Vec<u8>,
    pub(super) bias: Array1<f32>,
}

fn format() -> WeightFormat {
    WeightFormat::Int4(GroupSize::new(PredictorDType::INT4_GROUP).expect("a group"))
}

impl QuantisedProjection {
    /// Quantises `projection` for inputs of these moments, which are those of `tokens`.
    pub(crate) fn new(
        projection: &Projection,
        moments: &Moments,
        set: &TrainingSet,
        tokens: &[u32],
    ) -> Result<Self, TrainError> {
        let (d, neurons) = (projection.hidden(), projection.bias().len());
        let metric =
            Metric::new(&moments.covariance, d, Metric::DAMPING).ok_or(TrainError::Degenerate { directions: d })?;
        let (row_bytes, scale_bytes) = (format().row_bytes(d), GROUP.scale_bytes(d));
        let (mut values, mut scales) = (vec![0; neurons * row_bytes], vec![0; neurons * scale_bytes]);
        let mut bias = projection.bias().to_vec();
        let (mut rows, mut before) = (Vec::new(), Vec::new());
        for first in (0..neurons).step_by(NEURONS) {
            let block = first..(first + NEURONS).min(neurons);
            projection.rows(block.clone(), &mut rows);
            before.clone_from(&rows);
            let values = &mut values[block.start * row_bytes..block.end * row_bytes];
            let scales = &mut scales[block.start * scale_bytes..block.end * scale_bytes];
            let quantised = quantise_rows_for(&metric, format(), &mut rows, values, scales);
            quantised.map_err(|_| TrainError::NotFinite)?;
            // What the rows lost on the mean, the bias makes up for.
            for (bias, (row, before)) in bias[block].iter_mut().zip(rows.chunks_exact(d).zip(before.chunks_exact(d))) {
                let lost = row.iter().zip(before).zip(&moments.mean).map(|((row, before), m)| (before - row) * m);
                *bias += lost.sum::<f32>();
            }
        }
        let mut made = Self { hidden: d, values, scales, bias: bias.into() };
        let mut sample = tokens.to_vec();
        thin(&mut sample, SPREAD_TOKENS);
        // Into the range that curves count in; a power of two changes no bit of a scale.
        let factor = (LOGIT_SPREAD / spread(&made, set, &sample)).log2().round().clamp(-60.0, 60.0).exp2();
        made.bias *= factor;
        for scale in made.scales.as_chunks_mut::<SCALE_BYTES>().0 {
            *scale = bf16::from_f32(bf16::from_le_bytes(*scale).to_f32() * factor).to_le_bytes();
        }
        Ok(made)
    }

    /// The same for these neurons alone.
    pub(super) fn with_rows(self, rows: &[u32]) -> Self {
        let neurons = self.bias.len();
        let select = |bytes: &[u8]| -> Vec<u8> {
            let row = bytes.len() / neurons;
            rows.iter().flat_map(|&n| &bytes[n as usize * row..][..row]).copied().collect()
        };
        let bias = rows.iter().map(|&n| self.bias[n as usize]).collect();
        Self { values: select(&self.values), scales: select(&self.scales), bias, ..self }
    }

    /// Half bytes `[neurons, hidden]`, and bf16 scales.
    pub(crate) fn stored(&self) -> (&[u8], &[u8]) {
        (&self.values, &self.scales)
    }

    /// Width of the inputs.
    pub fn hidden(&self) -> usize {
        self.hidden
    }
}

impl NeuronScores for QuantisedProjection {
    fn neurons(&self) -> usize {
        self.bias.len()
    }

    // In the runtime's own arithmetic.
    fn scores(&self, inputs: &Inputs, tokens: &[u32], take: &mut dyn FnMut(&[u32], &[f32])) {
        let neurons = self.bias.len();
        let matrix = Matrix::new(Element::Q4, &self.values, neurons, self.hidden)
            .and_then(|m| m.with_scales(&self.scales, GROUP.scale_bytes(self.hidden), GROUP))
            .expect("made as a matrix");
        let (mut rows, mut scores) = (Vec::new(), Vec::new());
        for block in tokens.chunks(BLOCK) {
            inputs.gather(block, &mut rows);
            scores.resize(block.len() * neurons, 0.0);
            scores.par_chunks_mut(neurons).zip(rows.par_chunks(self.hidden)).for_each(|(scores, x)| {
                matvec_serial(matrix, x, scores);
                scores.iter_mut().zip(&self.bias).for_each(|(z, b)| *z += b);
            });
            take(block, &scores);
        }
    }
}

impl PredictInplace<Inputs, Array2<bool>> for QuantisedProjection {
    fn predict_inplace(&self, inputs: &Inputs, predicted: &mut Array2<bool>) {
        predict(self, inputs, predicted);
    }

    fn default_target(&self, inputs: &Inputs) -> Array2<bool> {
        Array2::from_elem((inputs.nsamples(), self.neurons()), false)
    }
}
