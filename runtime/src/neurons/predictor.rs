//! Which neurons of a layer to compute: a low-rank predictor or the quantised projection, as `docs/predictors.md` defines its evaluation.
//!
//! `score = decoder (encoder x) + bias`, f32 accumulation; a neuron is predicted where its score is above zero. Int8 matrices
//! have one scale for each row, applied after the row's sum. A decoder of four-bit integers is the model's own projection, and has
//! no encoder before it. The arithmetic is that of one token at a time, always: a decision
//! never depends on how many tokens were processed together.

use std::ops::Range;

use flashlm_formats::bundle::{LayerPredictor, PREDICTOR_ROWS, PredictorDType, PredictorInfo, PredictorKind};
use flashlm_formats::model::ModelSpec;
use flashlm_kernels::{
    Element, MATMUL_TOKENS_MIN, MatmulScratch, Matrix, ScaleGroup, Threads, matmul, matvec, matvec_each,
};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::source::{Arithmetic, Inputs};
use crate::error::{Result, RuntimeError};
use crate::tensors::SharedBytes;

struct BlobMatrix {
    blob: SharedBytes,
    range: Range<usize>,
    dtype: PredictorDType,
    element: Element,
    rows: usize,
    cols: usize,
    scales: Scales,
}

enum Scales {
    None,
    /// One for each row, applied after the row's sum.
    Rows(Vec<f32>),
    /// bf16 in the blob, for the groups of all rows.
    Groups(Range<usize>),
}

/// All ones in what is no finite number.
const F16_EXPONENT: u16 = 0x7c00;

const GROUP: ScaleGroup = ScaleGroup::new(PredictorDType::INT4_GROUP).expect("a group");

/// Where a tensor lies in the blob that it was parsed from.
fn range_in(blob: &SharedBytes, view: &TensorView<'_>) -> Range<usize> {
    let start = view.data().as_ptr() as usize - (**blob).as_ref().as_ptr() as usize;
    start..start + view.data().len()
}

impl BlobMatrix {
    /// The matrix `name`, whose rows are `cols` wide if they are four-bit integers.
    fn load(blob: &SharedBytes, parsed: &SafeTensors<'_>, name: &str, cols: usize) -> Result<Self> {
        let bad = |what: String| RuntimeError::Predictor { tensor: name.to_owned(), what };
        let view = parsed.tensor(name).map_err(|_| bad("it is missing".into()))?;
        let &[rows, width] = view.shape() else {
            return Err(bad(format!("its shape {:?} is not that of a matrix", view.shape())));
        };
        let dtype = PredictorDType::try_from(view.dtype()).map_err(|e| bad(format!("its dtype is {e}")))?;
        let (element, cols) = match dtype {
            PredictorDType::F16 => (Element::F16, width),
            PredictorDType::Int8 => (Element::I8, width),
            PredictorDType::Int4 => (Element::Q4, cols),
        };
        let scale = format!("{name}_scale");
        let scales = match dtype {
            PredictorDType::F16 => {
                let is_infinite = |bits: &[u8; 2]| u16::from_le_bytes(*bits) & F16_EXPONENT == F16_EXPONENT;
                if view.data().as_chunks::<2>().0.iter().any(is_infinite) {
                    return Err(bad("expected finite numbers, found some that are infinite or none".into()));
                }
                Scales::None
            }
            PredictorDType::Int8 => Scales::Rows(floats(parsed, &scale, rows)?),
            PredictorDType::Int4 => {
                let row_bytes = element.checked_row_bytes(cols).filter(|&bytes| bytes == width);
                row_bytes.ok_or_else(|| {
                    bad(format!(
                        "expected rows of {} bytes for {cols} half bytes, found {width}",
                        element.row_bytes(cols)
                    ))
                })?;
                let shape = [rows, GROUP.count(cols)];
                let view = parsed.tensor(&scale).ok().filter(|v| v.dtype() == Dtype::BF16 && v.shape() == shape);
                let what = format!("expected {shape:?} values of BF16");
                let view = view.ok_or(RuntimeError::Predictor { tensor: scale.clone(), what })?;
                let of = |bytes: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
                if let Some(found) = view.data().as_chunks::<2>().0.iter().map(of).find(|v| !v.is_finite()) {
                    let what = format!("expected finite numbers, found {found}");
                    return Err(RuntimeError::Predictor { tensor: scale, what });
                }
                Scales::Groups(range_in(blob, &view))
            }
        };
        Ok(Self { blob: blob.clone(), range: range_in(blob, &view), dtype, element, rows, cols, scales })
    }

