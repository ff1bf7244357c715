//! A layer's FFN projections, rearranged into neuron records.

use flashlm_formats::bundle::FlashLayout;
use flashlm_formats::checkpoint::{Checkpoint, CheckpointError, FfnMatrix};
use flashlm_formats::ids::NeuronId;

/// Rows of the down projection that are read at a time, in bytes.
const DOWN_BYTES: usize = 16 << 20;
/// Edge of the square tiles in which the down projection is transposed, in elements: a tile stays in the first cache.
const TILE: usize = 64;

/// Fills `out` (`layout.layer_bytes()` long) with the records of `layer`; record `p` is of neuron `order[p]`. Padding becomes zero.
/// `seen` is shown the source's bytes, in the source's order.
pub(crate) fn fill_layer(
    checkpoint: &Checkpoint,
    layer: usize,
    layout: &FlashLayout,
    order: &[NeuronId],
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
    let rows: &[FfnMatrix] = if spec.ffn().gated { &[FfnMatrix::Gate, FfnMatrix::Up] } else { &[FfnMatrix::Up] };
    let mut place = vec![0usize; order.len()];
    for (position, &neuron) in order.iter().enumerate() {
        place[neuron.index()] = position;
    }
    let mut buffer = Vec::new();
    let neurons_at_once = (DOWN_BYTES / row_bytes).max(1);
    for (vector, &matrix) in rows.iter().enumerate() {
        let mut first = 0;
        while first < spec.ffn().size {
            let end = (first + neurons_at_once).min(spec.ffn().size);
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
    let source_row = spec.ffn().size * dtype.bytes();
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

/// Puts rows of the down projection (outputs `first..`) as columns into the records, tile by tile.
///
/// A tile is first copied row by row: read in place, the rows of a matrix whose width is a power of two fall on the same few
/// cache sets and push each other out.
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
    let mut tile = [[[0; BYTES]; TILE]; TILE];
    for neuron in (0..place.len()).step_by(TILE) {
        let neurons = neuron..(neuron + TILE).min(place.len());
        for output in (0..count).step_by(TILE) {
            let outputs = output..(output + TILE).min(count);
            for (to, output) in tile.iter_mut().zip(outputs.clone()) {
                let from = &rows[output * row_bytes..][neurons.start * BYTES..neurons.end * BYTES];
                to[..neurons.len()].as_flattened_mut().copy_from_slice(from);
            }
            for (number, neuron) in neurons.clone().enumerate() {
                let at = layout.vector_offset(place[neuron], vector) + (first + output) * BYTES;
                let (column, _) = out[at..at + outputs.len() * BYTES].as_chunks_mut::<BYTES>();
                column.iter_mut().zip(&tile).for_each(|(to, row)| *to = row[number]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes that are no multiples of a tile, and groups with padding.
    fn columns_land_in_their_records<const BYTES: usize>(hidden: usize, neurons: usize, pieces: usize) {
        let layout = FlashLayout::with_records(neurons, 2, hidden * BYTES, 3, 512).unwrap();
        let down: Vec<u8> = (0..hidden * neurons * BYTES).map(|i| ((i * 31) ^ (i >> 8)) as u8).collect();
        let place: Vec<usize> = (0..neurons).map(|neuron| (neuron + 5) % neurons).collect();
        let mut out = vec![0; layout.layer_bytes()];
        let row_bytes = neurons * BYTES;
        for first in (0..hidden).step_by(pieces) {
            let end = (first + pieces).min(hidden);
            transpose::<BYTES>(
                &down[first * row_bytes..end * row_bytes],
                row_bytes,
                first,
                &layout,
                &place,
                1,
                &mut out,
            );
        }
        for neuron in 0..neurons {
            for output in 0..hidden {
                let expected = &down[output * row_bytes + neuron * BYTES..][..BYTES];
                let at = layout.vector_offset(place[neuron], 1) + output * BYTES;
                assert_eq!(&out[at..at + BYTES], expected, "neuron {neuron}, output {output} of {hidden}");
            }
        }
    }

    #[test]
    fn transposing_any_size() {
        for (hidden, neurons, pieces) in [(1, 1, 1), (64, 64, 64), (65, 63, 64), (130, 200, 50), (7, 129, 100)] {
            columns_land_in_their_records::<2>(hidden, neurons, pieces);
            columns_land_in_their_records::<4>(hidden, neurons, pieces);
        }
    }
}
