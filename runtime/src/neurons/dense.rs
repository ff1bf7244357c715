//! The FFN's arithmetic over consecutive neurons: what every source that has them all in a row computes with.
//!
//! The order of every sum is the storage order of the neurons, whatever the blocks: the sources agree to the bit.

use std::ops::Range;

use flashlm_formats::ids::Position;
use flashlm_formats::model::Ffn;
use flashlm_kernels::{
    MatmulScratch, Matrix, RowTokens, Threads, add_scaled_rows, add_scaled_rows_serial, matmul, matmul_rows_add,
    matvec, matvec_each, selected_add, selected_dots,
};

use super::activation::activate;
use super::chosen::Chosen;
use super::hook::Activations;
use super::params::NeuronParams;
use super::records::NeuronBlock;
use super::scratch::{FfnScratch, SPARSE, neurons_at_once};
use super::selection::Selection;
use super::source::{Arithmetic, FfnCall};
use crate::error::Result;

/// Adds the output of every neuron in `block` to `call.output`.
pub fn dense(ffn: &Ffn, call: &mut FfnCall<'_, '_>, params: &NeuronParams, block: NeuronBlock<'_>) -> Result<()> {
    let step = neurons_at_once(call.inputs.tokens);
    let mut start = 0;
    while start < block.count {
        let mut end = (start + step).min(block.count);
        match call.selection {
            Some(selection) if call.hook.is_none() && !selection.is_all() => match call.inputs.arithmetic {
                Arithmetic::Each => chosen_piece(ffn, call, params, block, selection, start..end),
                Arithmetic::Piece => {
                    let neurons = block.first + start..block.first + block.count;
                    end = selection.end_of(call.inputs.tokens, neurons, call.scratch.pairs) - block.first;
                    selected_piece(ffn, call, params, block, selection, start..end);
                }
            },
            _ => dense_piece(ffn, call, params, block, start, end - start)?,
        }
        start = end;
    }
    Ok(())
}

/// The selected neurons of a few tokens alone; the same bits as with the others taken for zero.
fn chosen_piece(
    ffn: &Ffn,
    call: &mut FfnCall<'_, '_>,
    params: &NeuronParams,
    block: NeuronBlock<'_>,
    selection: &Selection,
    rows: Range<usize>,
) {
    let (first, hidden, tokens) = (block.first, call.inputs.hidden(), call.inputs.tokens);
    let FfnScratch { chosen, batch, .. } = &mut *call.scratch;
    let row = |_: usize, neuron: Position, vector: usize| {
        let matrix = match vector {
            0 => block.gate.unwrap_or(block.up),
            1 if block.gate.is_some() => block.up,
            _ => block.down,
        };
        matrix.row(neuron.index() - first)
    };
    for start in (0..tokens).step_by(*batch) {
        let tokens = start..(start + *batch).min(tokens);
        let span = tokens.start * hidden..tokens.end * hidden;
        chosen.choice.take(selection, tokens, first + rows.start..first + rows.end);
        let (threads, biases, input) = (call.threads, params.biases(), &call.inputs.values[span.clone()]);
        let neurons = Chosen { ffn, element: block.up.element(), threads, biases, input, hidden, row: &row };
        let all = 0..chosen.choice.len() as u32;
        chosen.ready.clear();
        chosen.ready.extend(all.clone());
        neurons.activations(chosen);
        neurons.add_down(all, chosen, &mut call.output[span]);
    }
}

/// Each neuron with those tokens of a piece that selected it; a token's bits do not depend on the others.
fn selected_piece(
    ffn: &Ffn,
    call: &mut FfnCall<'_, '_>,
    params: &NeuronParams,
    block: NeuronBlock<'_>,
    selection: &Selection,
    rows: Range<usize>,
) {
    selected_activations(ffn, call, params, block, selection, rows.clone());
    let FfnScratch { active, row_starts, .. } = &*call.scratch;
    selected_add(call.threads, block.down.rows_range(rows), active, row_starts, call.output);
}