    /// `[tokens, cols]` to `[tokens, rows]`.
    fn apply(&self, threads: &Threads, x: &[f32], tokens: usize, y: &mut [f32], piece: Option<&mut MatmulScratch>) {
        let blob = (*self.blob).as_ref();
        let matrix = Matrix::new(self.element, &blob[self.range.clone()], self.rows, self.cols);
        let mut matrix = matrix.expect("checked when it was loaded");
        if let Scales::Groups(range) = &self.scales {
            let scaled = matrix.with_scales(&blob[range.clone()], GROUP.scale_bytes(self.cols), GROUP);
            matrix = scaled.expect("checked when it was loaded");
        }
        match (tokens, piece) {
            (_, Some(scratch)) => matmul(threads, matrix, x, tokens, y, self.rows, scratch),
            (1, None) => matvec(threads, matrix, x, y),
            (_, None) => matvec_each(threads, matrix, x, tokens, y, &mut || {}),
        }
        if let Scales::Rows(scales) = &self.scales {
            for y in y.chunks_exact_mut(self.rows) {
                y.iter_mut().zip(scales).for_each(|(y, scale)| *y *= scale);
            }
        }
    }

    fn bytes(&self) -> usize {
        self.range.len()
            + match &self.scales {
                Scales::None => 0,
                Scales::Rows(scales) => size_of_val(&scales[..]),
                Scales::Groups(range) => range.len(),
            }
    }
}

fn floats(parsed: &SafeTensors<'_>, name: &str, len: usize) -> Result<Vec<f32>> {
    let view = parsed.tensor(name).ok().filter(|v| v.dtype() == Dtype::F32 && v.shape() == [len]);
    let view = view.ok_or_else(|| RuntimeError::Predictor {
        tensor: name.to_owned(),
        what: format!("expected {len} values of F32"),
    })?;
    let values: Vec<f32> = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    match values.iter().find(|v| !v.is_finite()) {
        Some(found) => Err(RuntimeError::Predictor {
            tensor: name.to_owned(),
            what: format!("expected finite numbers, found {found}"),
        }),
        None => Ok(values),
    }
}

