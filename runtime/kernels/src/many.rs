//! Matrix products of many tokens: blocks of weights are widened to f32 once and meet all tokens from the cache.
//!
//! Sums run over fixed blocks ([`BLOCK`]) in order, so how outputs are shared among tasks changes no bit.
#![expect(unsafe_code, reason = "tasks write disjoint parts of one output and use their thread's part of the scratch")]

use std::marker::PhantomData;

use crate::convert::widen;
use crate::dispatch::Kernels;
use crate::matrix::Matrix;
use crate::simd::{LANES_MAX, Op, Simd, Weight, with_weight};
use crate::threads::{SendPtr, Threads};
use crate::tile::{A_STRIDE, BLOCK, StripOfTiles, strip};

/// Rows of W in one task of `matmul`: whole tiles on every instruction set.
pub(crate) const TASK_ROWS: usize = 96;
/// Most columns of W in one task of `matmul_rows_add`.
const TASK_COLS_MAX: usize = 256;
/// Most tokens taken through one pass over the weights.
const TOKENS_MAX: usize = 240;
/// Tokens of a block are a multiple of this: whole strips and whole tiles.
const TOKENS_UNIT: usize = 48;
/// Rows ahead of the one being widened that are asked for.
pub(crate) const ROWS_AHEAD: usize = 6;
/// Room that keeps the columns of a buffer out of one another's cache sets.
pub(crate) const PAD: usize = 16;

/// Tokens of a block: evenly shared, in units, at most `TOKENS_MAX`.
pub(crate) fn tokens_of_block(tokens: usize) -> usize {
    tokens.div_ceil(tokens.div_ceil(TOKENS_MAX)).next_multiple_of(TOKENS_UNIT)
}

/// Tokens of a block with the lanes of a last strip, whatever the width of one on this instruction set.
pub(crate) fn strips_width(block: usize) -> usize {
    block.next_multiple_of(2 * LANES_MAX)
}

/// Floats of a thread's own in `matmul_many`, and in `matmul_rows_add_many` with this many columns at once.
fn own_rows_floats(width: usize) -> usize {
    TASK_ROWS * A_STRIDE + TASK_ROWS * (width + PAD)
}

fn own_cols_floats(cols: usize, block: usize) -> usize {
    BLOCK * cols + block * A_STRIDE
}

/// Tokens of the largest block of up to `tokens` tokens: of fewer tokens a block can be larger, 241 make two blocks of 144, 240 one of
/// 240.
pub(crate) fn largest_block(tokens: usize) -> usize {
    tokens.min(TOKENS_MAX).next_multiple_of(TOKENS_UNIT)
}

/// The most that the products of up to `tokens` tokens keep.
pub(crate) fn floats_needed(threads: usize, tokens: usize, cols: usize) -> usize {
    let block = largest_block(tokens);
    let width = strips_width(block);
    let rows = width * cols + threads * own_rows_floats(width);
    rows.max(threads * own_cols_floats(TASK_COLS_MAX, block))
}

/// A product's arrays. `Kernels::matmul` and `matmul_rows_add` check their shapes.
#[derive(Clone, Copy)]
pub(crate) struct Shape<'a> {
    pub(crate) w: Matrix<'a>,
    /// `x` or `a`: token `t` begins at `t * stride`.
    pub(crate) input: &'a [f32],
    pub(crate) stride: usize,
    pub(crate) tokens: usize,
}

