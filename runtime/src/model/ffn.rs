//! The feed-forward network, and the seam where its neurons come from.
//!
//! An [`FfnSource`] computes the FFN of one block: `resident` from memory, `streamed` by reading every neuron, `flash` by reading
//! the few that matter. All of them hand blocks of neuron records to the functions here, so the arithmetic is the same. The
//! order of every sum is the storage order of the neurons, whatever the blocks: the sources agree to the bit.

use std::ops::Range;

use flashlm_formats::bundle::{Bundle, FlashLayout};
use flashlm_formats::model::{Activation, Ffn, ModelSpec};
use flashlm_formats::weight_format::WeightFormat;
use flashlm_kernels::{
    MATMUL_TOKENS_MIN, MatmulScratch, Matrix, ROW_BLOCK, Row, RowLayout, SCALE_BYTES, Threads, add_scaled_rows,
    add_scaled_rows_serial, matmul, matmul_rows_add, matvec,
};

use serde::Serialize;

use super::chosen::Chosen;
use super::weights::{element, scale_group};
use crate::error::Result;

/// Computes the FFN of a block of the model.
pub trait FfnSource: Send {
    /// Adds the FFN's output to `call.output`.
    fn run(&mut self, call: FfnCall<'_>) -> Result<()>;

    /// Told a token's FFN input before its block's attention runs, where that is known: reads can begin.
    fn prepare(&mut self, _layer: usize, _input: &[f32], _threads: &Threads) -> Result<()> {
        Ok(())
    }

    /// Told, before a token's attention runs, what the FFN input would be without it: about what it will be. Nothing is decided
    /// by it, but reads can begin.
    fn foresee(&mut self, _layer: usize, _input: &[f32], _threads: &Threads) -> Result<()> {
        Ok(())
    }

    /// Called now and then while something else is computed, so that reads go on.
    fn poll(&mut self) -> Result<()> {
        Ok(())
    }

    /// How often the source asked for reads of each size, in bytes.
    fn read_sizes(&self) -> Vec<(u64, u64)> {
        Vec::new()
    }

    /// Bytes and device requests read so far.
    fn read_counters(&self) -> ReadCounters {
        ReadCounters::default()
    }
}

/// What a source has read from flash since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadCounters {
    /// Bytes that reached memory.
    pub bytes: u64,
    /// Device requests.
    pub reads: u64,
    /// Those of them that repeat one that failed.
    pub retries: u64,
    /// Nanoseconds spent waiting for them.
    pub wait_ns: u64,
    /// Nanoseconds spent on deciding what to read and where to.
    pub manage_ns: u64,
    /// Groups of neurons that were wanted, and those of them that were in memory already.
    pub wanted: u64,
    /// See `wanted`.
    pub hits: u64,
    /// Bytes read ahead that nobody wanted then.
    pub wasted_bytes: u64,
    /// Bytes of weights and predictors that computing touched.
    pub touched_bytes: u64,
}

impl ReadCounters {
    /// Both together.
    pub fn and(self, other: Self) -> Self {
        Self {
            bytes: self.bytes + other.bytes,
            reads: self.reads + other.reads,
            retries: self.retries + other.retries,
            wait_ns: self.wait_ns + other.wait_ns,
            manage_ns: self.manage_ns + other.manage_ns,
            wanted: self.wanted + other.wanted,
            hits: self.hits + other.hits,
            wasted_bytes: self.wasted_bytes + other.wasted_bytes,
            touched_bytes: self.touched_bytes + other.touched_bytes,
        }
    }

    /// What was added since `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            bytes: self.bytes - before.bytes,
            reads: self.reads - before.reads,
            retries: self.retries - before.retries,
            wait_ns: self.wait_ns - before.wait_ns,
            manage_ns: self.manage_ns - before.manage_ns,
            wanted: self.wanted - before.wanted,
            hits: self.hits - before.hits,
            wasted_bytes: self.wasted_bytes.saturating_sub(before.wasted_bytes),
            touched_bytes: self.touched_bytes - before.touched_bytes,
        }
    }
}

