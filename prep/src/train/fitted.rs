//! What training gives: a predictor of either kind.

use flashlm_formats::bundle::PredictorDType;
use flashlm_formats::predictors::{FitLog, PredictorForm, PredictorPart, StoredElements, StoredMatrix};
use half::f16;
use linfa::ParamGuard;
use ndarray::Array2;

use super::activity::{Inputs, TrainingSet};
use super::moments::moments;
use super::options::{TrainOptions, TrainingData, fit};
use super::params::TrainError;
use super::predictor::{LowRankPredictor, quantise_rows};
use super::quantised::QuantisedProjection;
use super::scores::NeuronScores;

/// A predictor of either kind, and how it is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Fitted {
    kind: Kind,
    neurons: usize,
    /// The neurons that have rows, ascending, where not all have; the others are never predicted.
    rows: Option<Vec<u32>>,
}

#[derive(Clone, Debug, PartialEq)]
enum Kind {
    /// Two thin matrices, stored as this type.
    LowRank(LowRankPredictor, PredictorDType),
    Projection(QuantisedProjection),
}

impl From<QuantisedProjection> for Fitted {
    fn from(projection: QuantisedProjection) -> Self {
        Self { neurons: projection.neurons(), kind: Kind::Projection(projection), rows: None }
    }
}

impl Fitted {
    /// Two thin matrices, to be stored as `dtype`.
    pub fn low_rank(predictor: LowRankPredictor, dtype: PredictorDType) -> Self {
        Self { neurons: predictor.neurons(), kind: Kind::LowRank(predictor, dtype), rows: None }
    }

    /// The predictor of `layer` in this form, with rows for the neurons that fire in training; and how the fit went, if it was trained.
    pub(super) fn fit(
        options: &TrainOptions,
        data: TrainingData<'_>,
        set: &TrainingSet,
        layer: usize,
        form: PredictorForm,
    ) -> Result<(Self, Option<FitLog>), TrainError> {
        let projection = data.projection(layer, set)?;
        let (fitted, log) = match form {
            PredictorForm::LowRank(rank) => {
                let (predictor, log) = fit(options, set, projection, rank).map_err(TrainError::in_layer(layer))?;
                (Self::low_rank(predictor, options.dtype), Some(log))
            }
            PredictorForm::Projection(_) => {
                let projection = projection.ok_or(TrainError::NoProjection { layer })?;
                let mut params = options.fit.clone().projection(projection.clone());
                // Of no account here, but checked.
                params.0.rank = 1;
                let tokens = params.check()?.tokens(set)?.train;
                let quantised = QuantisedProjection::new(&projection, &moments(set, &tokens), set, &tokens);
                (quantised.map_err(TrainError::in_layer(layer))?.into(), None)
            }
        };
        Ok((fitted.with_rows(&set.targets().fire()), log))
    }

    /// The same with rows for these neurons alone, which ascend.
    pub(super) fn with_rows(self, rows: &[u32]) -> Self {
        if rows.len() == self.neurons || self.rows.is_some() {
            return self;
        }
        let kind = match self.kind {
            Kind::LowRank(low, dtype) => Kind::LowRank(low.with_rows(rows), dtype),
            Kind::Projection(projection) => Kind::Projection(projection.with_rows(rows)),
        };
        Self { kind, rows: Some(rows.to_vec()), ..self }
    }

    /// Neurons that have rows, where not all have.
    pub(super) fn rows(&self) -> Option<usize> {
        self.rows.as_ref().map(Vec::len)
    }

    /// As it is after being stored as `dtype` and read again; a projection has a way of its own.
    pub(super) fn rounded(&self, dtype: PredictorDType) -> Self {
        let kind = match &self.kind {
            Kind::LowRank(predictor, _) => Kind::LowRank(predictor.rounded(dtype), dtype),
            Kind::Projection(projection) => Kind::Projection(projection.clone()),
        };
        Self { kind, rows: self.rows.clone(), ..*self }
    }

