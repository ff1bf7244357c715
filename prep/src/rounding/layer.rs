//! The matrices of one layer, rounded for inputs of known moments.

use flashlm::tensors::element;
use flashlm_formats::bundle::{BundleError, FlashLayout, LayoutOptions};
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::ids::NeuronId;
use flashlm_formats::weight_format::{SCALE_BYTES, WeightFormat};
use flashlm_kernels::to_f32;

use super::inputs::{LayerInputs, Moments};
use super::{RoundedRows, RoundingError};
use crate::quantise::{Metric, NotFinite, Squares, quantise_columns_for, quantise_rows_for};
use crate::records::fill_layer;

/// Rows that are numbers at a time.
const ROWS: usize = 1024;
/// Damping of the down projection's inputs: activations have so many dimensions that little text says too much of their moments.
const DOWN_DAMPING: f32 = 0.1;

/// A layer whose weights are to be rounded.
pub(super) struct LayerRounding<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) layer: usize,
}

impl LayerRounding<'_> {
    /// A resident matrix, for inputs of these moments.
    pub(super) fn matrix(
        &self,
        name: &str,
        format: WeightFormat,
        moments: Moments,
    ) -> Result<RoundedRows, RoundingError> {
        let cols = moments.d;
        let metric = metric(moments.whole(), cols, Metric::DAMPING, || name.to_owned())?;
        let dtype = self.checkpoint.resident(name)?.dtype;
        let mut bytes = Vec::new();
        self.checkpoint.read_resident(name, &mut bytes)?;
        let (row_bytes, row_scales) = (format.row_bytes(cols), format.scales(cols) * SCALE_BYTES);
        let count = bytes.len() / (cols * dtype.bytes());
        let mut rounded = RoundedRows::new(count * row_bytes, count * row_scales);
        let (mut rows, mut before) = (Vec::new(), Vec::new());
        let places = rounded.values.chunks_mut(ROWS * row_bytes).zip(rounded.scales.chunks_mut(ROWS * row_scales));
        for (bytes, (values, scales)) in bytes.chunks(ROWS * cols * dtype.bytes()).zip(places) {
            rows.resize(bytes.len() / dtype.bytes(), 0.0);
            to_f32(element(dtype), bytes, &mut rows);
            before.clone_from(&rows);
            let done = quantise_rows_for(&metric, format, &mut rows, values, scales);
            done.map_err(|NotFinite| RoundingError::NotFinite { what: name.to_owned() })?;
            rounded.lost += Squares::between(&before, &rows);
        }
        Ok(rounded)
    }

    /// The records of all neurons, in the checkpoint's order.
    pub(super) fn neurons(&self, format: WeightFormat, inputs: LayerInputs) -> Result<RoundedRows, RoundingError> {
        let Self { checkpoint, layer } = *self;
        let (spec, dtype) = (checkpoint.spec(), checkpoint.ffn_dtype());
        let (cols, neurons, vectors) = (spec.hidden_size, spec.ffn().size, spec.ffn().vectors());
        let layout = FlashLayout::new(spec, dtype, LayoutOptions::default()).map_err(BundleError::from)?;
        let mut records = vec![0; layout.layer_bytes()];
        let order: Vec<NeuronId> = (0..neurons as u32).map(NeuronId).collect();
        fill_layer(checkpoint, layer, &layout, &order, &mut records, &mut |_| ())?;
        let what = || format!("the FFN of layer {layer}");
        let LayerInputs { ffn, down, .. } = inputs;

        let mut to = Records::new(format, cols, neurons, vectors);
        let mut rows = Vec::new();
        let read = |neurons: &[usize], vector: usize, rows: &mut Vec<f32>| {
            rows.resize(neurons.len() * cols, 0.0);
            for (row, &neuron) in rows.chunks_exact_mut(cols).zip(neurons) {
                to_f32(element(dtype), &records[layout.vector_offset(neuron, vector)..][..layout.row_bytes()], row);
            }
        };
        let for_inputs = metric(ffn.expect("asked for").whole(), cols, Metric::DAMPING, what)?;
        for first in (0..neurons).step_by(ROWS) {
            let some: Vec<usize> = (first..(first + ROWS).min(neurons)).collect();
            for vector in 0..vectors - 1 {
                read(&some, vector, &mut rows);
                to.round(&some, vector, &mut rows, |rows, values, scales| {
                    quantise_rows_for(&for_inputs, format, rows, values, scales)
                })
                .map_err(|NotFinite| RoundingError::NotFinite { what: what() })?;
            }
        }
        drop(for_inputs);
        let mut first = 0;
        for moments in down {
            let d = moments.d;
            let (moments, by_size) = falling(&moments.whole(), d);
            let metric = metric(moments, d, DOWN_DAMPING, what)?;
            let some: Vec<usize> = by_size.iter().map(|neuron| first + neuron).collect();
            read(&some, vectors - 1, &mut rows);
            to.round(&some, vectors - 1, &mut rows, |rows, values, scales| {
                quantise_columns_for(&metric, format, rows, cols, values, scales)
            })
            .map_err(|NotFinite| RoundingError::NotFinite { what: what() })?;
            first += d;
        }
        Ok(to.rounded)
    }
}