/// What a token, or the mean of several, read from flash and waited for, under the names that `--json` has everywhere.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ReadFigures {
    /// Bytes, as the device saw them.
    pub bytes_read_per_token: f64,
    /// Device requests.
    pub reads_per_token: f64,
    /// Bytes read ahead in vain.
    pub wasted_bytes_per_token: f64,
    /// Share of the wanted groups of neurons that were in memory already; 0 where none are looked up.
    pub hit_rate: f64,
    /// Waiting for reads.
    pub io_wait_ms: f64,
    /// Deciding what to read and where to.
    pub memory_management_ms: f64,
    /// Reads that failed and were repeated, in all.
    pub read_retries: u64,
}

impl ReadCounters {
    /// Means over so many tokens.
    pub fn per_token(self, tokens: usize) -> ReadFigures {
        let mean = |count: u64| count as f64 / tokens.max(1) as f64;
        ReadFigures {
            bytes_read_per_token: mean(self.bytes),
            reads_per_token: mean(self.reads),
            wasted_bytes_per_token: mean(self.wasted_bytes),
            hit_rate: self.hits as f64 / self.wanted.max(1) as f64,
            io_wait_ms: mean(self.wait_ns) / 1e6,
            memory_management_ms: mean(self.manage_ns) / 1e6,
            read_retries: self.retries,
        }
    }
}

/// Watches what goes through an FFN, for recording.
pub trait FfnObserver {
    /// The FFN's input, `[tokens, hidden]`.
    fn input(&mut self, layer: usize, tokens: usize, input: &[f32]) -> Result<()>;
    /// Activations `[tokens, count]` of the neurons from `first` on, before unselected ones are taken for zero.
    fn activations(&mut self, piece: &ObservedActivations<'_>) -> Result<()>;
}

/// Activations of some neurons.
pub struct ObservedActivations<'a> {
    /// Which block.
    pub layer: usize,
    /// The first neuron.
    pub first: usize,
    /// How many neurons.
    pub count: usize,
    /// `[tokens, count]`, as they enter the down projection's sum.
    pub values: &'a [f32],
    /// What will be computed, when a predictor chooses.
    pub selection: Option<&'a Selection>,
}

/// For every token the neurons that are computed; the others are taken for zero.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    words: Vec<u64>,
    words_per_token: usize,
}

impl Selection {
    /// Makes it empty, for `tokens` tokens and `neurons` neurons.
    pub fn reset(&mut self, tokens: usize, neurons: usize) {
        self.words_per_token = neurons.div_ceil(64);
        self.words.clear();
        self.words.resize(tokens * self.words_per_token, 0);
    }

    /// Selects the neurons of `token` whose score is above zero.
    pub fn select_positive(&mut self, token: usize, scores: &[f32]) {
        let words = &mut self.words[token * self.words_per_token..][..self.words_per_token];
        for (word, scores) in words.iter_mut().zip(scores.chunks(64)) {
            *word = scores.iter().enumerate().fold(0, |word, (bit, score)| word | u64::from(*score > 0.0) << bit);
        }
    }

    /// The selected neurons of `token` within `neurons`, ascending.
    pub fn of(&self, token: usize, neurons: Range<usize>) -> impl Iterator<Item = u32> + '_ {
        let words = &self.words[token * self.words_per_token..][..self.words_per_token];
        let range = neurons.start / 64..neurons.end.div_ceil(64);
        let bits = words[range.clone()].iter().zip(range).flat_map(|(&word, at)| {
            let mut left = word;
            std::iter::from_fn(move || {
                let bit = left.trailing_zeros();
                left &= left.wrapping_sub(1);
                (bit < 64).then_some(at as u32 * 64 + bit)
            })
        });
        bits.filter(move |neuron| neurons.contains(&(*neuron as usize)))
    }

    /// Bytes for so many tokens and neurons.
    pub fn bytes(tokens: usize, neurons: usize) -> u64 {
        (tokens * neurons.div_ceil(64) * 8) as u64
    }

    /// Whether `neuron` is computed for `token`.
    pub fn contains(&self, token: usize, neuron: usize) -> bool {
        self.words[token * self.words_per_token + neuron / 64] >> (neuron % 64) & 1 == 1
    }
}