impl Kernels {
    /// `y[t, r] = sum over c of x[t, c] W[r, c]`. `y` holds `tokens` rows every `y_stride >= w.rows()`.
    pub(crate) fn matmul_many(
        self,
        threads: &Threads,
        shape: Shape<'_>,
        y: &mut [f32],
        y_stride: usize,
        scratch: &mut Vec<f32>,
    ) {
        let Shape { w, tokens, .. } = shape;
        if tokens == 0 || w.rows() == 0 {
            return;
        }
        let block = tokens_of_block(tokens);
        let width = strips_width(block);
        let strips_len = width * w.cols();
        let own_len = own_rows_floats(width);
        let scratch = room(scratch, strips_len + threads.count() * own_len);
        let (strips, own) = scratch.split_at_mut(strips_len);
        let (y, own) = (SendPtr(y.as_mut_ptr()), SendPtr(own.as_mut_ptr()));
        for first in (0..tokens).step_by(block) {
            let count = block.min(tokens - first);
            let lanes = lanes_of_strip(self);
            // Whole strips, of which each has a token.
            let used = &mut strips[..count.next_multiple_of(lanes) * w.cols()];
            threads.chunks_mut(used, lanes * w.cols().max(1), &|index, strip| {
                let start = index * lanes;
                let x = &shape.input[(first + start) * shape.stride..];
                transpose(x, shape.stride, lanes.min(count - start), strip, lanes);
            });
            let strips = &*strips;
            threads.run_indexed(w.rows().div_ceil(TASK_ROWS), &|task, thread| {
                let start = task * TASK_ROWS;
                let rows = w.rows_range(start..w.rows().min(start + TASK_ROWS));
                // SAFETY: each thread has its own part of the scratch, and no two tasks run on one thread at once.
                let own = unsafe { std::slice::from_raw_parts_mut(own.get().add(thread * own_len), own_len) };
                let (panel, sums) = own.split_at_mut(TASK_ROWS * A_STRIDE);
                let sums = &mut sums[..rows.rows() * (width + PAD)];
                sums.fill(0.0);
                let op = RowsTask { w: rows, strips, tokens: count, panel, sums: &mut *sums, width: width + PAD };
                with_weight!(w.element(), W => self.run(Of::<_, W>::new(op)));
                for t in 0..count {
                    for r in 0..rows.rows() {
                        // SAFETY: the caller checked that `y` holds token `first + t < tokens` and row `start + r`; this
                        // task alone writes them.
                        unsafe { *y.get().add((first + t) * y_stride + start + r) = sums[r * (width + PAD) + t] };
                    }
                }
            });
        }
    }

    /// `y[t, c] += sum over r, in order, of a[t, r] W[r, c]`. `y` holds `tokens` rows of `w.cols()`.
    pub(crate) fn matmul_rows_add_many(
        self,
        threads: &Threads,
        shape: Shape<'_>,
        y: &mut [f32],
        scratch: &mut Vec<f32>,
    ) {
        let Shape { w, tokens, .. } = shape;
        if tokens == 0 || w.cols() == 0 {
            return;
        }
        let block = tokens_of_block(tokens);
        let unit = 2 * LANES_MAX;
        // Two tasks for each thread at least, where columns allow it.
        let cols = w.cols().div_ceil(2 * threads.count()).next_multiple_of(unit).min(TASK_COLS_MAX);
        let col_tasks = w.cols().div_ceil(cols);
        let own_len = own_cols_floats(cols, block);
        let own = SendPtr(room(scratch, threads.count() * own_len).as_mut_ptr());
        let y = SendPtr(y.as_mut_ptr());
        threads.run_indexed(col_tasks * tokens.div_ceil(block), &|task, thread| {
            let (first, start) = (task / col_tasks * block, task % col_tasks * cols);
            // SAFETY: each thread has its own part of the scratch, and no two tasks run on one thread at once.
            let own = unsafe { std::slice::from_raw_parts_mut(own.get().add(thread * own_len), own_len) };
            let (panel, factors) = own.split_at_mut(BLOCK * cols);
            let op = ColsTask {
                shape,
                first,
                tokens: block.min(tokens - first),
                start,
                cols: cols.min(w.cols() - start),
                panel,
                factors,
                // SAFETY: token `first` and column `start` exist; the task writes its tokens' own columns alone.
                y: unsafe { y.get().add(first * w.cols() + start) },
            };
            with_weight!(w.element(), W => self.run(Of::<_, W>::new(op)));
        });
    }
}