/// The neurons that have rows, ascending; none where the tensor `name` is missing, as all have.
fn rows(parsed: &SafeTensors<'_>, name: &str, neurons: usize) -> Result<Option<Vec<u32>>> {
    let Ok(view) = parsed.tensor(name) else { return Ok(None) };
    let bad = |what: String| RuntimeError::Predictor { tensor: name.to_owned(), what };
    if view.dtype() != Dtype::U32 || view.shape().len() != 1 {
        return Err(bad(format!("it is {:?} {:?}, expected U32 of one dimension", view.dtype(), view.shape())));
    }
    let rows: Vec<u32> = view.data().chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let ascends = rows.is_sorted_by(|a, b| a < b);
    if !ascends || rows.is_empty() || rows.last().is_some_and(|&last| last as usize >= neurons) {
        return Err(bad(format!("expected ascending numbers of some of {neurons} neurons")));
    }
    Ok(Some(rows))
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
            let own = load("")?;
            let is = |what: &str, found: String, said: String| {
                let what = format!("{what}: the tensors have {found}, the manifest says {said}");
                Err(RuntimeError::Predictor { tensor: format!("layers.{layer}.decoder"), what })
            };
            let rows = |rows: Option<usize>| rows.map_or("one for each neuron".to_owned(), |rows| rows.to_string());
            if own.rows() != stored.rows {
                return is("rows", rows(own.rows()), rows(stored.rows));
            }
            if own.rank() != stored.rank {
                return is("rank", own.rank().to_string(), stored.rank.to_string());
            }
            if own.maps.decoder.dtype != stored.dtype {
                return is("type", own.maps.decoder.dtype.name().into(), stored.dtype.name().into());
            }
            if own.maps.relu && info.kind == PredictorKind::LowRank {
                return is("kind", "a ReLU after the encoder".into(), "none".into());
            }
            Ok(Self { own, ahead: stored.look_ahead_rank.map(|_| load("lookahead.")).transpose()? })
        };
        info.layers.iter().enumerate().map(layer).collect()
    }

    /// Bytes of the vectors of all layers, which are kept as numbers beside the blob: biases, scales, places of rows, and room for
    /// what lies between for `batch` tokens.
    pub fn vector_bytes(info: &PredictorInfo, spec: &ModelSpec, batch: usize) -> u64 {
        let neurons = spec.ffn().size;
        let together = batch.max(SCORED_TOGETHER);
        let low_rank = |rank: usize, rows: usize| 2 * rows + (1 + together) * rank;
        let own = |layer: &LayerPredictor| {
            let rows = layer.rows.unwrap_or(neurons);
            let placed = layer.rows.unwrap_or(0);
            placed + if layer.dtype == PredictorDType::Int4 { rows } else { low_rank(layer.rank, rows) }
        };
        let ahead = |rank: usize| low_rank(rank, neurons);
        let numbers = info.layers.iter().map(|layer| own(layer) + layer.look_ahead_rank.map_or(0, ahead));
        4 * numbers.sum::<usize>() as u64
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
        let parsed =
            SafeTensors::deserialize((**blob).as_ref()).map_err(|e| RuntimeError::Predictors(e.to_string()))?;
        Ok(Self { blob, parsed })
    }

    /// The predictor of the tensors `{prefix}encoder`, `{prefix}decoder`, `{prefix}bias` (and scales); `hidden` inputs and `neurons`
    /// outputs are expected. A tensor `{prefix}encoder_relu` says that a ReLU stands behind the encoder, `{prefix}rows` that only some
    /// neurons have rows. A decoder of four-bit integers has no encoder.
    pub fn predictor(&self, prefix: &str, hidden: usize, neurons: usize) -> Result<Predictor> {
        let Self { blob, parsed } = self;
        let load = |name: &str| BlobMatrix::load(blob, parsed, &format!("{prefix}{name}"), hidden);
        let decoder = load("decoder")?;
        // Four-bit integers are the projection itself.
        let encoder = if decoder.element == Element::Q4 { None } else { Some(load("encoder")?) };
        let rows = rows(parsed, &format!("{prefix}{PREDICTOR_ROWS}"), neurons)?;
        let with_rows = rows.as_ref().map_or(neurons, Vec::len);
        let (inputs, middle) = encoder.as_ref().map_or((decoder.cols, decoder.cols), |e| (e.cols, e.rows));
        if decoder.rows != with_rows {
            return Err(RuntimeError::Predictor {
                tensor: format!("{prefix}decoder"),
                what: format!(
                    "expected {with_rows} rows, one for each neuron that {prefix}{PREDICTOR_ROWS} names or the layer has, found {}",
                    decoder.rows
                ),
            });
        }
        if inputs != hidden || middle != decoder.cols {
            return Err(RuntimeError::Predictor {
                tensor: format!("{prefix}decoder"),
                what: format!(
                    "it maps {inputs} inputs over {middle} and {} to {} neurons where the model has {hidden} inputs and {neurons} \
                     neurons",
                    decoder.cols, decoder.rows
                ),
            });
        }
        let bias = floats(parsed, &format!("{prefix}bias"), decoder.rows)?;
        let middle = vec![0.0; encoder.as_ref().map_or(0, |e| e.rows)];
        let relu = parsed.tensor(&format!("{prefix}encoder_relu")).is_ok();
        Ok(Predictor { maps: Maps { encoder, decoder, bias, middle, relu }, neurons, placed: rows })
    }
}

/// The predictor of one layer.
pub struct Predictor {
    maps: Maps,
    neurons: usize,
    /// Where only some neurons have rows.
    /// Which neurons the decoder's rows are of, ascending, where not all have one; the others are never predicted.
    placed: Option<Vec<u32>>,
}

/// From an input to a score for each row of the decoder.
struct Maps {
    /// None where the decoder is the projection itself.
    encoder: Option<BlobMatrix>,
    decoder: BlobMatrix,
    bias: Vec<f32>,
    middle: Vec<f32>,
    /// Whether negative numbers in the middle count as zero.
    relu: bool,
}

/// Tokens of a prompt whose scores are computed together, at least.
pub const SCORED_TOGETHER: usize = 32;
const _: () =
    assert!(SCORED_TOGETHER / 2 >= MATMUL_TOKENS_MIN, "so many that equal parts of a piece are not too short");

impl Predictor {
    /// Scores of all neurons for one token's FFN input.
    pub fn scores(&mut self, threads: &Threads, input: &[f32], scores: &mut [f32]) {
        self.scores_of_each(threads, input, 1, scores);
    }

    /// Scores `[tokens, neurons]` for the FFN inputs of a few tokens, `[tokens, hidden]`: of each what it has alone. `scores` may be
    /// longer.
    pub fn scores_of_each(&mut self, threads: &Threads, inputs: &[f32], tokens: usize, scores: &mut [f32]) {
        self.scores_of(threads, inputs, tokens, scores, None);
    }

