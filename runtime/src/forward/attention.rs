//! Causal self-attention over the KV cache: every token with what came before it in its sequence.
//!
//! A sequence's positions are cut into parts of [`PART`]. A head's scores, factors and weighted sum are taken part by part and put
//! together in order (`SoftmaxPart`), so that keys and values are read from memory once, for whatever queries want them, and threads
//! can share heads as well as parts: which of them takes what changes no bit.

use std::ops::Range;

use flashlm_formats::model::Attention;
use flashlm_kernels::{
    SoftmaxPart, Threads, Vectors, add_weighted_rows_each_serial, matvec_each_serial, rope_rotate_half, softmax_part,
};

use super::kv::{KvMemory, SequencePlaces};
use super::positions::PositionTable;
use super::weights::QkNorm;
use crate::buffers::Buffers;
use crate::error::Result;
use crate::neurons::source::Arithmetic;

/// Positions of a part.
const PART: usize = 128;
/// Queries that meet a part's keys and values together.
const QUERIES: usize = 4;
/// Tokens that one task takes through all parts, at most.
const TASK_TOKENS: usize = 8;
/// Tasks for each thread, where there are as many: some may be short.
const TASKS_PER_THREAD: usize = 8;
/// Numbers that follow a sum: those of its [`SoftmaxPart`].
const PART_NUMBERS: usize = 2;

/// Memory of one attention call: sums over parts, or of tokens so far.
#[derive(Default)]
pub struct AttentionScratch {
    sums: Vec<f32>,
}

impl AttentionScratch {
    /// Scratch for `tokens` at a time in a context of `context`.
    pub fn new(buffers: &mut Buffers, shape: &Attention, tokens: usize, context: usize) -> Self {
        let sums = shape.heads * (shape.head_dim + PART_NUMBERS);
        // A token's sums over all parts; or those of each token so far, and as many again over the part that is next.
        let alone = sums * context.div_ceil(PART);
        let together = if tokens > 1 { 2 * sums * (tokens + TASK_TOKENS - 1) } else { 0 };
        Self { sums: buffers.zeros(alone.max(together)) }
    }
}

/// One attention call.
pub struct AttentionCall<'a> {
    /// The shape of the block's attention.
    pub shape: &'a Attention,
    /// Which block.
    pub layer: usize,
    /// Norms of query and key heads, if the block has them.
    pub qk_norm: Option<&'a QkNorm>,
    /// The block's rotary or ALiBi table.
    pub positions: &'a PositionTable,
    /// Which tokens.
    pub batch: &'a Batch<'a>,
}

/// A token's place in its sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenPlace {
    /// Which sequence of the batch.
    pub sequence: usize,
    /// Position in it: as many tokens come before.
    pub position: usize,
}

/// The tokens that go through a block together. Those of one sequence stand in the order of their positions.
pub struct Batch<'a> {
    /// Where each token is.
    pub tokens: &'a [TokenPlace],
    /// Where the keys and values of each sequence are.
    pub sequences: &'a [SequencePlaces],
    /// How products are computed.
    pub arithmetic: Arithmetic,
}

/// Attends `qkv` (`[tokens, heads + 2 * kv_heads, head_dim]`, changed in place) to the cache and itself; stores its keys and values.
///
/// `out` becomes `[tokens, heads * head_dim]`.
///
/// # Errors
/// If a key or value cannot be stored.
pub fn attend(
    call: &AttentionCall<'_>,
    threads: &Threads,
    qkv: &mut [f32],
    kv: &mut KvMemory,
    scratch: &mut AttentionScratch,
    out: &mut [f32],
) -> Result<()> {
    let AttentionCall { shape, layer, batch, .. } = *call;
    let (heads, kv_heads, dim) = (shape.heads, shape.kv_heads, shape.head_dim);
    for (token, row) in batch.tokens.iter().zip(qkv.chunks_exact_mut(shape.qkv_size())) {
        let (queries_keys, values) = row.split_at_mut((heads + kv_heads) * dim);
        normalise_and_rotate(call, token.position, queries_keys, &mut scratch.sums[..dim]);
        let place = batch.sequences[token.sequence].place(token.position);
        kv.put(layer, (place, token.position), &queries_keys[heads * dim..], values)?;
    }

    let heads = Heads { call, kv, qkv, group: heads / kv_heads, scale: 1.0 / (dim as f32).sqrt() };
    match batch.tokens {
        [_] => heads.alone(threads, &mut scratch.sums, out),
        _ => heads.together(threads, &mut scratch.sums, out),
    }
    Ok(())
}