/// The first `len` floats of `scratch`, which grows as needed.
pub(crate) fn room(scratch: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if scratch.len() < len {
        // The old content is of no use: do not copy it.
        scratch.clear();
        scratch.reserve_exact(len);
        scratch.resize(len, 0.0);
    }
    &mut scratch[..len]
}

/// Lanes of a strip on this instruction set.
pub(crate) fn lanes_of_strip(kernels: Kernels) -> usize {
    kernels.run(StripLanes)
}

struct StripLanes;
impl Op for StripLanes {
    type Out = usize;
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> usize {
        strip::<S>()
    }
}

/// `strip[c][lane] = x[lane][c]` for `count` tokens, zero in the lanes beyond.
fn transpose(x: &[f32], stride: usize, count: usize, strip: &mut [f32], lanes: usize) {
    const SQUARE: usize = 16;
    for (i, block) in strip.chunks_mut(SQUARE * lanes).enumerate() {
        let cols = block.len() / lanes;
        if count < lanes {
            block.fill(0.0);
        }
        for lane in 0..count {
            let from = &x[lane * stride + i * SQUARE..][..cols];
            for (c, &value) in from.iter().enumerate() {
                block[c * lanes + lane] = value;
            }
        }
    }
}

/// A task with its weight format.
pub(crate) struct Of<T, W> {
    pub(crate) op: T,
    weight: PhantomData<W>,
}

impl<T, W> Of<T, W> {
    pub(crate) fn new(op: T) -> Self {
        Self { op, weight: PhantomData }
    }
}

/// All tokens of a block with some rows of W.
struct RowsTask<'a> {
    w: Matrix<'a>,
    strips: &'a [f32],
    tokens: usize,
    panel: &'a mut [f32],
    /// `[rows, width]`, zero at first.
    sums: &'a mut [f32],
    width: usize,
}

impl<W: Weight> Op for Of<RowsTask<'_>, W> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let RowsTask { w, strips, tokens, panel, sums, width } = self.op;
        let strip_floats = strip::<S>() * w.cols();
        Floats { w, from: 0, strips, strip_floats, first: 0 }.add::<S, W>(s, tokens, panel, sums, width);
    }
}

/// Rows of W from column `from` on, and those columns of the tokens as strips of `strip_floats`, in each from `first` on.
pub(crate) struct Floats<'a> {
    pub(crate) w: Matrix<'a>,
    pub(crate) from: usize,
    pub(crate) strips: &'a [f32],
    pub(crate) strip_floats: usize,
    pub(crate) first: usize,
}

impl Floats<'_> {
    /// Adds their products to `sums`, `[rows, width]`.
    #[inline(always)]
    pub(crate) fn add<S: Simd, W: Weight>(
        &self,
        s: S,
        tokens: usize,
        panel: &mut [f32],
        sums: &mut [f32],
        width: usize,
    ) {
        let Self { w, from, strips, strip_floats, first } = *self;
        let (rows, cols, lanes) = (w.rows(), w.cols(), strip::<S>());
        assert!(panel.len() >= rows * A_STRIDE && sums.len() >= rows * width);
        assert!(width >= tokens.next_multiple_of(lanes) && strip_floats >= first + lanes * (cols - from));
        assert!(strips.len() >= tokens.div_ceil(lanes) * strip_floats);
        for at in (from..cols).step_by(BLOCK) {
            let k = BLOCK.min(cols - at);
            for r in 0..rows {
                let ahead = w.row((r + ROWS_AHEAD).min(rows - 1)).places();
                ask(s, ahead.values.wrapping_add(W::bytes(at)), W::bytes(k));
                // SAFETY: the row has columns `at..at + k`, and row `r` of the panel has A_STRIDE >= k places.
                unsafe { widen::<S, W>(s, w.row(r).places(), at, panel.as_mut_ptr().add(r * A_STRIDE), k) };
            }
            for t in (0..tokens).step_by(lanes) {
                let used = lanes.min(tokens - t);
                // SAFETY: the asserts above cover `rows` rows of the panel and of the sums, and strips of all columns.
                unsafe {
                    let b = strips.as_ptr().add(t / lanes * strip_floats + first + (at - from) * lanes);
                    let (a, c) = (panel.as_ptr(), sums.as_mut_ptr().add(t));
                    StripOfTiles::<true> { rows, lanes: used, k, a, b, c, c_stride: width }.compute(s);
                }
            }
        }
    }
}

