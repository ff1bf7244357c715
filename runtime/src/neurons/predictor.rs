//! Which neurons of a layer to compute: a low-rank predictor, as `docs/predictors.md` defines its evaluation.
//!
//! `score = decoder (encoder x) + bias`, f32 accumulation; a neuron is predicted where its score is above zero. Int8 matrices
//! have one scale for each row, applied after the row's sum. The arithmetic is that of one token at a time, always: a decision
//! never depends on how many tokens were processed together.

use std::ops::Range;

use flashlm_formats::bundle::{LayerPredictor, PredictorInfo};
use flashlm_formats::model::ModelSpec;
use flashlm_kernels::{Element, Matrix, Threads, matvec, matvec_each};
use safetensors::{Dtype, SafeTensors};

use crate::error::{Result, RuntimeError};
use crate::tensors::SharedBytes;

struct ScaledMatrix {
    bytes: SharedBytes,
    range: Range<usize>,
    element: Element,
    rows: usize,
    cols: usize,
    /// One for each row of an int8 matrix.
    scales: Vec<f32>,
}

impl ScaledMatrix {
    fn load(blob: &SharedBytes, parsed: &SafeTensors<'_>, name: &str) -> Result<Self> {
        let bad = |what: String| RuntimeError::Predictor { tensor: name.to_owned(), what };
        let view = parsed.tensor(name).map_err(|_| bad("it is missing".into()))?;
        let &[rows, cols] = view.shape() else {
            return Err(bad(format!("its shape {:?} is not that of a matrix", view.shape())));
        };
        let element = match view.dtype() {
            Dtype::F16 => Element::F16,
            Dtype::I8 => Element::I8,
            other => return Err(bad(format!("its dtype is {other:?}, expected F16 or I8"))),
        };
        let scales = if element == Element::I8 { floats(parsed, &format!("{name}_scale"), rows)? } else { Vec::new() };
        let start = view.data().as_ptr() as usize - (**blob).as_ref().as_ptr() as usize;
        Ok(Self { bytes: blob.clone(), range: start..start + view.data().len(), element, rows, cols, scales })
    }

    /// `[tokens, cols]` to `[tokens, rows]`.
    fn apply(&self, threads: &Threads, x: &[f32], tokens: usize, y: &mut [f32]) {
        let data = &(*self.bytes).as_ref()[self.range.clone()];
        let matrix = Matrix::new(self.element, data, self.rows, self.cols).expect("checked when it was loaded");
        match tokens {
            1 => matvec(threads, matrix, x, y),
            _ => matvec_each(threads, matrix, x, tokens, y, &mut || {}),
        }
        if !self.scales.is_empty() {
            for y in y.chunks_exact_mut(self.rows) {
                y.iter_mut().zip(&self.scales).for_each(|(y, scale)| *y *= scale);
            }
        }
    }
}

fn floats(parsed: &SafeTensors<'_>, name: &str, len: usize) -> Result<Vec<f32>> {
    let view = parsed.tensor(name).ok().filter(|v| v.dtype() == Dtype::F32 && v.shape() == [len]);
    let view = view.ok_or_else(|| RuntimeError::Predictor {
        tensor: name.to_owned(),
        what: format!("expected {len} values of F32"),
    })?;
    Ok(view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}

/// The predictors that see the FFN input of one layer.
pub struct LayerPredictors {
    /// Speaks of the layer's own neurons, and alone decides what is computed.
    pub own: Predictor,
    /// Speaks of the next layer's, for reading ahead.
    pub ahead: Option<Predictor>,
}

impl LayerPredictors {
    /// Takes those of all layers from a bundle's predictors section.
    pub fn load_all(blob: &SharedBytes, info: &PredictorInfo, spec: &ModelSpec) -> Result<Vec<Self>> {
        let (hidden, neurons) = (spec.hidden_size, spec.ffn().size);
        let tensors = PredictorTensors::parse(blob)?;
        let layer = |(layer, stored): (usize, &LayerPredictor)| {
            let load = |prefix: &str| tensors.predictor(&format!("layers.{layer}.{prefix}"), hidden, neurons);
            Ok(Self { own: load("")?, ahead: stored.look_ahead_rank.map(|_| load("lookahead.")).transpose()? })
        };
        info.layers.iter().enumerate().map(layer).collect()
    }

    /// Bytes of the vectors of all layers, which are kept as numbers beside the blob: biases, scales, and room for the middle of `batch`
    /// tokens.
    pub fn vector_bytes(info: &PredictorInfo, spec: &ModelSpec, batch: usize) -> u64 {
        let one = |rank: usize| (2 * spec.ffn().size + (1 + batch) * rank) * 4;
        let bytes = info.layers.iter().map(|layer| one(layer.rank) + layer.look_ahead_rank.map_or(0, one));
        bytes.sum::<usize>() as u64
    }
}

/// A safetensors blob with predictors. Its header, which names the tensors of all layers, is read once.
pub struct PredictorTensors<'a> {
    blob: &'a SharedBytes,
    parsed: SafeTensors<'a>,
}

