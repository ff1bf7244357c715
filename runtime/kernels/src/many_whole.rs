//! Matrix products of many tokens with rows of integers: the vectors are rounded as for dot products (`whole.rs`), and products
//! and sums within a group of weights are taken in integers. Elements after the last block meet the tokens in f32.
//!
//! An output's sum runs over the groups in order, so how outputs are shared among tasks changes no bit.
#![expect(unsafe_code, reason = "tasks write disjoint parts of one output and use their thread's part of the scratch")]

use crate::dispatch::Kernels;
use crate::many::{
    Floats, Of, PAD, ROWS_AHEAD, Shape, TASK_ROWS, ask, lanes_of_strip, largest_block, room, strips_width,
    tokens_of_block,
};
use crate::matrix::Matrix;
use crate::simd::{Op, Simd, Weight, with_weight};
use crate::threads::{SendPtr, Threads};
use crate::tile::{A_STRIDE, BLOCK, strip};
use crate::whole::{INPUT_BLOCK, Inputs, PIECE_MIN, whole_cols};

/// Groups of weights in one block of the sum, at most.
const GROUPS_MAX: usize = BLOCK / PIECE_MIN;
/// From one row of the panel of integers to the next: as `A_STRIDE`, out of one another's cache sets.
const PANEL_STRIDE: usize = BLOCK + 32;

/// Floats that hold this many integers of 16 bits.
const fn floats_of(numbers: usize) -> usize {
    numbers.div_ceil(2)
}

/// Floats of a thread's own: sums, scales, and rows of integers or, later, of the elements after the last block.
pub(crate) fn own_floats(width: usize) -> usize {
    TASK_ROWS * (width + PAD + GROUPS_MAX + A_STRIDE)
}
const _: () = assert!(floats_of(PANEL_STRIDE) <= A_STRIDE);

/// Floats that the vectors of a block of tokens take, as strips.
pub(crate) fn strips_floats(width: usize, cols: usize) -> usize {
    let whole = whole_cols(cols);
    width * (floats_of(whole) + whole.div_ceil(INPUT_BLOCK) + cols - whole)
}

/// Where the parts of a block's vectors lie, in floats: integers, scales, and the elements after the last block.
struct Strips {
    numbers: usize,
    scales: usize,
    rest: usize,
}

impl Strips {
    /// Of one strip of `lanes` tokens.
    fn new(lanes: usize, cols: usize) -> Self {
        let whole = whole_cols(cols);
        let (numbers, blocks) = (floats_of(lanes * whole), whole.div_ceil(INPUT_BLOCK));
        Self { numbers, scales: lanes * blocks, rest: lanes * (cols - whole) }
    }

    fn floats(&self) -> usize {
        self.numbers + self.scales + self.rest
    }
}

impl Kernels {
    /// `y[t, r] = sum over c of x[t, c] W[r, c]`, for rows of integers. `y` holds `tokens` rows every `y_stride >= w.rows()`.
    pub(crate) fn matmul_many_whole(
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
        let own_len = own_floats(width);
        let scratch = room(scratch, strips_floats(width, w.cols()) + threads.count() * own_len);
        let (strips, own) = scratch.split_at_mut(strips_floats(width, w.cols()));
        let (y, own) = (SendPtr(y.as_mut_ptr()), SendPtr(own.as_mut_ptr()));
        let lanes = lanes_of_strip(self);
        let of_strip = Strips::new(lanes, w.cols());
        for first in (0..tokens).step_by(block) {
            let count = block.min(tokens - first);
            let x = &shape.input[first * shape.stride..];
            self.with_inputs(w.element(), (x, count, w.cols(), shape.stride), |inputs| {
                let used = &mut strips[..count.div_ceil(lanes) * of_strip.floats()];
                threads.chunks_mut(used, of_strip.floats().max(1), &|index, strip| {
                    interleave(inputs, index * lanes..count.min((index + 1) * lanes), lanes, &of_strip, strip);
                });
                let strips = &*used;
                threads.run_indexed(w.rows().div_ceil(TASK_ROWS), &|task, thread| {
                    let start = task * TASK_ROWS;
                    let rows = w.rows_range(start..w.rows().min(start + TASK_ROWS));
                    // SAFETY: each thread has its own part of the scratch, and no two tasks run on one thread at once.
                    let own = unsafe { std::slice::from_raw_parts_mut(own.get().add(thread * own_len), own_len) };
                    let sums_len = rows.rows() * (width + PAD);
                    own[..sums_len].fill(0.0);
                    let op = RowsTask {
                        w: rows,
                        strips,
                        of_strip: &of_strip,
                        tokens: count,
                        own: &mut *own,
                        width: width + PAD,
                    };
                    with_weight!(w.element(), W => self.run(Of::<_, W>::new(op)));
                    for t in 0..count {
                        for r in 0..rows.rows() {
                            // SAFETY: the caller checked that `y` holds token `first + t < tokens` and row `start + r`; this
                            // task alone writes them.
                            unsafe { *y.get().add((first + t) * y_stride + start + r) = own[r * (width + PAD) + t] };
                        }
                    }
                });
            });
        }
    }
}