/// Some tokens with all rows and some columns of W.
struct ColsTask<'a> {
    shape: Shape<'a>,
    /// First token.
    first: usize,
    tokens: usize,
    /// First column.
    start: usize,
    cols: usize,
    panel: &'a mut [f32],
    factors: &'a mut [f32],
    /// Token `first`, column `start`.
    y: *mut f32,
}

impl<W: Weight> Op for Of<ColsTask<'_>, W> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let ColsTask { shape, first, tokens, start, cols, panel, factors, y } = self.op;
        let Shape { w, input, stride, .. } = shape;
        let lanes = strip::<S>();
        assert!(start + cols <= w.cols(), "columns of a row");
        assert!(panel.len() >= BLOCK * cols.next_multiple_of(lanes) && factors.len() >= tokens * A_STRIDE);
        for at in (0..w.rows()).step_by(BLOCK) {
            let k = BLOCK.min(w.rows() - at);
            for r in 0..k {
                let here = w.row(at + r).places();
                let ahead = w.row((at + r + ROWS_AHEAD).min(w.rows() - 1)).places();
                ask(s, ahead.values.wrapping_add(W::bytes(start)), W::bytes(cols));
                for (i, c) in (0..cols).step_by(lanes).enumerate() {
                    // SAFETY: columns `c..cols` are in the row; strip `i` of the panel has BLOCK rows of `lanes`.
                    unsafe {
                        let to = panel.as_mut_ptr().add((i * BLOCK + r) * lanes);
                        widen::<S, W>(s, here, start + c, to, lanes.min(cols - c));
                    }
                }
            }
            for t in 0..tokens {
                factors[t * A_STRIDE..][..k].copy_from_slice(&input[(first + t) * stride + at..][..k]);
            }
            for (i, c) in (0..cols).step_by(lanes).enumerate() {
                let b = panel[i * BLOCK * lanes..].as_ptr();
                let a = factors.as_ptr();
                if cols - c >= lanes {
                    // SAFETY: the asserts cover the panel and the factors; the task owns its tokens' columns of `y`.
                    unsafe {
                        let (c, c_stride) = (y.add(c), w.cols());
                        StripOfTiles::<false> { rows: tokens, lanes, k, a, b, c, c_stride }.compute(s);
                    }
                    continue;
                }
                // A tail goes through a buffer of whole vectors.
                let left = cols - c;
                for t in 0..tokens {
                    let mut buffer = [0f32; 2 * LANES_MAX];
                    // SAFETY: as above, one token at a time; the buffer takes a whole strip.
                    unsafe {
                        let place = y.add(t * w.cols() + c);
                        std::ptr::copy_nonoverlapping(place, buffer.as_mut_ptr(), left);
                        let a = a.add(t * A_STRIDE);
                        let c = buffer.as_mut_ptr();
                        StripOfTiles::<false> { rows: 1, lanes: left, k, a, b, c, c_stride: lanes }.compute(s);
                        std::ptr::copy_nonoverlapping(buffer.as_ptr(), place, left);
                    }
                }
            }
        }
    }
}

/// Asks for `bytes` at `p`.
#[inline(always)]
pub(crate) fn ask<S: Simd>(s: S, p: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(64) {
        s.prefetch(p.wrapping_add(line));
    }
}