impl<'a> PredictorTensors<'a> {
    /// Reads the header.
    pub fn parse(blob: &'a SharedBytes) -> Result<Self> {
        let parsed = SafeTensors::deserialize((**blob).as_ref())
            .map_err(|e| RuntimeError::Predictor { tensor: "*".to_owned(), what: e.to_string() })?;
        Ok(Self { blob, parsed })
    }

    /// The predictor of the tensors `{prefix}encoder`, `{prefix}decoder`, `{prefix}bias` (and scales); `hidden` inputs and `neurons`
    /// outputs are expected. A tensor `{prefix}encoder_relu` says that a ReLU stands behind the encoder.
    pub fn predictor(&self, prefix: &str, hidden: usize, neurons: usize) -> Result<Predictor> {
        let Self { blob, parsed } = self;
        let encoder = ScaledMatrix::load(blob, parsed, &format!("{prefix}encoder"))?;
        let decoder = ScaledMatrix::load(blob, parsed, &format!("{prefix}decoder"))?;
        let shapes = ((encoder.cols, decoder.rows), (hidden, neurons));
        if shapes.0 != shapes.1 || encoder.rows != decoder.cols {
            return Err(RuntimeError::Predictor {
                tensor: format!("{prefix}decoder"),
                what: format!(
                    "it maps {} inputs over {} and {} to {} neurons where the model has {hidden} inputs and {neurons} neurons",
                    encoder.cols, encoder.rows, decoder.cols, decoder.rows
                ),
            });
        }
        let bias = floats(parsed, &format!("{prefix}bias"), neurons)?;
        let middle = vec![0.0; encoder.rows];
        let relu = parsed.tensor(&format!("{prefix}encoder_relu")).is_ok();
        Ok(Predictor { encoder, decoder, bias, middle, relu })
    }
}

/// The predictor of one layer.
pub struct Predictor {
    encoder: ScaledMatrix,
    decoder: ScaledMatrix,
    bias: Vec<f32>,
    middle: Vec<f32>,
    /// Whether negative numbers in the middle count as zero.
    relu: bool,
}

impl Predictor {
    /// Scores of all neurons for one token's FFN input.
    pub fn scores(&mut self, threads: &Threads, input: &[f32], scores: &mut [f32]) {
        self.scores_of_each(threads, input, 1, scores);
    }

    /// Scores `[tokens, neurons]` for the FFN inputs of a few tokens, `[tokens, hidden]`: of each what it has alone. `scores` may be
    /// longer.
    pub fn scores_of_each(&mut self, threads: &Threads, inputs: &[f32], tokens: usize, scores: &mut [f32]) {
        let scores = &mut scores[..tokens * self.decoder.rows];
        // Grows with the first step of so many tokens.
        self.middle.resize(self.middle.len().max(tokens * self.encoder.rows), 0.0);
        let middle = &mut self.middle[..tokens * self.encoder.rows];
        self.encoder.apply(threads, inputs, tokens, middle);
        if self.relu {
            middle.iter_mut().for_each(|h| *h = h.max(0.0));
        }
        self.decoder.apply(threads, middle, tokens, scores);
        for scores in scores.chunks_exact_mut(self.bias.len().max(1)) {
            scores.iter_mut().zip(&self.bias).for_each(|(score, bias)| *score += bias);
        }
    }

    /// Bytes of its matrices and vectors.
    pub fn bytes(&self) -> u64 {
        let vectors = self.bias.len() + self.encoder.scales.len() + self.decoder.scales.len();
        (self.encoder.range.len() + self.decoder.range.len() + vectors * 4) as u64
    }
}