/// What the heads of a call attend with.
struct Heads<'a> {
    call: &'a AttentionCall<'a>,
    kv: &'a KvMemory,
    /// Queries normalised and rotated.
    qkv: &'a [f32],
    /// Heads that share keys and values.
    group: usize,
    scale: f32,
}

/// Queries that follow each other at a distance: from one head of a token to the next, or from one token to the next.
#[derive(Clone, Copy)]
struct Queries {
    /// The first one's token and head.
    first: (usize, usize),
    count: usize,
    of_tokens: bool,
}

impl Heads<'_> {
    /// Numbers of a sum of vectors and its [`SoftmaxPart`].
    fn sum_len(&self) -> usize {
        self.call.shape.head_dim + PART_NUMBERS
    }

    /// The only token: tasks share its heads and their parts, and what they found is put together at the end.
    fn alone(&self, threads: &Threads, sums: &mut [f32], out: &mut [f32]) {
        let (dim, len, group) = (self.call.shape.head_dim, self.sum_len(), self.group);
        let parts = (self.call.batch.tokens[0].position + 1).div_ceil(PART);
        let of_part = group * len;
        let sums = &mut sums[..self.call.shape.kv_heads * parts * of_part];
        let at_once = (sums.len() / of_part).div_ceil(threads.count() * TASKS_PER_THREAD);
        threads.chunks_mut(sums, at_once * of_part, &|task, sums| {
            for (i, sums) in sums.chunks_exact_mut(of_part).enumerate() {
                let (kv_head, part) = ((task * at_once + i) / parts, (task * at_once + i) % parts);
                for (at, sums) in (0..group).step_by(QUERIES).zip(sums.chunks_mut(QUERIES * len)) {
                    let first = (0, kv_head * group + at);
                    self.part(Queries { first, count: sums.len() / len, of_tokens: false }, part, sums);
                }
            }
        });
        for (head, out) in out.chunks_exact_mut(dim).enumerate() {
            let of_head = |part: usize| ((head / group * parts + part) * group + head % group) * len;
            let (first, rest) = sums.split_at_mut(of_head(0) + len);
            let first = &mut first[of_head(0)..];
            for part in 1..parts {
                join(first, &rest[of_head(part) - of_head(0) - len..][..len]);
            }
            finish(first, out);
        }
    }

    /// Several tokens: a task takes some of them with all heads that share keys and values, part by part.
    fn together(&self, threads: &Threads, sums: &mut [f32], out: &mut [f32]) {
        let (shape, tokens, group) = (self.call.shape, self.call.batch.tokens, self.group);
        let (dim, len) = (shape.head_dim, self.sum_len());
        let blocks = (threads.count() * TASKS_PER_THREAD).div_ceil(shape.kv_heads);
        let block = tokens.len().div_ceil(blocks).min(TASK_TOKENS);
        let blocks = tokens.len().div_ceil(block);
        let (of_block, of_next) = (block * group * len, QUERIES.min(block * group) * len);
        let sums = &mut sums[..shape.kv_heads * blocks * (of_block + of_next)];
        threads.chunks_mut(sums, of_block + of_next, &|task, sums| {
            let (kv_head, first) = (task / blocks, task % blocks * block);
            let (sums, next) = sums.split_at_mut(of_block);
            self.block(kv_head, first..tokens.len().min(first + block), sums, next);
        });
        for (t, out) in out.chunks_exact_mut(shape.heads * dim).enumerate() {
            for (head, out) in out.chunks_exact_mut(dim).enumerate() {
                let task = head / group * blocks + t / block;
                let sum = task * (of_block + of_next) + (t % block * group + head % group) * len;
                finish(&sums[sum..sum + len], out);
            }
        }
    }

    /// Some tokens with the heads that share the keys and values of `kv_head`: `sums` is `[tokens, group]`.
    fn block(&self, kv_head: usize, tokens: Range<usize>, sums: &mut [f32], next: &mut [f32]) {
        let (group, len) = (self.group, self.sum_len());
        let visible = |t: usize| self.call.batch.tokens[t].position + 1;
        let sequence = |t: usize| self.call.batch.tokens[t].sequence;
        let longest = tokens.clone().map(visible).max().unwrap_or(0);
        for part in 0..longest.div_ceil(PART) {
            let mut t = tokens.start;
            while t < tokens.end {
                if visible(t) <= part * PART {
                    t += 1;
                    continue;
                }
                // Tokens of a sequence stand in order: those behind see what this one sees.
                let count = match group {
                    1 => (t..tokens.end.min(t + QUERIES)).take_while(|next| sequence(*next) == sequence(t)).count(),
                    _ => 1,
                };
                let sums = &mut sums[(t - tokens.start) * group * len..][..count * group * len];
                for (at, sums) in (0..group).step_by(QUERIES).zip(sums.chunks_mut(QUERIES * len)) {
                    let first = (t, kv_head * group + at);
                    let queries = Queries { first, count: sums.len() / len, of_tokens: group == 1 };
                    if part == 0 {
                        self.part(queries, part, sums);
                        continue;
                    }
                    let next = &mut next[..sums.len()];
                    self.part(queries, part, next);
                    sums.chunks_exact_mut(len).zip(next.chunks_exact(len)).for_each(|(sum, next)| join(sum, next));
                }
                t += count;
            }
        }
    }

    /// The sums of queries over one part, each of which sees some of it: `[queries, sum_len]`.
    fn part(&self, queries: Queries, part: usize, sums: &mut [f32]) {
        let AttentionCall { shape, layer, batch, .. } = *self.call;
        let (dim, len) = (shape.head_dim, self.sum_len());
        let Queries { first: (token, head), count, of_tokens } = queries;
        let (kv_head, sequence) = (head / self.group, &batch.sequences[batch.tokens[token].sequence]);
        let start = part * PART;
        let visible =
            |i: usize| (batch.tokens[if of_tokens { token + i } else { token }].position + 1).min(start + PART);
        let seen = start..visible(count - 1);
        let stride = if of_tokens { shape.qkv_size() } else { dim };
        let vectors = (&self.qkv[token * shape.qkv_size() + head * dim..], Vectors { count, stride });

        let (mut scores, mut scales) = ([0.0; QUERIES * PART], [0.0; PART]);
        for (first, places) in sequence.of(seen.clone()) {
            let (at, rows) = (first - start, places.len());
            matvec_each_serial(self.kv.keys(layer, kv_head, places.clone()), vectors, &mut scores[at..], PART);
            if self.kv.key_scales(layer, kv_head, places, &mut scales) {
                scores
                    .chunks_exact_mut(PART)
                    .take(count)
                    .for_each(|scores| multiply(&mut scores[at..at + rows], &scales));
            }
        }
        for (i, (scores, sum)) in scores.chunks_exact_mut(PART).zip(sums.chunks_exact_mut(len)).enumerate() {
            let (scores, hidden) = scores.split_at_mut(visible(i) - start);
            match self.call.positions {
                PositionTable::Alibi { bias, context } => {
                    let head = if of_tokens { head } else { head + i };
                    for (score, bias) in scores.iter_mut().zip(&bias[head * context + start..]) {
                        *score = (*score + bias) * self.scale;
                    }
                }
                _ => scores.iter_mut().for_each(|score| *score *= self.scale),
            }
            let of_part = softmax_part(scores);
            // Rows times zero change no bit of a sum.
            hidden.fill(0.0);
            sum[..dim].fill(0.0);
            sum[dim..].copy_from_slice(&[of_part.largest, of_part.sum]);
        }
        for (first, places) in sequence.of(seen) {
            let (at, rows) = (first - start, places.len());
            if self.kv.value_scales(layer, kv_head, places.clone(), &mut scales) {
                scores
                    .chunks_exact_mut(PART)
                    .take(count)
                    .for_each(|scores| multiply(&mut scores[at..at + rows], &scales));
            }
            let factors = (&scores[at..], Vectors { count, stride: PART });
            add_weighted_rows_each_serial(self.kv.values(layer, kv_head, places), factors, sums, len);
        }
    }
}

