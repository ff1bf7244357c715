//! What `selected.rs` does, for rows of integers: a row is unpacked once for all of its tokens, and a block of the tokens' vectors
//! stays in the processor's cache while many rows meet it.
//!
//! A pair's sum runs over the groups of weights in order, and is added up at last; it does not depend on the pairs beside it.
#![expect(unsafe_code, reason = "tasks write disjoint parts of one output and use their thread's part of the scratch")]

use crate::dispatch::Kernels;
use crate::many::{Of, room};
use crate::matrix::Matrix;
use crate::matvec::rows_per_task;
use crate::pairs::RowTokens;
use crate::simd::{LANES_MAX, Op, Simd, Weight, with_weight};
use crate::threads::{SendPtr, Threads};
use crate::whole::{INPUT_BLOCK, Inputs, PIECE_MIN, whole_cols};

/// Pairs whose sums are kept at a time, unless one row has more.
const PAIRS_MAX: usize = 1024;
/// Floats as large as the integers of a block.
const BLOCK_FLOATS: usize = INPUT_BLOCK / 2;

fn own_floats(tokens: usize) -> usize {
    PAIRS_MAX.max(tokens) * LANES_MAX
}

fn packed_floats(tokens: usize, cols: usize) -> usize {
    whole_cols(cols).div_ceil(INPUT_BLOCK) * tokens * (BLOCK_FLOATS + 1)
}

/// The most that products with up to `tokens` tokens keep.
pub(crate) fn floats_needed(threads: usize, tokens: usize, cols: usize) -> usize {
    packed_floats(tokens, cols) + threads * own_floats(tokens)
}

impl Kernels {
    /// [`selected_dots`](crate::selected_dots) for rows of integers, its arguments checked.
    pub(crate) fn selected_dots_whole(
        self,
        threads: &Threads,
        w: Matrix<'_>,
        selected: RowTokens<'_>,
        x: &[f32],
        y: SendPtr<f32>,
        scratch: &mut Vec<f32>,
    ) {
        let (rows, cols) = (w.rows(), w.cols());
        let tokens = x.len() / cols.max(1);
        let (packed_len, own_len) = (packed_floats(tokens, cols), own_floats(tokens));
        let scratch = room(scratch, packed_len + threads.count() * own_len);
        let (packed, own) = scratch.split_at_mut(packed_len);
        let own = SendPtr(own.as_mut_ptr());
        let chunk = rows_per_task(threads, rows, w.row_bytes());
        self.with_inputs(w.element(), (x, tokens, cols, cols), |inputs| {
            threads.chunks_mut(packed, (tokens * (BLOCK_FLOATS + 1)).max(1), &|block, packed| {
                pack(inputs, tokens, block, packed);
            });
            let packed = &*packed;
            threads.run_indexed(rows.div_ceil(chunk), &|task, thread| {
                // SAFETY: each thread has its own part of the scratch, and no two tasks run on one thread at once.
                let sums = unsafe { std::slice::from_raw_parts_mut(own.get().add(thread * own_len), own_len) };
                let rows = task * chunk..rows.min((task + 1) * chunk);
                let mut first = rows.start;
                while first < rows.end {
                    let begin = selected.starts[first] as usize;
                    let fits = |end: &usize| selected.starts[*end] as usize - begin <= own_len / LANES_MAX;
                    let end = (first + 1..=rows.end)
                        .take_while(fits)
                        .last()
                        .expect("a row has a pair for each token at most");
                    let pairs = selected.starts[end] as usize - begin;
                    // SAFETY: `starts` ascend up to the length of `y`, so these pairs are this task's alone.
                    let y = unsafe { std::slice::from_raw_parts_mut(y.get().add(begin), pairs) };
                    let op = Dots { w: w.rows_range(first..end), first, selected, inputs, packed, tokens, sums, y };
                    with_weight!(w.element(), W => self.run(Of::<_, W>::new(op)));
                    first = end;
                }
            });
        });
    }
}

/// Puts block `block` of all vectors together: the scale of each token's, then the integers of each.
fn pack(inputs: Inputs<'_>, tokens: usize, block: usize, packed: &mut [f32]) {
    let (scales, numbers) = packed.split_at_mut(tokens);
    for (token, (scale, to)) in scales.iter_mut().zip(numbers.as_chunks_mut::<BLOCK_FLOATS>().0).enumerate() {
        let input = inputs.token(token);
        *scale = input.scales[block];
        let from = &input.numbers[block * INPUT_BLOCK..];
        for (to, pair) in to.iter_mut().zip(from.as_chunks::<2>().0) {
            let [first, second] = pair.map(i16::to_ne_bytes);
            *to = f32::from_ne_bytes([first[0], first[1], second[0], second[1]]);
        }
    }
}

/// Some rows with the tokens that selected them.
struct Dots<'a> {
    w: Matrix<'a>,
    /// Number of `w`'s first row in `selected`.
    first: usize,
    selected: RowTokens<'a>,
    inputs: Inputs<'a>,
    packed: &'a [f32],
    tokens: usize,
    /// `LANES_MAX` for each pair.
    sums: &'a mut [f32],
    y: &'a mut [f32],
}