    /// As [`Self::rounded`] to the type that it is stored as.
    ///
    /// # Errors
    /// `Range` if that cannot hold its numbers.
    pub(super) fn as_stored(&self) -> Result<Self, TrainError> {
        let stored = self.rounded(self.dtype());
        match &stored.kind {
            Kind::LowRank(predictor, dtype) if !predictor.is_finite() => Err(TrainError::Range { dtype: dtype.name() }),
            _ => Ok(stored),
        }
    }

    /// The same with `threshold` taken off every score.
    pub(super) fn shifted(mut self, threshold: f32) -> Self {
        match &mut self.kind {
            Kind::LowRank(predictor, _) => predictor.bias -= threshold,
            Kind::Projection(projection) => projection.bias -= threshold,
        }
        self
    }

    /// The ways to store it that a report compares.
    pub(super) fn dtypes(&self) -> &'static [PredictorDType] {
        match self.kind {
            Kind::LowRank(..) => &[PredictorDType::F16, PredictorDType::Int8],
            Kind::Projection(_) => &[PredictorDType::Int4],
        }
    }

    /// How it is stored.
    pub(super) fn dtype(&self) -> PredictorDType {
        match self.kind {
            Kind::LowRank(_, dtype) => dtype,
            Kind::Projection(_) => PredictorDType::Int4,
        }
    }

    /// Its rank; of a projection the width of the inputs.
    pub(super) fn rank(&self) -> usize {
        match &self.kind {
            Kind::LowRank(predictor, _) => predictor.rank(),
            Kind::Projection(projection) => projection.hidden(),
        }
    }

    /// The tensors of its file, under `prefix`: empty, or `lookahead.`.
    pub fn part<'a>(&'a self, prefix: &'a str) -> PredictorPart<'a> {
        let (encoder, decoder, relu, bias) = match &self.kind {
            Kind::LowRank(low, dtype) => {
                (Some(stored(&low.encoder, *dtype)), stored(&low.decoder, *dtype), low.relu, &low.bias)
            }
            Kind::Projection(projection) => {
                let (values, scales) = projection.stored();
                let elements = StoredElements::Int4 { values: values.to_vec(), scales: scales.to_vec() };
                let (rows, columns) = (projection.neurons(), projection.hidden());
                (None, StoredMatrix { rows, columns, elements }, false, &projection.bias)
            }
        };
        let bias = bias.as_slice().expect("standard layout");
        PredictorPart { prefix, encoder, decoder, relu, bias, rows: self.rows.as_deref() }
    }
}

impl NeuronScores for Fitted {
    fn neurons(&self) -> usize {
        self.neurons
    }

    fn scores(&self, inputs: &Inputs, tokens: &[u32], take: &mut dyn FnMut(&[u32], &[f32])) {
        let kind: &dyn NeuronScores = match &self.kind {
            Kind::LowRank(predictor, _) => predictor,
            Kind::Projection(projection) => projection,
        };
        let Some(rows) = &self.rows else { return kind.scores(inputs, tokens, take) };
        let mut scores = Vec::new();
        kind.scores(inputs, tokens, &mut |block, of_rows| {
            scores.clear();
            scores.resize(block.len() * self.neurons, f32::NEG_INFINITY);
            for (scores, of_rows) in scores.chunks_exact_mut(self.neurons).zip(of_rows.chunks_exact(rows.len())) {
                rows.iter().zip(of_rows).for_each(|(&neuron, score)| scores[neuron as usize] = *score);
            }
            take(block, &scores);
        });
    }
}

fn stored(matrix: &Array2<f32>, dtype: PredictorDType) -> StoredMatrix {
    let elements = match dtype {
        PredictorDType::F16 => StoredElements::F16(matrix.iter().map(|&v| f16::from_f32(v)).collect()),
        _ => {
            let (bytes, scales) = quantise_rows(matrix);
            StoredElements::Int8 { bytes, scales }
        }
    };
    StoredMatrix { rows: matrix.nrows(), columns: matrix.ncols(), elements }
}