/// The activations of selected neurons that are not zero, token after token: `active` and `row_starts` of the scratch.
fn selected_activations(
    ffn: &Ffn,
    call: &mut FfnCall<'_, '_>,
    params: &NeuronParams,
    block: NeuronBlock<'_>,
    selection: &Selection,
    rows: Range<usize>,
) {
    let (threads, biases, input, tokens) = (call.threads, params.biases(), call.inputs.values, call.inputs.tokens);
    let FfnScratch { activations, gates, active, row_starts, selected, selected_starts: starts, matmul, .. } =
        &mut *call.scratch;
    let neurons = block.first + rows.start..block.first + rows.end;
    selection.by_neuron(tokens, neurons.clone(), starts, selected);
    let mut dots = |w: Matrix<'_>, bias: Option<&[f32]>, starts: &[u32], selected: &[u16], y: &mut [f32]| {
        let pairs = RowTokens { starts, tokens: selected };
        selected_dots(threads, w.rows_range(rows.clone()), pairs, input, y, matmul);
        let Some(bias) = bias else { return };
        for (bias, span) in bias[neurons.clone()].iter().zip(starts.windows(2)) {
            y[span[0] as usize..span[1] as usize].iter_mut().for_each(|y| *y += bias);
        }
    };
    let activations = match block.gate {
        None => {
            let up = &mut activations[..selected.len()];
            dots(block.up, biases.up, starts, selected, up);
            activate(ffn.activation, up);
            up
        }
        Some(gate) => {
            let gates = &mut gates[..selected.len()];
            dots(gate, biases.gate, starts, selected, gates);
            activate(ffn.activation, gates);
            // Where the gate is zero the other factor does not matter.
            keep_nonzero(starts, selected, gates);
            let up = &mut activations[..selected.len()];
            dots(block.up, biases.up, starts, selected, up);
            if ffn.up_activated {
                activate(ffn.activation, up);
            }
            up.iter_mut().zip(&*gates).for_each(|(up, gate)| *up *= gate);
            up
        }
    };
    by_token(tokens, starts, selected, activations, active, row_starts);
}

/// Removes the pairs of a neuron and a token whose value is zero.
fn keep_nonzero(starts: &mut [u32], tokens: &mut Vec<u16>, values: &mut [f32]) {
    let (mut kept, mut begin) = (0, 0);
    for neuron in 1..starts.len() {
        let end = starts[neuron] as usize;
        for at in begin..end {
            if values[at] != 0.0 {
                (tokens[kept], values[kept]) = (tokens[at], values[at]);
                kept += 1;
            }
        }
        (begin, starts[neuron]) = (end, kept as u32);
    }
    tokens.truncate(kept);
}

/// Activations that are not zero, given by neuron, token after token with their neurons.
fn by_token(
    tokens: usize,
    starts: &[u32],
    selected: &[u16],
    values: &[f32],
    active: &mut Vec<(u32, f32)>,
    row_starts: &mut Vec<usize>,
) {
    row_starts.clear();
    row_starts.resize(tokens + 1, 0);
    let pairs = || selected.iter().zip(values).filter(|(_, value)| **value != 0.0);
    pairs().for_each(|(token, _)| row_starts[usize::from(*token) + 1] += 1);
    (1..row_starts.len()).for_each(|token| row_starts[token] += row_starts[token - 1]);
    active.clear();
    active.resize(row_starts[tokens], (0, 0.0));
    for (neuron, span) in starts.windows(2).enumerate() {
        let span = span[0] as usize..span[1] as usize;
        for (token, value) in selected[span.clone()].iter().zip(&values[span]).filter(|(_, value)| **value != 0.0) {
            let at = &mut row_starts[usize::from(*token)];
            active[*at] = (neuron as u32, *value);
            *at += 1;
        }
    }
    // Each token's begin moved to its end, which is where the next one's was.
    row_starts.copy_within(0..tokens, 1);
    row_starts[0] = 0;
}