/// One FFN call.
pub struct FfnCall<'a> {
    /// Which block.
    pub layer: usize,
    /// Tokens in this piece.
    pub tokens: usize,
    /// `[tokens, hidden]`, normalised.
    pub input: &'a [f32],
    /// `[tokens, hidden]`, added to.
    pub output: &'a mut [f32],
    /// Biases of the gate and up projections, in storage order.
    pub biases: FfnBiases<'a>,
    /// The scales of the neuron records, in storage order; empty where these have none.
    pub scales: &'a [u8],
    /// The threads to use.
    pub threads: &'a Threads,
    /// Memory for activations.
    pub scratch: &'a mut FfnScratch,
    /// Who watches.
    pub observer: Option<&'a mut (dyn FfnObserver + 'a)>,
    /// What is computed; all neurons without it.
    pub selection: Option<&'a Selection>,
    /// Activations of this magnitude and below are taken for zero: for measuring what leaving them out costs. Dense sources only.
    pub cutoff: f32,
}

/// What is added to a neuron's products before anything else, where the model has it; in storage order.
#[derive(Clone, Copy, Debug, Default)]
pub struct FfnBiases<'a> {
    /// Of the gate projection.
    pub gate: Option<&'a [f32]>,
    /// Of the up projection.
    pub up: Option<&'a [f32]>,
}

/// Activations of one piece of a block at a time.
pub struct FfnScratch {
    activations: Vec<f32>,
    gates: Vec<f32>,
    /// Activations that are not zero with their neurons, token after token, and where each token's begin.
    active: Vec<(u32, f32)>,
    row_starts: Vec<usize>,
    /// Neurons that were chosen for a token, as storage positions; places in that list, and results of those.
    chosen: Vec<u32>,
    ready: Vec<u32>,
    results: Vec<f32>,
    matmul: MatmulScratch,
}

/// Activations held at a time, as a count of f32.
const ACTIVATIONS: usize = 1 << 18;

/// With at most one activation in so many not zero, rows are added one by one instead of in a matrix product. Measured:
/// docs/performance.md.
const SPARSE: usize = 8;

impl FfnScratch {
    /// Scratch for pieces of up to `tokens` tokens.
    pub fn new(spec: &ModelSpec, tokens: usize) -> Self {
        let len = Self::len(spec, tokens);
        let chosen = spec.ffn.size.min(ACTIVATIONS);
        Self {
            activations: vec![0.0; len],
            gates: vec![0.0; if spec.ffn.gated { len } else { 0 }],
            active: Vec::with_capacity(spec.ffn.size.min(ACTIVATIONS).max(len / SPARSE)),
            row_starts: Vec::with_capacity(tokens + 1),
            chosen: Vec::with_capacity(chosen),
            ready: Vec::with_capacity(chosen),
            results: vec![0.0; chosen],
            matmul: MatmulScratch::default(),
        }
    }

    /// Room for what [`neurons_at_once`] allows of `tokens` tokens, or of fewer, which can be more.
    fn len(spec: &ModelSpec, tokens: usize) -> usize {
        room(spec.ffn.size, tokens)
    }

    /// Bytes of that scratch, once products on so many threads have made it as large as it gets.
    pub fn bytes(spec: &ModelSpec, tokens: usize, threads: usize) -> u64 {
        let floats = Self::len(spec, tokens) * (1 + usize::from(spec.ffn.gated));
        let active = spec.ffn.size.min(ACTIVATIONS).max(Self::len(spec, tokens) / SPARSE);
        let chosen = spec.ffn.size.min(ACTIVATIONS);
        // The longest input of a matrix product.
        let cols = spec.hidden_size.max(spec.attention.heads * spec.attention.head_dim);
        // Beside blocks: vectors rounded for rows of whole numbers, of a few tokens at a time.
        let products = MatmulScratch::bytes_needed(threads, tokens, cols) + MATMUL_TOKENS_MIN * cols * 4;
        (floats * 4 + active * 8 + (tokens + 1) * 8 + chosen * 12 + products) as u64
    }

    /// The scratch of matrix products.
    pub fn matmul(&mut self) -> &mut MatmulScratch {
        &mut self.matmul
    }
}

/// Activations of pieces of up to `tokens` tokens that are held at a time.
fn room(neurons: usize, tokens: usize) -> usize {
    ACTIVATIONS.max(ROW_BLOCK * tokens).min(neurons * tokens)
}

/// Neurons computed at once for pieces of `tokens`: a multiple of [`ROW_BLOCK`], so that sums do not depend on it.
fn neurons_at_once(tokens: usize) -> usize {
    (ACTIVATIONS / tokens.max(1) / ROW_BLOCK * ROW_BLOCK).max(ROW_BLOCK)
}