/// Puts the vectors of a strip's tokens side by side: pairs of integers, the scales of blocks, and what is behind the last block.
/// Lanes without a token are zero.
fn interleave(inputs: Inputs<'_>, tokens: std::ops::Range<usize>, lanes: usize, of: &Strips, strip: &mut [f32]) {
    if tokens.len() < lanes {
        strip.fill(0.0);
    }
    let (numbers, floats) = strip.split_at_mut(of.numbers);
    let (scales, rest) = floats.split_at_mut(of.scales);
    for (lane, token) in tokens.enumerate() {
        let input = inputs.token(token);
        for (pair, to) in input.numbers.as_chunks::<2>().0.iter().zip(numbers.iter_mut().skip(lane).step_by(lanes)) {
            let [first, second] = pair.map(i16::to_ne_bytes);
            *to = f32::from_ne_bytes([first[0], first[1], second[0], second[1]]);
        }
        let behind = &input.floats[input.numbers.len()..];
        scales.iter_mut().skip(lane).step_by(lanes).zip(input.scales).for_each(|(to, scale)| *to = *scale);
        rest.iter_mut().skip(lane).step_by(lanes).zip(behind).for_each(|(to, value)| *to = *value);
    }
}

/// All tokens of a block with some rows of W.
struct RowsTask<'a> {
    w: Matrix<'a>,
    strips: &'a [f32],
    of_strip: &'a Strips,
    tokens: usize,
    /// Sums `[rows, width]`, zero at first, then the panels.
    own: &'a mut [f32],
    width: usize,
}

impl<W: Weight> Op for Of<RowsTask<'_>, W> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let RowsTask { w, strips, of_strip, tokens, own, width } = self.op;
        let (rows, cols, lanes) = (w.rows(), w.cols(), strip::<S>());
        let whole = whole_cols(cols);
        assert!(width >= tokens.next_multiple_of(lanes) && strips.len() >= tokens.div_ceil(lanes) * of_strip.floats());
        let (sums, own) = own.split_at_mut(rows * width);
        let (scales, own) = own.split_at_mut(rows * GROUPS_MAX);
        let panel = &mut own[..rows * A_STRIDE];
        let numbers = panel.as_mut_ptr().cast::<i16>();
        // A group of weights, or a block of the vectors.
        let group = match w.row(0).places().shift {
            shift @ (5 | 6) => 1 << shift,
            _ => INPUT_BLOCK,
        };
        for at in (0..whole).step_by(BLOCK) {
            let k = BLOCK.min(whole - at);
            // The last block of the vectors may be shorter than a group, and then ends with it.
            let groups = k.div_ceil(group);
            for r in 0..rows {
                let ahead = w.row((r + ROWS_AHEAD).min(rows - 1)).places();
                ask(s, ahead.values.wrapping_add(W::bytes(at)), W::bytes(k));
                let row = w.row(r).places();
                // SAFETY: the row has elements `at..at + k`, and row `r` of the panel has room for them.
                unsafe { W::unpack(row, at, std::slice::from_raw_parts_mut(numbers.add(r * PANEL_STRIDE), k)) };
                for g in 0..groups {
                    // SAFETY: element `at + g * group` is in the row.
                    scales[r * GROUPS_MAX + g] = unsafe { W::scale_of(row, at + g * group) };
                }
            }
            for t in (0..tokens).step_by(lanes) {
                let part = &strips[t / lanes * of_strip.floats()..][..of_strip.floats()];
                let tiles = Tiles {
                    rows,
                    two: tokens - t > S::LANES,
                    k,
                    group,
                    a: numbers,
                    a_scales: scales.as_ptr(),
                    // Pairs of integers are as large as floats.
                    b: part[at / 2 * lanes..].as_ptr().cast(),
                    b_scales: part[of_strip.numbers + at / INPUT_BLOCK * lanes..].as_ptr(),
                    c: sums[t..].as_mut_ptr(),
                    c_stride: width,
                };
                // SAFETY: rows of the panel, their scales and their sums, and strips of all columns are there, as was asserted.
                unsafe { tiles.compute(s) };
            }
        }
        let rest = Floats {
            w,
            from: whole,
            strips,
            strip_floats: of_strip.floats(),
            first: of_strip.numbers + of_strip.scales,
        };
        rest.add::<S, W>(s, tokens, panel, sums, width);
    }
}