fn dense_piece(
    ffn: &Ffn,
    call: &mut FfnCall<'_, '_>,
    params: &NeuronParams,
    block: NeuronBlock<'_>,
    start: usize,
    count: usize,
) -> Result<()> {
    let (inputs, threads, biases) = (call.inputs, call.threads, params.biases());
    let (tokens, arithmetic) = (inputs.tokens, inputs.arithmetic);
    // Who watches sees all neurons, and of the selected ones what is computed when nobody watches.
    let selected = call.selection.filter(|s| arithmetic == Arithmetic::Piece && !s.is_all());
    if let Some(selection) = selected {
        selected_activations(ffn, call, params, block, selection, start..start + count);
    }
    let product = |w: Matrix<'_>, y: &mut [f32], scratch: &mut MatmulScratch| {
        product(threads, w, inputs.values, (tokens, arithmetic), y, scratch);
    };
    let FfnScratch { activations, gates, active, row_starts, matmul: scratch, .. } = &mut *call.scratch;
    let activations = &mut activations[..tokens * count];
    let neurons = block.first + start..block.first + start + count;
    let rows = start..start + count;
    let position = |at: usize| Position((neurons.start + at) as u32);

    product(block.up.rows_range(rows.clone()), activations, scratch);
    let add_bias = |bias: Option<&[f32]>, values: &mut [f32]| {
        let Some(bias) = bias else { return };
        for row in values.chunks_exact_mut(count) {
            row.iter_mut().zip(&bias[neurons.clone()]).for_each(|(a, b)| *a += b);
        }
    };
    add_bias(biases.up, activations);
    if let Some(gate) = block.gate {
        if ffn.up_activated {
            activate(ffn.activation, activations);
        }
        let gates = &mut gates[..tokens * count];
        product(gate.rows_range(rows.clone()), gates, scratch);
        add_bias(biases.gate, gates);
        activate(ffn.activation, gates);
        activations.iter_mut().zip(gates.iter()).for_each(|(a, g)| *a *= g);
    } else {
        activate(ffn.activation, activations);
    }
    if let Some(selection) = selected {
        zero(activations, count, |token, at| selection.contains(token, position(at)));
        for (token, row) in activations.chunks_exact_mut(count).enumerate() {
            let of_token = &active[row_starts[token]..row_starts[token + 1]];
            of_token.iter().for_each(|(at, value)| row[*at as usize] = *value);
        }
    }
    if let Some(hook) = &mut call.hook {
        let (layer, first, selection) = (call.layer, neurons.start, call.selection);
        hook.activations(&mut Activations { layer, first, count, values: activations, selection })?;
    }
    if let Some(selection) = call.selection {
        for (token, row) in activations.chunks_exact_mut(count).enumerate() {
            for (neuron, a) in neurons.clone().zip(row) {
                *a = if selection.contains(token, Position(neuron as u32)) { *a } else { 0.0 };
            }
        }
    }
    let down = block.down.rows_range(rows);
    // Adding rows that are zero changes no bit, so both ways give the same.
    let nonzero = activations.iter().filter(|a| **a != 0.0).count();
    if tokens > 1 && nonzero * SPARSE > activations.len() {
        matmul_rows_add(threads, down, activations, count, tokens, call.output, scratch);
        return Ok(());
    }
    active.clear();
    active.extend(activations.iter().enumerate().filter(|(_, a)| **a != 0.0).map(|(i, a)| ((i % count) as u32, *a)));
    if tokens == 1 {
        add_scaled_rows(threads, down, active, call.output);
        return Ok(());
    }
    let hidden = call.output.len() / tokens;
    row_starts.clear();
    row_starts.push(0);
    for row in activations.chunks_exact(count) {
        let last = row_starts[row_starts.len() - 1];
        row_starts.push(last + row.iter().filter(|a| **a != 0.0).count());
    }
    let (active, row_starts) = (&*active, &*row_starts);
    threads.chunks_mut(call.output, hidden, &|token, output| {
        add_scaled_rows_serial(down, &active[row_starts[token]..row_starts[token + 1]], output);
    });
    Ok(())
}

/// Zeroes the activations `[tokens, count]` for which `of` holds.
fn zero(activations: &mut [f32], count: usize, of: impl Fn(usize, usize) -> bool) {
    for (token, row) in activations.chunks_exact_mut(count).enumerate() {
        row.iter_mut().enumerate().filter(|(at, _)| of(token, *at)).for_each(|(_, a)| *a = 0.0);
    }
}

/// `y[t, r] = sum_c x[t, c] * w[r, c]`.
fn product(
    threads: &Threads,
    w: Matrix<'_>,
    x: &[f32],
    (tokens, arithmetic): (usize, Arithmetic),
    y: &mut [f32],
    scratch: &mut MatmulScratch,
) {
    match arithmetic {
        _ if tokens == 1 => matvec(threads, w, x, y),
        Arithmetic::Each => matvec_each(threads, w, x, tokens, y, &mut || {}),
        Arithmetic::Piece => matmul(threads, w, x, tokens, y, w.rows(), scratch),
    }
}