    /// Calls `each` with every token of `inputs` and the scores of all neurons for it: a piece of a prompt meets the matrices in
    /// products of many tokens, other tokens as if each were alone. `scores` is room for the scores of [`SCORED_TOGETHER`] tokens at
    /// least.
    pub fn score_each(
        &mut self,
        threads: &Threads,
        inputs: Inputs<'_>,
        (scores, scratch): (&mut [f32], &mut MatmulScratch),
        each: &mut dyn FnMut(usize, &[f32]),
    ) {
        let (neurons, hidden, tokens) = (self.neurons, inputs.hidden(), inputs.tokens);
        let mut piece = (inputs.arithmetic == Arithmetic::Piece).then_some(scratch);
        // In equal parts: of a piece each has enough tokens for the products of many.
        let parts = tokens.div_ceil(scores.len() / neurons);
        for part in 0..parts {
            let of_part = part * tokens / parts..(part + 1) * tokens / parts;
            let values = &inputs.values[of_part.start * hidden..of_part.end * hidden];
            self.scores_of(threads, values, of_part.len(), scores, piece.as_deref_mut());
            of_part.zip(scores.chunks_exact(neurons)).for_each(|(token, scores)| each(token, scores));
        }
    }

    fn scores_of(
        &mut self,
        threads: &Threads,
        inputs: &[f32],
        tokens: usize,
        scores: &mut [f32],
        piece: Option<&mut MatmulScratch>,
    ) {
        let scores = &mut scores[..tokens * self.neurons];
        let rows = self.placed.as_ref().map_or(self.neurons, Vec::len);
        self.maps.scores(threads, inputs, tokens, &mut scores[..tokens * rows], piece);
        if let Some(neurons) = &self.placed {
            spread(scores, neurons, self.neurons);
        }
    }

    /// Width of the middle; of a projection, which has none, of the inputs.
    pub fn rank(&self) -> usize {
        self.maps.decoder.cols
    }

    /// Neurons that have a row, where not all have.
    pub fn rows(&self) -> Option<usize> {
        self.placed.as_ref().map(Vec::len)
    }

    /// Bytes of its matrices and vectors.
    pub fn bytes(&self) -> u64 {
        let Maps { encoder, decoder, bias, .. } = &self.maps;
        let placed = self.rows().unwrap_or(0) * size_of::<u32>();
        (encoder.as_ref().map_or(0, BlobMatrix::bytes) + decoder.bytes() + size_of_val(&bias[..]) + placed) as u64
    }
}

/// Moves the scores of rows, `[tokens, rows]` at the beginning of `scores`, to their neurons in `[tokens, width]`: from the last to the
/// first, so that none is overwritten before it has moved. What is of no row becomes minus infinity.
fn spread(scores: &mut [f32], neurons: &[u32], width: usize) {
    for token in (0..scores.len() / width).rev() {
        let mut end = (token + 1) * width;
        for (row, neuron) in neurons.iter().enumerate().rev() {
            let at = token * width + *neuron as usize;
            let score = scores[token * neurons.len() + row];
            scores[at + 1..end].fill(f32::NEG_INFINITY);
            scores[at] = score;
            end = at;
        }
        scores[token * width..end].fill(f32::NEG_INFINITY);
    }
}

impl Maps {
    /// Scores `[tokens, rows]`.
    fn scores(
        &mut self,
        threads: &Threads,
        inputs: &[f32],
        tokens: usize,
        scores: &mut [f32],
        mut piece: Option<&mut MatmulScratch>,
    ) {
        match &self.encoder {
            None => self.decoder.apply(threads, inputs, tokens, scores, piece),
            Some(encoder) => {
                // Grows with the first step of this many tokens.
                self.middle.resize(self.middle.len().max(tokens * encoder.rows), 0.0);
                let middle = &mut self.middle[..tokens * encoder.rows];
                encoder.apply(threads, inputs, tokens, middle, piece.as_deref_mut());
                if self.relu {
                    middle.iter_mut().for_each(|h| *h = h.max(0.0));
                }
                self.decoder.apply(threads, middle, tokens, scores, piece);
            }
        }
        for scores in scores.chunks_exact_mut(self.bias.len().max(1)) {
            scores.iter_mut().zip(&self.bias).for_each(|(score, bias)| *score += bias);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_of_rows_come_to_their_neurons() {
        for neurons in [&[0, 1, 2, 3, 4][..], &[0, 4], &[4], &[1, 2], &[]] {
            for tokens in 0..4 {
                let rows = neurons.len();
                let mut scores: Vec<f32> = (0..tokens * 5).map(|i| i as f32).collect();
                spread(&mut scores, neurons, 5);
                for (at, score) in scores.iter().enumerate() {
                    let row = neurons.iter().position(|neuron| *neuron as usize == at % 5);
                    assert_eq!(*score, row.map_or(f32::NEG_INFINITY, |row| (at / 5 * rows + row) as f32));
                }
            }
        }
    }
}