impl<W: Weight> Op for Of<Dots<'_>, W> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Dots { w, first, selected, inputs, packed, tokens, sums, y } = self.op;
        let whole = whole_cols(w.cols());
        assert!(sums.len() >= y.len() * LANES_MAX && packed.len() >= packed_floats(tokens, w.cols()));
        sums[..y.len() * LANES_MAX].fill(0.0);
        let group = match w.row(0).places().shift {
            shift @ (5 | 6) => 1 << shift,
            _ => INPUT_BLOCK,
        };
        let of = |row: usize| selected.of_row(first + row);
        let selects = |row: usize| of(row).iter().all(|token| usize::from(*token) < tokens);
        assert!((0..w.rows()).all(selects), "tokens of the vectors");
        for (block, packed) in packed.chunks_exact((tokens * (BLOCK_FLOATS + 1)).max(1)).enumerate() {
            let (scales, numbers) = packed.split_at(tokens);
            let at = block * INPUT_BLOCK;
            let len = INPUT_BLOCK.min(whole - at);
            let mut sums = sums.as_mut_ptr();
            for row in 0..w.rows() {
                let mut of_row = of(row);
                if of_row.is_empty() {
                    continue;
                }
                // What is behind the end of a shorter block stays zero, and so does what it is multiplied with.
                let mut weights = [0; INPUT_BLOCK];
                let mut groups = [0.0; INPUT_BLOCK / PIECE_MIN];
                let places = w.row(row).places();
                // SAFETY: the row has elements `at..at + len`.
                unsafe {
                    W::unpack(places, at, &mut weights[..len]);
                    for (g, scale) in groups[..len.div_ceil(group)].iter_mut().enumerate() {
                        *scale = W::scale_of(places, at + g * group);
                    }
                }
                macro_rules! tokens_of {
                    ($T:literal, $GROUP:expr) => {
                        while of_row.len() >= $T {
                            let token: [usize; $T] = std::array::from_fn(|t| usize::from(of_row[t]));
                            // SAFETY: tokens were asserted to be among those that are packed, and sums to be there for each pair.
                            unsafe {
                                let numbers = token.map(|token| numbers.as_ptr().add(token * BLOCK_FLOATS).cast());
                                let dots = block_dots::<S, { $GROUP }, $T>(s, &weights, &groups, numbers);
                                for t in 0..$T {
                                    let scale = s.splat(*scales.as_ptr().add(token[t]));
                                    s.store(sums, s.fma(dots[t], scale, s.load(sums)));
                                    sums = sums.add(LANES_MAX);
                                }
                            }
                            of_row = &of_row[$T..];
                        }
                    };
                }
                macro_rules! groups_of {
                    ($GROUP:expr) => {
                        tokens_of!(2, $GROUP);
                        tokens_of!(1, $GROUP);
                    };
                }
                match group {
                    32 => {
                        groups_of!(32);
                    }
                    64 => {
                        groups_of!(64);
                    }
                    _ => {
                        groups_of!(INPUT_BLOCK);
                    }
                }
            }
        }
        let mut pairs = sums.as_chunks::<LANES_MAX>().0.iter().zip(y);
        for row in 0..w.rows() {
            for &token in of(row) {
                let (sum, y) = pairs.next().expect("one for each pair");
                // SAFETY: a sum has LANES_MAX values.
                *y = unsafe { s.sum(s.load(sum.as_ptr())) };
                if whole < w.cols() {
                    *y += rest::<S, W>(s, w, row, whole, &inputs.token(usize::from(token)).floats[whole..]);
                }
            }
        }
    }
}

/// The dot product of the elements of `row` after its last block with as many floats, fewer than [`PIECE_MIN`].
#[inline(always)]
fn rest<S: Simd, W: Weight>(s: S, w: Matrix<'_>, row: usize, at: usize, floats: &[f32]) -> f32 {
    let mut weights = [0.0; PIECE_MIN];
    // SAFETY: the row has as many elements behind `at`.
    unsafe { crate::convert::widen::<S, W>(s, w.row(row).places(), at, weights.as_mut_ptr(), floats.len()) };
    weights.iter().zip(floats).fold(0.0, |sum, (weight, float)| sum + weight * float)
}

/// A block's products with `T` tokens, in lanes: groups of `GROUP` weights in order, each times its scale.
///
/// # Safety
/// A block of numbers must be readable of each token.
#[inline(always)]
unsafe fn block_dots<S: Simd, const GROUP: usize, const T: usize>(
    s: S,
    weights: &[i16; INPUT_BLOCK],
    scales: &[f32; INPUT_BLOCK / PIECE_MIN],
    numbers: [*const i16; T],
) -> [S::V; T] {
    let mut parts = [s.splat(0.0); T];
    for g in 0..INPUT_BLOCK / GROUP {
        let mut sums = [s.no_sums(); T];
        for at in (g * GROUP..(g + 1) * GROUP).step_by(2 * S::LANES) {
            // SAFETY: `at + 2 * LANES` is at most a block.
            unsafe {
                let weights = s.load_pairs(weights.as_ptr().add(at));
                for t in 0..T {
                    sums[t] = s.add_pairs(sums[t], weights, s.load_pairs(numbers[t].add(at)));
                }
            }
        }
        let scale = s.splat(scales[g]);
        for t in 0..T {
            parts[t] = s.fma(s.floats(sums[t]), scale, parts[t]);
        }
    }
    parts
}
