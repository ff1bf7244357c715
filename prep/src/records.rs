//! A layer's FFN projections, rearranged into neuron records.

use flashlm_formats::bundle::FlashLayout;
use flashlm_formats::checkpoint::{Checkpoint, CheckpointError, FfnMatrix};

/// Rows of the down projection that are read at a time, in bytes.
const DOWN_BYTES: usize = 16 << 20;
/// Edge of the square tiles in which the down projection is transposed, in elements.
const TILE: usize = 32;

/// Fills `out` (`layout.layer_bytes()` long) with the records of `layer`; record `p` is of neuron `order[p]`. Padding becomes zero.
/// `seen` is shown the source's bytes, in the source's order.
pub fn fill_layer(
    checkpoint: &Checkpoint,
    layer: usize,
    layout: &FlashLayout,
    order: &[u32],
    out: &mut [u8],
    seen: &mut dyn FnMut(&[u8]),
) -> Result<(), CheckpointError> {
    let (spec, dtype) = (checkpoint.spec(), checkpoint.ffn_dtype());
    let row_bytes = layout.row_bytes();
    for group in 0..layout.groups() {
        let padding = layout.group_padding(group);
        let start = layout.group_offset(group);
        out[start + padding.start..start + padding.end].fill(0);
    }
    let rows: &[FfnMatrix] = if spec.ffn.gated { &[FfnMatrix::Gate, FfnMatrix::Up] } else { &[FfnMatrix::Up] };
    let mut place = vec![0usize; order.len()];
    for (position, &neuron) in order.iter().enumerate() {
        place[neuron as usize] = position;
    }
    let mut buffer = Vec::new();
    let neurons_at_once = (DOWN_BYTES / row_bytes).max(1);
    for (vector, &matrix) in rows.iter().enumerate() {
        let mut first = 0;
        while first < spec.ffn.size {
            let end = (first + neurons_at_once).min(spec.ffn.size);
            checkpoint.read_ffn_rows(layer, matrix, first..end, &mut buffer)?;
            seen(&buffer);
            for (row, neuron) in buffer.chunks_exact(row_bytes).zip(first..end) {
                let at = layout.vector_offset(place[neuron], vector);
                out[at..at + row_bytes].copy_from_slice(row);
            }
            first = end;
        }
    }
    let down = rows.len();
    let source_row = spec.ffn.size * dtype.bytes();
    let outputs_at_once = (DOWN_BYTES / source_row).max(TILE);
    let mut first = 0;
    while first < spec.hidden_size {
        let end = (first + outputs_at_once).min(spec.hidden_size);
        checkpoint.read_ffn_rows(layer, FfnMatrix::Down, first..end, &mut buffer)?;
        seen(&buffer);
        match dtype.bytes() {
            2 => transpose::<2>(&buffer, source_row, first, layout, &place, down, out),
            _ => transpose::<4>(&buffer, source_row, first, layout, &place, down, out),
        }
        first = end;
    }
    Ok(())
}

/// Puts rows of the down projection (outputs `first..`) as columns into the records, in tiles that stay in the cache.
fn transpose<const BYTES: usize>(
    rows: &[u8],
    row_bytes: usize,
    first: usize,
    layout: &FlashLayout,
    place: &[usize],
    vector: usize,
    out: &mut [u8],
) {
    let count = rows.len() / row_bytes;
    for neurons in (0..place.len()).step_by(TILE) {
        let neurons = neurons..(neurons + TILE).min(place.len());
        for outputs in (0..count).step_by(TILE) {
            let outputs = outputs..(outputs + TILE).min(count);
            for neuron in neurons.clone() {
                let at = layout.vector_offset(place[neuron], vector) + (first + outputs.start) * BYTES;
                let column = &mut out[at..at + outputs.len() * BYTES];
                for (to, output) in column.chunks_exact_mut(BYTES).zip(outputs.clone()) {
                    let from = output * row_bytes + neuron * BYTES;
                    to.copy_from_slice(&rows[from..from + BYTES]);
                }
            }
        }
    }
}