fn multiply(values: &mut [f32], by: &[f32]) {
    values.iter_mut().zip(by).for_each(|(value, by)| *value *= by);
}

/// The [`SoftmaxPart`] behind a sum.
fn part_of(numbers: &[f32]) -> SoftmaxPart {
    SoftmaxPart { largest: numbers[0], sum: numbers[1] }
}

/// Adds the sum over the next part.
fn join(sum: &mut [f32], next: &[f32]) {
    let dim = sum.len() - PART_NUMBERS;
    let (y, numbers) = sum.split_at_mut(dim);
    let mut part = part_of(numbers);
    part.join(y, part_of(&next[dim..]), &next[..dim]);
    numbers.copy_from_slice(&[part.largest, part.sum]);
}

/// What is attended: the sum over all parts, divided by that of its factors.
fn finish(sum: &[f32], out: &mut [f32]) {
    let (y, numbers) = sum.split_at(out.len());
    out.copy_from_slice(y);
    part_of(numbers).finish(out);
}

/// `normed` is room for one head.
fn normalise_and_rotate(call: &AttentionCall<'_>, position: usize, queries_keys: &mut [f32], normed: &mut [f32]) {
    let dim = call.shape.head_dim;
    if let Some(norms) = call.qk_norm {
        for (head, values) in queries_keys.chunks_exact_mut(dim).enumerate() {
            let norm = if head < call.shape.heads { &norms.query } else { &norms.key };
            norm.apply(values, normed);
            values.copy_from_slice(normed);
        }
    }
    if let PositionTable::Rotary { dims, cos, sin } = call.positions {
        let row = position * dims / 2..(position + 1) * dims / 2;
        for values in queries_keys.chunks_exact_mut(dim) {
            rope_rotate_half(values, *dims, &cos[row.clone()], &sin[row.clone()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::kv::KvDtype;
    use super::*;

    const LAYERS: usize = 2;

    fn floats(seed: usize, len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.0 - 1.0).collect()
    }

    fn shape(heads: usize, kv_heads: usize, head_dim: usize) -> Attention {
        Attention { heads, kv_heads, head_dim, qkv_bias: false, out_bias: false, qk_norm: None }
    }

    /// Places of two sequences that lie among each other.
    fn sequences(context: usize) -> [SequencePlaces; 2] {
        let parts = |from: usize| (from..2 * context / 48 + 2).step_by(2).map(|block| block * 48..(block + 1) * 48);
        [SequencePlaces::new(parts(0)), SequencePlaces::new(parts(1))]
    }

    /// What one head of a token attends to, by definition.
    fn by_definition(shape: &Attention, qkv: &[Vec<f32>], head: usize, bias: Option<&[f32]>) -> Vec<f64> {
        let (dim, kv_head) = (shape.head_dim, head / (shape.heads / shape.kv_heads));
        let part = |row: &[f32], head: usize| row[head * dim..(head + 1) * dim].to_vec();
        let query = part(&qkv[qkv.len() - 1], head);
        let scores: Vec<f64> = qkv
            .iter()
            .enumerate()
            .map(|(position, row)| {
                let key = part(row, shape.heads + kv_head);
                let dot: f64 = query.iter().zip(&key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                (dot + bias.map_or(0.0, |bias| f64::from(bias[position]))) / (dim as f64).sqrt()
            })
            .collect();
        let largest = scores.iter().copied().fold(f64::MIN, f64::max);
        let factors: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
        let total: f64 = factors.iter().sum();
        let mut sum = vec![0.0; dim];
        for (factor, row) in factors.iter().zip(qkv) {
            let value = part(row, shape.heads + shape.kv_heads + kv_head);
            sum.iter_mut().zip(value).for_each(|(sum, v)| *sum += factor / total * f64::from(v));
        }
        sum
    }

    /// Feeds tokens of two sequences in steps of several sizes and compares each with the definition, within `tolerance`.
    fn check(shape: Attention, dtype: KvDtype, positions: &PositionTable, tolerance: f64) {
        let (context, wide) = (300, shape.qkv_size());
        let sequences = sequences(context);
        let mut kv = KvMemory::new(&shape, LAYERS, 2 * context + 200, dtype).unwrap();
        let mut scratch = AttentionScratch::new(&mut Buffers::default(), &shape, 40, context);
        let pools = [1, 2, 3].map(|threads| Threads::new(threads.try_into().unwrap()).unwrap());
        let mut said: [Vec<Vec<f32>>; 2] = Default::default();
        for (at, steps) in [
            [40, 0],
            [0, 1],
            [1, 0],
            [38, 2],
            [40, 0],
            [7, 9],
            [1, 0],
            [2, 38],
            [40, 0],
            [0, 40],
            [1, 39],
            [33, 0],
            [1, 0],
            [40, 0],
            [0, 1],
            [31, 4],
            [20, 20],
            [0, 1],
            [1, 0],
        ]
        .into_iter()
        .enumerate()
        {
            let mut tokens = Vec::new();
            for (sequence, count) in steps.into_iter().enumerate() {
                for _ in 0..count {
                    tokens.push(TokenPlace { sequence, position: said[sequence].len() });
                    let row = floats(at + 31 * tokens.len() + sequence, wide);
                    said[sequence].push(row);
                }
            }
            let rows: Vec<f32> = tokens.iter().flat_map(|t| said[t.sequence][t.position].clone()).collect();
            let batch = Batch { tokens: &tokens, sequences: &sequences, arithmetic: Arithmetic::Each };
            let call = AttentionCall { shape: &shape, layer: 1, qk_norm: None, positions, batch: &batch };
            let mut first = Vec::new();
            for threads in &pools {
                let mut out = vec![f32::NAN; tokens.len() * shape.heads * shape.head_dim];
                attend(&call, threads, &mut rows.clone(), &mut kv, &mut scratch, &mut out).unwrap();
                if first.is_empty() {
                    first = out;
                } else {
                    assert!(first == out, "{} threads, step {at}", threads.count());
                }
            }
            for (t, token) in tokens.iter().enumerate() {
                for head in 0..shape.heads {
                    let bias = match positions {
                        PositionTable::Alibi { bias, context } => Some(&bias[head * context..][..*context]),
                        _ => None,
                    };
                    let want = by_definition(&shape, &said[token.sequence][..=token.position], head, bias);
                    let got = &first[(t * shape.heads + head) * shape.head_dim..][..shape.head_dim];
                    for (got, want) in got.iter().zip(&want) {
                        let error = (f64::from(*got) - want).abs();
                        assert!(error < tolerance, "{dtype:?} {token:?} head {head}: {got} for {want}");
                    }
                }
            }
        }
        assert!(
            said[0].len() > 2 * PART && said[1].len() > PART,
            "several parts: {} and {}",
            said[0].len(),
            said[1].len()
        );
    }

    #[test]
    fn attention_is_what_it_is_defined_to_be() {
        let bias = PositionTable::Alibi { bias: floats(3, 6 * 300), context: 300 };
        for (heads, kv_heads, dim) in [(2, 2, 64), (6, 2, 40), (6, 1, 33), (5, 1, 16)] {
            for (dtype, tolerance) in [(KvDtype::F32, 1e-5), (KvDtype::F16, 1e-3), (KvDtype::Int8, 2e-2)] {
                check(shape(heads, kv_heads, dim), dtype, &PositionTable::None, tolerance);
                check(shape(heads, kv_heads, dim), dtype, &bias, tolerance);
            }
        }
    }
}