/// How neuron records lie in a layer, and how their rows are stored.
#[derive(Clone, Copy, Debug)]
pub struct Records {
    /// Where rows are.
    pub layout: FlashLayout,
    /// How they are stored.
    pub format: WeightFormat,
    /// Elements of a row.
    pub cols: usize,
}

impl Records {
    /// Those of a bundle.
    pub fn of(bundle: &Bundle) -> Self {
        Self { layout: *bundle.layout(), format: bundle.manifest().ffn.dtype, cols: bundle.spec().hidden_size }
    }

    /// Bytes of a row's scales.
    pub fn scale_bytes(&self) -> usize {
        self.format.scales(self.cols) * SCALE_BYTES
    }

    /// Row `vector` of the neuron at storage position `neuron`, whose group is `group`; `scales` are those of the layer.
    pub fn row<'a>(&self, group: &'a [u8], scales: &'a [u8], neuron: usize, vector: usize) -> Row<'a> {
        let (layout, row_bytes) = (&self.layout, self.layout.row_bytes());
        let start = neuron % layout.records_per_group() * layout.record_bytes() + vector * row_bytes;
        let values = &group[start..start + row_bytes];
        match scale_group(self.format) {
            None => values.into(),
            Some(of) => {
                let bytes = self.scale_bytes();
                Row::quantised(values, &scales[(neuron * layout.vectors() + vector) * bytes..][..bytes], of)
            }
        }
    }
}

/// Consecutive neurons of a block, as the bundle stores them.
#[derive(Clone, Copy)]
pub struct NeuronBlock<'a> {
    first: usize,
    count: usize,
    gate: Option<Matrix<'a>>,
    up: Matrix<'a>,
    down: Matrix<'a>,
}

impl<'a> NeuronBlock<'a> {
    /// The `count` neurons from `first` on that lie in `data`, which begins with the group that holds `first`. `scales` are those of
    /// the whole layer.
    pub fn new(records: &Records, data: &'a [u8], scales: &'a [u8], Range { start: first, end }: Range<usize>) -> Self {
        let Records { layout, format, cols } = records;
        let (count, row_bytes) = (end - first, layout.row_bytes());
        let scale_bytes = records.scale_bytes();
        let matrix = |vector: usize| {
            let rows = RowLayout {
                offset: vector * row_bytes,
                row_stride: layout.record_bytes(),
                rows_per_group: layout.records_per_group(),
                group_stride: layout.group_bytes(),
            };
            let matrix = Matrix::strided(element(*format), data, count, *cols, rows);
            let matrix = matrix.expect("a block of records holds whole groups");
            let Some(group) = scale_group(*format) else { return matrix };
            let scales = &scales[(first * layout.vectors() + vector) * scale_bytes..];
            matrix
                .with_scales(scales, layout.vectors() * scale_bytes, group)
                .expect("every row of a layer has its scales")
        };
        let up = layout.vectors() - 2;
        Self { first, count, gate: (up > 0).then(|| matrix(0)), up: matrix(up), down: matrix(up + 1) }
    }
}

/// Adds the output of every neuron in `block` to `call.output`.
pub fn dense(ffn: &Ffn, call: &mut FfnCall<'_>, block: NeuronBlock<'_>) -> Result<()> {
    let step = neurons_at_once(call.tokens);
    let mut start = 0;
    while start < block.count {
        let end = (start + step).min(block.count);
        let watched = call.observer.is_some() || call.cutoff > 0.0;
        match call.selection {
            Some(selection) if call.tokens < MATMUL_TOKENS_MIN && !watched => {
                chosen_piece(ffn, call, block, selection, start..end);
            }
            _ => dense_piece(ffn, call, block, start, end - start)?,
        }
        start = end;
    }
    Ok(())
}

