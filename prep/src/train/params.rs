use std::sync::Arc;

use flashlm_formats::bundle::LayoutError;
use flashlm_formats::checkpoint::CheckpointError;
use flashlm_formats::predictors::TrainReportError;
use flashlm_formats::recording::RecordingError;
use linfa::ParamGuard;

use super::projection::Projection;

/// Why training failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A parameter is out of its range.
    #[error("{name} is {value}, expected {expected}")]
    Parameter {
        /// Which one.
        name: &'static str,
        /// What it is.
        value: f64,
        /// What would be right.
        expected: &'static str,
    },
    /// The rank exceeds what the layer's shape makes useful.
    #[error("rank {rank} for inputs of {hidden} numbers and {ffn} neurons: at most {}", hidden.min(ffn))]
    Rank {
        /// Asked for.
        rank: usize,
        /// Width of the inputs.
        hidden: usize,
        /// Neurons.
        ffn: usize,
    },
    /// Inputs and activity have different lengths.
    #[error("inputs of {inputs} tokens, activity of {activity}")]
    Lengths {
        /// Tokens with inputs.
        inputs: usize,
        /// Tokens with activity.
        activity: usize,
    },
    /// Too little to learn from.
    #[error("{tokens} tokens to train on, {held_out} held out: at least 32 and 8 are needed")]
    TooFewTokens {
        /// Tokens to train on.
        tokens: usize,
        /// Tokens held out.
        held_out: usize,
    },
    /// Something about one layer.
    #[error("layer {layer}: {source}")]
    Layer {
        /// The layer.
        layer: usize,
        /// What.
        source: Box<Self>,
    },
    /// Inputs whose moments are no numbers.
    #[error(
        "expected inputs whose covariance has {directions} directions, found some that are infinite or no numbers; record again"
    )]
    Degenerate {
        /// Directions wanted.
        directions: usize,
    },
    /// A predictor is too large for its type.
    #[error(
        "its predictor's numbers exceed the range of {dtype}; store predictors as int8 (--dtype int8), or give a lower --learning-rate"
    )]
    Range {
        /// The type.
        dtype: &'static str,
    },
    /// Two thin matrices are not stored so.
    #[error("predictors of two matrices are stored as f16 or int8, not {dtype}")]
    DType {
        /// The type.
        dtype: &'static str,
    },
    /// Weights that are no numbers.
    #[error("the projection has weights that are infinite or no numbers")]
    NotFinite,
    /// A quantised projection was asked for where the projection is not known.
    #[error("the projection of layer {layer} is not known: give the recorded checkpoint with --model")]
    NoProjection {
        /// The layer.
        layer: usize,
    },
    /// The checkpoint is not the recorded one, by its shape.
    #[error(
        "the checkpoint has {} layers of {} x {}, the recorded model {} of {} x {}: give the checkpoint that was recorded",
        found.0, found.1, found.2, recorded.0, recorded.1, recorded.2
    )]
    OtherShape {
        /// Layers, width and neurons of the recorded model.
        recorded: (usize, usize, usize),
        /// Of the checkpoint.
        found: (usize, usize, usize),
    },
    /// The checkpoint is not the recorded one, by what its weights make of the inputs.
    #[error(
        "only {share:.1} % of the neurons recorded as active in layer {layer} are active with the checkpoint's weights: give the \
         checkpoint that was recorded"
    )]
    OtherWeights {
        /// The layer.
        layer: usize,
        /// Per cent.
        share: f64,
    },
    /// The projection's shape is not that of the layer.
    #[error("a projection [{rows}, {columns}] for {ffn} neurons and inputs of {hidden} numbers")]
    Projection {
        /// Its rows.
        rows: usize,
        /// Its columns.
        columns: usize,
        /// Width of the inputs.
        hidden: usize,
        /// Neurons.
        ffn: usize,
    },
    /// A predictor that was trained elsewhere, of another model.
    #[error("the predictor of layer {layer} has {what}: it is of another model")]
    Foreign {
        /// The layer.
        layer: usize,
        /// What does not fit.
        what: String,
    },
    /// Training diverged.
    #[error("training diverged in epoch {epoch}: the weights are not finite")]
    Diverged {
        /// First epoch with infinite weights.
        epoch: usize,
    },
    /// No layer to train.
    #[error("layers {first}..{end} of a model with {layers}")]
    Layers {
        /// First layer.
        first: usize,
        /// After the last layer.
        end: usize,
        /// Layers of the model.
        layers: usize,
    },
    /// The budget does not hold the smallest predictors.
    #[error(
        "the smallest predictors take {smallest} bytes and the budget is {budget}: allow more with --size-budget, \
         {:.1} times the percentage at least", *smallest as f64 / (*budget).max(1) as f64
    )]
    Budget {
        /// Bytes allowed.
        budget: u64,
        /// Bytes needed.
        smallest: u64,
    },
    /// Neurons cannot be laid out.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The recording cannot be read.
    #[error(transparent)]
    Recording(#[from] RecordingError),
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// linfa refused.
    #[error(transparent)]
    Linfa(#[from] linfa::Error),
    /// `predictors.json` cannot be written.
    #[error(transparent)]
    Report(#[from] TrainReportError),
    /// Writing failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// File.
        path: std::path::PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl TrainError {
    pub(super) fn in_layer(layer: usize) -> impl Fn(Self) -> Self {
        move |error| Self::Layer { layer, source: Box::new(error) }
    }
}

/// Unchecked parameters of [`super::LowRankPredictor`]; see linfa's `ParamGuard`.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRankPredictorParams(pub(crate) LowRankPredictorValidParams);

/// Checked parameters of [`super::LowRankPredictor`].
#[derive(Clone, Debug, PartialEq)]
pub struct LowRankPredictorValidParams {
    pub(crate) rank: usize,
    pub(crate) epochs: usize,
    pub(crate) patience: usize,
    pub(crate) batch: usize,
    pub(crate) learning_rate: f32,
    pub(crate) balance: f32,
    pub(crate) energy_weight: f32,
    pub(crate) tokens_max: usize,
    pub(crate) seed: u64,
    pub(crate) projection: Option<Arc<Projection>>,
}

impl LowRankPredictorParams {
    pub(crate) fn new(rank: usize) -> Self {
        LowRankPredictorParams(LowRankPredictorValidParams {
            rank,
            epochs: 6,
            patience: 2,
            batch: 256,
            learning_rate: 3e-3,
            balance: 0.5,
            energy_weight: 0.0,
            tokens_max: usize::MAX,
            seed: 0,
            projection: None,
        })
    }

    /// Passes over the training tokens, at most.
    pub fn epochs(mut self, epochs: usize) -> Self {
        self.0.epochs = epochs;
        self
    }

    /// Epochs without gain on the held-out tokens after which training stops.
    pub fn patience(mut self, patience: usize) -> Self {
        self.0.patience = patience;
        self
    }

    /// Tokens per step.
    pub fn batch(mut self, batch: usize) -> Self {
        self.0.batch = batch;
        self
    }

    /// Adam's step size at its height; it falls along a cosine.
    pub fn learning_rate(mut self, learning_rate: f32) -> Self {
        self.0.learning_rate = learning_rate;
        self
    }

    /// How far active and inactive pairs are brought to equal weight: an active pair counts `(inactive / active)^balance`
    /// times; 0 is the plain likelihood, 1 gives both classes the same weight.
    pub fn balance(mut self, balance: f32) -> Self {
        self.0.balance = balance;
        self
    }

    /// How much of an active pair's weight follows its energy: 0 none, 1 all.
    pub fn energy_weight(mut self, energy_weight: f32) -> Self {
        self.0.energy_weight = energy_weight;
        self
    }

    /// Trains on at most this many tokens, evenly chosen.
    pub fn tokens_max(mut self, tokens_max: usize) -> Self {
        self.0.tokens_max = tokens_max;
        self
    }

    /// Decides the start and the order of the tokens.
    pub fn seed(mut self, seed: u64) -> Self {
        self.0.seed = seed;
        self
    }

    /// The weights that the activity comes from: a better start than the inputs alone give.
    pub fn projection(mut self, projection: impl Into<Option<Arc<Projection>>>) -> Self {
        self.0.projection = projection.into();
        self
    }
}

impl ParamGuard for LowRankPredictorParams {
    type Checked = LowRankPredictorValidParams;
    type Error = TrainError;

    fn check_ref(&self) -> Result<&Self::Checked, TrainError> {
        let p = &self.0;
        let count = |name, value: usize| {
            if value > 0 {
                return Ok(());
            }
            Err(TrainError::Parameter { name, value: value as f64, expected: "at least 1" })
        };
        count("rank", p.rank)?;
        count("epochs", p.epochs)?;
        count("patience", p.patience)?;
        count("batch", p.batch)?;
        count("tokens_max", p.tokens_max)?;
        let within = |name, value: f64, low: f64, high: f64, expected| {
            if value > low && value <= high {
                return Ok(());
            }
            Err(TrainError::Parameter { name, value, expected })
        };
        within("learning_rate", p.learning_rate as f64, 0.0, 1.0, "above 0 and at most 1")?;
        within("balance", p.balance as f64, -f64::MIN_POSITIVE, 1.0, "from 0 to 1")?;
        within("energy_weight", p.energy_weight as f64, -f64::MIN_POSITIVE, 1.0, "from 0 to 1")?;
        Ok(p)
    }

    fn check(self) -> Result<Self::Checked, TrainError> {
        self.check_ref()?;
        Ok(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_checked() {
        let good = || LowRankPredictorParams::new(8);
        assert!(good().check().is_ok());
        assert!(good().balance(0.0).energy_weight(0.0).check().is_ok());
        let bad = [
            LowRankPredictorParams::new(0),
            good().epochs(0),
            good().patience(0),
            good().batch(0),
            good().learning_rate(0.0),
            good().learning_rate(f32::NAN),
            good().balance(1.5),
            good().balance(-0.5),
            good().energy_weight(2.0),
            good().tokens_max(0),
        ];
        for params in bad {
            assert!(matches!(params.check_ref(), Err(TrainError::Parameter { .. })), "{params:?}");
        }
    }
}