fn metric(moments: Vec<f32>, d: usize, damping: f32, what: impl Fn() -> String) -> Result<Metric, RoundingError> {
    Metric::new(&moments, d, damping).ok_or_else(|| RoundingError::Inputs { what: what() })
}

/// The moments of inputs in falling order of their size, and which comes when: what is rounded last has nobody to make up for it.
fn falling(moments: &[f32], d: usize) -> (Vec<f32>, Vec<usize>) {
    let mut order: Vec<usize> = (0..d).collect();
    order.sort_by(|&a, &b| moments[b * d + b].total_cmp(&moments[a * d + a]));
    let ordered = order.iter().flat_map(|i| order.iter().map(move |j| moments[i * d + j])).collect();
    (ordered, order)
}

impl RoundedRows {
    fn new(values: usize, scales: usize) -> Self {
        Self { values: vec![0; values], scales: vec![0; scales], lost: Squares::default() }
    }
}

/// Records, while they are filled.
struct Records {
    rounded: RoundedRows,
    vectors: usize,
    row_bytes: usize,
    row_scales: usize,
}

impl Records {
    fn new(format: WeightFormat, cols: usize, neurons: usize, vectors: usize) -> Self {
        let (row_bytes, row_scales) = (format.row_bytes(cols), format.scales(cols) * SCALE_BYTES);
        let rows = neurons * vectors;
        Self { rounded: RoundedRows::new(rows * row_bytes, rows * row_scales), vectors, row_bytes, row_scales }
    }

    /// Rounds one row of each of some neurons by `how`, and puts it into their records.
    fn round(
        &mut self,
        neurons: &[usize],
        vector: usize,
        rows: &mut [f32],
        how: impl FnOnce(&mut [f32], &mut [u8], &mut [u8]) -> Result<(), NotFinite>,
    ) -> Result<(), NotFinite> {
        let Self { rounded, vectors, row_bytes, row_scales } = self;
        let (mut values, mut scales) = (vec![0; neurons.len() * *row_bytes], vec![0; neurons.len() * *row_scales]);
        let before = rows.to_vec();
        how(rows, &mut values, &mut scales)?;
        rounded.lost += Squares::between(&before, rows);
        let parts = values.chunks_exact(*row_bytes).zip(scales.chunks_exact(*row_scales));
        for (neuron, (values, scales)) in neurons.iter().zip(parts) {
            let row = neuron * *vectors + vector;
            rounded.values[row * *row_bytes..][..*row_bytes].copy_from_slice(values);
            rounded.scales[row * *row_scales..][..*row_scales].copy_from_slice(scales);
        }
        Ok(())
    }
}
