//! One layer of a bundle: its records in storage order, quantised where that is asked for.

use flashlm::tensors::element;
use flashlm_formats::bundle::{BundleError, FlashLayout, LayoutOptions};
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::ids::NeuronId;
use flashlm_formats::model::DType;
use flashlm_formats::weight_format::{SCALE_BYTES, WeightFormat};
use flashlm_kernels::to_f32;
use rayon::prelude::*;

use super::PackError;
use crate::quantise::{NotFinite, Squares, quantise_rows};
use crate::records::fill_layer;
use crate::rounding::{Rounded, RoundedRows, neurons_of};

/// What a layer becomes: its groups, and the scales of its records.
#[derive(Default)]
pub(super) struct Layer {
    pub(super) records: Vec<u8>,
    pub(super) scales: Vec<u8>,
    /// What quantising the records cost.
    pub(super) lost: Squares,
}

/// Puts layers together.
pub(super) struct LayerMaker<'a> {
    checkpoint: &'a Checkpoint,
    layout: FlashLayout,
    /// How records are quantised, if they are.
    format: Option<WeightFormat>,
    /// Records that were rounded before.
    rounded: Option<&'a Rounded>,
    /// The records before that.
    plain: Vec<u8>,
}

impl<'a> LayerMaker<'a> {
    pub(super) fn new(
        checkpoint: &'a Checkpoint,
        layout: FlashLayout,
        format: Option<WeightFormat>,
        rounded: Option<&'a Rounded>,
    ) -> Self {
        Self { checkpoint, layout, format, rounded, plain: Vec::new() }
    }

    /// Makes `layer` in this order; `seen` is handed the source's rows.
    pub(super) fn make(
        &mut self,
        layer: usize,
        order: &[NeuronId],
        made: &mut Layer,
        seen: &mut dyn FnMut(&[u8]),
    ) -> Result<(), PackError> {
        let Self { checkpoint, layout, format, rounded, plain } = self;
        made.records.resize(layout.layer_bytes(), 0);
        let Some(format) = *format else {
            return Ok(fill_layer(checkpoint, layer, layout, order, &mut made.records, seen)?);
        };
        let (spec, dtype) = (checkpoint.spec(), checkpoint.ffn_dtype());
        let before = FlashLayout::new(spec, dtype, LayoutOptions::default()).map_err(BundleError::from)?;
        plain.resize(before.layer_bytes(), 0);
        fill_layer(checkpoint, layer, &before, order, plain, seen)?;
        let row_scales = format.scales(spec.hidden_size) * SCALE_BYTES;
        let record_scales = spec.ffn().vectors() * row_scales;
        made.scales.resize(spec.ffn().size * record_scales, 0);
        let rounded = rounded.map_or(Ok(None), |rounded| rounded.rows(&neurons_of(layer), format));
        let rounded = rounded.map_err(PackError::Rounded)?;
        let groups = made.records.par_chunks_mut(layout.group_bytes());
        let scales = made.scales.par_chunks_mut(layout.records_per_group() * record_scales);
        let lost = groups.zip(scales).enumerate().map_init(
            || vec![0f32; spec.hidden_size],
            |row, (group, (records, scales))| {
                let mut lost = Squares::default();
                let positions = layout.positions_of(group);
                records[layout.group_padding(group)].fill(0);
                let rows = scales.chunks_exact_mut(row_scales);
                let places = positions.flat_map(|p| (0..spec.ffn().vectors()).map(move |vector| (p, vector)));
                for ((position, vector), scales) in places.zip(rows) {
                    let to = layout.vector_offset(position, vector) - layout.group_offset(group);
                    let values = &mut records[to..to + layout.row_bytes()];
                    if let Some(rounded) = &rounded {
                        let row = order[position].index() * spec.ffn().vectors() + vector;
                        values.copy_from_slice(&rounded.values[row * values.len()..][..values.len()]);
                        scales.copy_from_slice(&rounded.scales[row * row_scales..][..row_scales]);
                        continue;
                    }
                    let from = before.vector_offset(position, vector);
                    to_f32(element(dtype), &plain[from..from + before.row_bytes()], row);
                    lost += quantise_rows(format, row, row.len(), values, scales)?;
                }
                Ok(lost)
            },
        );
        // Summed in order: threads change no digit.
        let lost: Result<Vec<Squares>, NotFinite> = lost.collect();
        let lost = lost.map_err(|NotFinite| PackError::NotFinite { what: format!("the FFN of layer {layer}") })?;
        made.lost = rounded.map_or_else(|| lost.into_iter().sum(), |rounded| rounded.lost);
        Ok(())
    }
}

/// The values and the scales of a matrix whose rows have `cols` elements of `dtype`, and what they cost.
pub(super) fn quantise_matrix(
    format: WeightFormat,
    dtype: DType,
    bytes: &[u8],
    cols: usize,
) -> Result<RoundedRows, NotFinite> {
    /// Rows that a task takes.
    const ROWS: usize = 64;
    let (row_bytes, row_scales) = (format.row_bytes(cols), format.scales(cols) * SCALE_BYTES);
    let rows = bytes.len() / (cols * dtype.bytes());
    let (mut values, mut scales) = (vec![0; rows * row_bytes], vec![0; rows * row_scales]);
    let places = values.par_chunks_mut(ROWS * row_bytes).zip(scales.par_chunks_mut(ROWS * row_scales));
    let lost = bytes.par_chunks(ROWS * cols * dtype.bytes()).zip(places).map_init(Vec::new, |plain, (rows, to)| {
        plain.resize(rows.len() / dtype.bytes(), 0f32);
        to_f32(element(dtype), rows, plain);
        quantise_rows(format, plain, cols, to.0, to.1)
    });
    let lost: Vec<Squares> = lost.collect::<Result<_, _>>()?;
    Ok(RoundedRows { values, scales, lost: lost.into_iter().sum() })
}

/// Bytes of groups that are written at once: about 4 MiB.
pub(super) fn groups_at_once(layout: &FlashLayout) -> usize {
    ((4 << 20) / layout.group_bytes()).max(1) * layout.group_bytes()
}

/// The layer whose gate or up bias a canonical name is: they are in storage order, like the records.
pub(super) fn neuron_bias_layer(name: &str) -> Option<usize> {
    let (layer, which) = name.strip_prefix("layers.")?.split_once(".ffn.")?;
    matches!(which, "gate_bias" | "up_bias").then(|| layer.parse().ok())?
}

/// Puts equally long elements into storage order.
pub(super) fn permute(bytes: &mut [u8], order: &[NeuronId]) {
    let element = bytes.len() / order.len();
    let old = bytes.to_vec();
    for (to, &from) in bytes.chunks_exact_mut(element).zip(order) {
        to.copy_from_slice(&old[from.index() * element..][..element]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_move_to_their_storage_position() {
        let mut bytes = vec![0, 0, 1, 1, 2, 2];
        permute(&mut bytes, &[2, 0, 1].map(NeuronId));
        assert_eq!(bytes, [2, 2, 0, 0, 1, 1]);
    }

    #[test]
    fn only_biases_of_neurons_are_permuted() {
        assert_eq!(neuron_bias_layer("layers.12.ffn.up_bias"), Some(12));
        assert_eq!(neuron_bias_layer("layers.3.ffn.gate_bias"), Some(3));
        assert_eq!(neuron_bias_layer("layers.12.ffn.down_bias"), None);
    }
}
