//! What training gives: a predictor of either kind.

use flashlm_formats::bundle::PredictorDType;
use flashlm_formats::predictors::{PredictorForm, PredictorPart, StoredElements, StoredMatrix};
use half::f16;
use linfa::ParamGuard;
use ndarray::Array2;

use super::activity::TrainingSet;
use super::moments::moments;
use super::options::{TrainOptions, TrainingData, fit};
use super::params::TrainError;
use super::predictor::{LowRankPredictor, quantise_rows};
use super::quantised::QuantisedProjection;
use super::scores::NeuronScores;

/// A predictor of either kind, and how it is stored.
#[derive(Clone, Debug, PartialEq)]
pub enum Fitted {
    /// Two thin matrices, stored as this type.
    LowRank(LowRankPredictor, PredictorDType),
    /// The quantised projection.
    Projection(QuantisedProjection),
}

impl Fitted {
    /// The predictor of `layer` in this form.
    pub(super) fn fit(
        options: &TrainOptions,
        data: TrainingData<'_>,
        set: &TrainingSet,
        layer: usize,
        form: PredictorForm,
    ) -> Result<Self, TrainError> {
        let projection = data.projection(layer)?;
        if let PredictorForm::LowRank(rank) = form {
            return Ok(Self::LowRank(fit(options, set, projection, rank)?, options.dtype));
        }
        let projection = projection.ok_or(TrainError::NoProjection { layer })?;
        let mut params = options.fit.clone().projection(projection.clone());
        params.0.rank = 1;
        let tokens = params.check()?.tokens(set)?.train;
        Ok(Self::Projection(QuantisedProjection::new(&projection, &moments(set, &tokens), set, &tokens)?))
    }

    /// As it is after being stored as `dtype` and read again; a projection has a way of its own.
    pub(super) fn rounded(&self, dtype: PredictorDType) -> Self {
        match self {
            Self::LowRank(predictor, _) => Self::LowRank(predictor.rounded(dtype), dtype),
            Self::Projection(projection) => Self::Projection(projection.clone()),
        }
    }

    /// What it says of neurons.
    pub(super) fn scores(&self) -> &dyn NeuronScores {
        match self {
            Self::LowRank(predictor, _) => predictor,
            Self::Projection(projection) => projection,
        }
    }

    /// The same with `threshold` taken off every score.
    pub(super) fn shifted(mut self, threshold: f32) -> Self {
        let scores: &mut dyn NeuronScores = match &mut self {
            Self::LowRank(predictor, _) => predictor,
            Self::Projection(projection) => projection,
        };
        *scores.bias_mut() -= threshold;
        self
    }

    /// The ways to store it that a report compares.
    pub(super) fn dtypes(&self) -> &'static [PredictorDType] {
        match self {
            Self::LowRank(..) => &[PredictorDType::F16, PredictorDType::Int8],
            Self::Projection(_) => &[PredictorDType::Int4],
        }
    }

    /// How it is stored.
    pub(super) fn dtype(&self) -> PredictorDType {
        match self {
            Self::LowRank(_, dtype) => *dtype,
            Self::Projection(_) => PredictorDType::Int4,
        }
    }

    /// Its rank; of a projection the width of the inputs.
    pub(super) fn rank(&self) -> usize {
        match self {
            Self::LowRank(predictor, _) => predictor.rank(),
            Self::Projection(projection) => projection.hidden(),
        }
    }

    /// The tensors of its file, under `prefix`: empty, or `lookahead.`.
    pub fn part<'a>(&'a self, prefix: &'a str) -> PredictorPart<'a> {
        let (encoder, decoder, relu) = match self {
            Self::LowRank(low, dtype) => (Some(stored(&low.encoder, *dtype)), stored(&low.decoder, *dtype), low.relu),
            Self::Projection(projection) => {
                let (values, scales) = projection.stored();
                let elements = StoredElements::Int4 { values: values.to_vec(), scales: scales.to_vec() };
                let (rows, columns) = (projection.bias().len(), projection.hidden());
                (None, StoredMatrix { rows, columns, elements }, false)
            }
        };
        let bias = self.scores().bias().as_slice().expect("standard layout");
        PredictorPart { prefix, encoder, decoder, relu, bias }
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