/// The selected neurons of a few tokens alone; the same bits as with the others taken for zero.
fn chosen_piece(ffn: &Ffn, call: &mut FfnCall<'_>, block: NeuronBlock<'_>, selection: &Selection, rows: Range<usize>) {
    let FfnScratch { activations, chosen, ready, results, .. } = &mut *call.scratch;
    let hidden = call.input.len() / call.tokens;
    for token in 0..call.tokens {
        let span = token * hidden..(token + 1) * hidden;
        chosen.clear();
        let first = block.first;
        chosen.extend(selection.of(token, first + rows.start..first + rows.end));
        let row = |at: usize, vector: usize| {
            let matrix = match vector {
                0 => block.gate.unwrap_or(block.up),
                1 if block.gate.is_some() => block.up,
                _ => block.down,
            };
            matrix.row(chosen[at] as usize - first)
        };
        let (threads, biases, input) = (call.threads, call.biases, &call.input[span.clone()]);
        let neurons = Chosen { ffn, element: block.up.element(), threads, biases, input, neurons: chosen, row: &row };
        ready.clear();
        ready.extend(0..chosen.len() as u32);
        neurons.activations(ready, results, activations);
        neurons.add_down(0..chosen.len() as u32, activations, ready, results, &mut call.output[span]);
    }
}

fn dense_piece(ffn: &Ffn, call: &mut FfnCall<'_>, block: NeuronBlock<'_>, start: usize, count: usize) -> Result<()> {
    let (tokens, threads) = (call.tokens, call.threads);
    let FfnScratch { activations, gates, active, row_starts, matmul: scratch, .. } = &mut *call.scratch;
    let activations = &mut activations[..tokens * count];
    let neurons = block.first + start..block.first + start + count;
    let rows = start..start + count;

    product(threads, block.up.rows_range(rows.clone()), call.input, tokens, activations, scratch);
    let add_bias = |bias: Option<&[f32]>, values: &mut [f32]| {
        let Some(bias) = bias else { return };
        for row in values.chunks_exact_mut(count) {
            row.iter_mut().zip(&bias[neurons.clone()]).for_each(|(a, b)| *a += b);
        }
    };
    add_bias(call.biases.up, activations);
    if let Some(gate) = block.gate {
        if ffn.up_activated {
            activate(ffn.activation, activations);
        }
        let gates = &mut gates[..tokens * count];
        product(threads, gate.rows_range(rows.clone()), call.input, tokens, gates, scratch);
        add_bias(call.biases.gate, gates);
        activate(ffn.activation, gates);
        activations.iter_mut().zip(gates.iter()).for_each(|(a, g)| *a *= g);
    } else {
        activate(ffn.activation, activations);
    }
    if let Some(observer) = &mut call.observer {
        let (layer, first, selection) = (call.layer, neurons.start, call.selection);
        observer.activations(&ObservedActivations { layer, first, count, values: activations, selection })?;
    }
    if let Some(selection) = call.selection {
        for (token, row) in activations.chunks_exact_mut(count).enumerate() {
            for (neuron, a) in neurons.clone().zip(row) {
                *a = if selection.contains(token, neuron) { *a } else { 0.0 };
            }
        }
    }
    if call.cutoff > 0.0 {
        activations.iter_mut().filter(|a| a.abs() <= call.cutoff).for_each(|a| *a = 0.0);
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

/// `y[t, r] = sum_c x[t, c] * w[r, c]`.
pub fn product(threads: &Threads, w: Matrix<'_>, x: &[f32], tokens: usize, y: &mut [f32], scratch: &mut MatmulScratch) {
    if tokens == 1 {
        matvec(threads, w, x, y);
    } else {
        matmul(threads, w, x, tokens, y, w.rows(), scratch);
    }
}

/// The activation function, in place.
pub fn activate(activation: Activation, values: &mut [f32]) {
    match activation {
        Activation::Relu => flashlm_kernels::relu(values),
        Activation::Relu2 => values.iter_mut().for_each(|v| *v = v.max(0.0) * v.max(0.0)),
        Activation::FatRelu(threshold) => values.iter_mut().for_each(|v| *v = if *v > threshold { *v } else { 0.0 }),
        Activation::Gelu => flashlm_kernels::gelu(values),
        Activation::GeluTanh => flashlm_kernels::gelu_tanh(values),
        Activation::Silu => flashlm_kernels::silu(values),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_for_many_tokens_serves_fewer() {
        for size in [64, 1000, 1024, 16384] {
            for most in (1..600).step_by(7) {
                let room = room(size, most);
                for tokens in 1..=most {
                    let used = neurons_at_once(tokens).min(size) * tokens;
                    assert!(used <= room, "{tokens} of {most} tokens, {size} neurons: {used} of {room}");
                }
            }
        }
    }
}