/// One strip of C, over one block of the sum: `C[m][lane] += sum over groups g, in order, of (sum over k in g of A[m][k] *
/// B[k][lane]) * a_scale[m][g] * b_scale[lane]`. Whoever runs it answers for the arrays.
struct Tiles {
    rows: usize,
    /// Whether both vectors of lanes have tokens.
    two: bool,
    /// Elements, a multiple of [`PIECE_MIN`].
    k: usize,
    /// Elements of a group: they share their scales.
    group: usize,
    /// `rows` rows every [`PANEL_STRIDE`].
    a: *const i16,
    /// Of each row, every [`GROUPS_MAX`].
    a_scales: *const f32,
    /// `k / 2` rows of [`strip`] pairs.
    b: *const i16,
    /// A row of [`strip`] values for each [`INPUT_BLOCK`] elements.
    b_scales: *const f32,
    c: *mut f32,
    c_stride: usize,
}

impl Tiles {
    /// # Safety
    /// The arrays must be as large as [`Tiles`] says, and `c` nobody else's.
    #[inline(always)]
    unsafe fn compute<S: Simd>(self, s: S) {
        s.vectorize(Vouched(self));
    }
}

/// Tiles whose arrays their maker vouches for: only `compute` makes one.
struct Vouched(Tiles);

impl Op for Vouched {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut m = 0;
        macro_rules! tiles_of {
            ($M:literal) => {
                while self.0.rows - m >= $M {
                    // SAFETY: rows `m..m + M` exist, as the caller of `compute` vouches.
                    unsafe {
                        if self.0.two {
                            tile::<S, $M, 2>(s, &self.0, m);
                        } else {
                            tile::<S, $M, 1>(s, &self.0, m);
                        }
                    }
                    m += $M;
                }
            };
        }
        // The tile's accumulators, a row of B and one pair of A fill the registers.
        if S::MANY_REGISTERS {
            tiles_of!(12);
        } else {
            tiles_of!(6);
        }
        tiles_of!(4);
        tiles_of!(1);
    }
}

/// # Safety
/// As [`Tiles`], from row `first` on, with `M` rows and `V` vectors.
#[inline(always)]
unsafe fn tile<S: Simd, const M: usize, const V: usize>(s: S, tiles: &Tiles, first: usize) {
    let Tiles { k, group, b, b_scales, c_stride, .. } = *tiles;
    let lanes = strip::<S>();
    // SAFETY: rows below `M`, vectors below `V` and elements below `k` exist, as the caller vouches.
    unsafe {
        let a = tiles.a.add(first * PANEL_STRIDE);
        let a_scales = tiles.a_scales.add(first * GROUPS_MAX);
        let c = tiles.c.add(first * c_stride);
        for (g, at) in (0..k).step_by(group).enumerate() {
            let mut sums = [[s.no_sums(); V]; M];
            for i in (at..k.min(at + group)).step_by(2) {
                let row: [S::Pairs; V] = std::array::from_fn(|v| s.load_pairs(b.add(i * lanes + v * 2 * S::LANES)));
                for m in 0..M {
                    let pair = s.splat_pair(a.add(m * PANEL_STRIDE + i));
                    for v in 0..V {
                        sums[m][v] = s.add_pairs(sums[m][v], pair, row[v]);
                    }
                }
            }
            let scales: [S::V; V] =
                std::array::from_fn(|v| s.load(b_scales.add(at / INPUT_BLOCK * lanes + v * S::LANES)));
            for m in 0..M {
                let scale = s.splat(*a_scales.add(m * GROUPS_MAX + g));
                for v in 0..V {
                    let place = c.add(m * c_stride + v * S::LANES);
                    s.store(place, s.fma(s.floats(sums[m][v]), s.mul(scale, scales[v]), s.load(place)));
                }
            }
        }
    }
}

/// The most that the products of up to `tokens` tokens keep.
pub(crate) fn floats_needed(threads: usize, tokens: usize, cols: usize) -> usize {
    let width = strips_width(largest_block(tokens));
    strips_floats(width, cols) + threads * own_floats(width)
}

const _: () = assert!(BLOCK.is_multiple_of(INPUT_BLOCK) && INPUT_BLOCK.is_multiple_of(PIECE_MIN));
