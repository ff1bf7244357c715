//! Dot products of rows with one vector: `y = W x`, and the same for rows anywhere in an arena.
//!
//! A row's sum has a fixed order that depends on the number of columns alone: two vectors of partial sums, taken in
//! turns along the row, then added up. So it does not matter which rows are computed together, nor on which thread. Rows of
//! integers meet a rounded vector (`whole.rs`), their tails f32.
#![expect(unsafe_code, reason = "vector loads through pointers")]

use std::marker::PhantomData;

use crate::dispatch::Kernels;
use crate::element::Element;
use crate::matrix::Matrix;
use crate::row::{Places, Row};
use crate::simd::{Op, Simd, Weight, with_weight};
use crate::threads::Threads;
use crate::whole::{INPUT_BLOCK, Input, add_dots, whole_cols};

/// Rows whose sums are computed together.
pub(crate) const ROWS_AT_ONCE: usize = 4;
/// Weights of one task, at most: large beside the cost of handing it out, small beside a layer.
pub const TASK_BYTES: usize = 256 << 10;
/// Weights of one task, at least, where a matrix is small.
const TASK_BYTES_MIN: usize = 16 << 10;
/// Tasks for each thread, where a matrix is large enough: with few, one thread waits for another's last.
const TASKS_PER_THREAD: usize = 8;
/// How far ahead of the sums a row is asked for, in bytes.
const AHEAD: usize = 2048;

/// `y = W x`, on all threads.
///
/// # Panics
/// If `x` has not `w.cols()` or `y` not `w.rows()` elements.
pub fn matvec(threads: &Threads, w: Matrix<'_>, x: &[f32], y: &mut [f32]) {
    Kernels::get().matvec(threads, w, x, y);
}

/// [`matvec`], where the caller also calls `beside` now and then, as in [`Threads::run_beside`]; the same bits.
///
/// # Panics
/// As [`matvec`].
pub fn matvec_beside(threads: &Threads, w: Matrix<'_>, x: &[f32], y: &mut [f32], beside: &mut dyn FnMut()) {
    Kernels::get().matvec_beside(threads, w, x, y, beside);
}

/// [`matvec`] on the calling thread; the same bits.
///
/// # Panics
/// As [`matvec`].
pub fn matvec_serial(w: Matrix<'_>, x: &[f32], y: &mut [f32]) {
    Kernels::get().matvec_serial(w, x, y);
}

/// The dot product of one row with `x`; the same bits as [`matvec`].
///
/// # Panics
/// If `row` does not hold exactly `x.len()` elements.
pub fn dot<'a>(element: Element, row: impl Into<Row<'a>>, x: &[f32]) -> f32 {
    Kernels::get().dot(element, row, x)
}

/// Rows that lie anywhere: the i-th row, to what it holds.
pub type RowAt<'a> = dyn Fn(usize) -> Row<'a> + Sync + 'a;

/// `y[i]` = dot product of `x` with row `i` of `rows`, on all threads; the same bits as [`matvec`].
///
/// # Panics
/// If a row does not hold exactly `x.len()` elements.
pub fn gathered_dots(threads: &Threads, element: Element, rows: &RowAt<'_>, x: &[f32], y: &mut [f32]) {
    Kernels::get().gathered_dots(threads, element, rows, x, y);
}

impl Kernels {
    /// [`matvec`] on this instruction set.
    pub fn matvec(self, threads: &Threads, w: Matrix<'_>, x: &[f32], y: &mut [f32]) {
        self.matvec_beside(threads, w, x, y, &mut || {});
    }

    /// [`matvec_beside`] on this instruction set.
    pub fn matvec_beside(self, threads: &Threads, w: Matrix<'_>, x: &[f32], y: &mut [f32], beside: &mut dyn FnMut()) {
        assert_eq!(x.len(), w.cols(), "matvec: elements of x against columns");
        assert_eq!(y.len(), w.rows(), "matvec: elements of y against rows");
        let chunk = rows_per_task(threads, w.rows(), w.row_bytes());
        self.with_inputs(w.element(), one(x), |x| {
            threads.chunks_mut_beside(y, chunk, beside, &|index, y| {
                let start = index * chunk;
                self.dots(w.element(), &RowsOf(w.rows_range(start..start + y.len())), x.token(0), y);
            });
        });
    }

    /// [`matvec_serial`] on this instruction set.
    pub fn matvec_serial(self, w: Matrix<'_>, x: &[f32], y: &mut [f32]) {
        assert_eq!(x.len(), w.cols(), "matvec: elements of x against columns");
        assert_eq!(y.len(), w.rows(), "matvec: elements of y against rows");
        self.with_inputs(w.element(), one(x), |x| self.dots(w.element(), &RowsOf(w), x.token(0), y));
    }

    /// [`dot`] on this instruction set.
    pub fn dot<'a>(self, element: Element, row: impl Into<Row<'a>>, x: &[f32]) -> f32 {
        let mut y = [0.0];
        self.with_inputs(element, one(x), |x| self.dots(element, &OneRow(row.into()), x.token(0), &mut y));
        y[0]
    }

    /// [`gathered_dots`] on this instruction set.
    pub fn gathered_dots(self, threads: &Threads, element: Element, rows: &RowAt<'_>, x: &[f32], y: &mut [f32]) {
        let chunk = rows_per_task(threads, y.len(), element.row_bytes(x.len()));
        self.with_inputs(element, one(x), |x| {
            threads.chunks_mut(y, chunk, &|index, y| {
                self.dots(element, &Gathered { rows, first: index * chunk }, x.token(0), y);
            });
        });
    }

    pub(crate) fn dots(self, element: Element, rows: &dyn Rows, x: Input<'_>, y: &mut [f32]) {
        with_weight!(element, W => self.run(Dots { rows, element, x, y, weight: PhantomData::<W> }));
    }
}

/// One vector, for [`Kernels::with_inputs`].
fn one(x: &[f32]) -> (&[f32], usize, usize, usize) {
    (x, 1, x.len(), x.len())
}

/// Rows per task: enough bytes, a multiple of the rows taken together, and some tasks for each thread.
pub(crate) fn rows_per_task(threads: &Threads, rows: usize, row_bytes: usize) -> usize {
    if threads.count() == 1 {
        return rows.max(1);
    }
    let bytes = (rows * row_bytes / (threads.count() * TASKS_PER_THREAD)).clamp(TASK_BYTES_MIN, TASK_BYTES);
    (bytes / row_bytes.max(1)).clamp(1, rows.max(1)).next_multiple_of(ROWS_AT_ONCE)
}

/// A list of rows of equal length.
pub(crate) trait Rows: Sync {
    fn row(&self, i: usize) -> Row<'_>;

    /// The places of rows `first..`, each of `cols` elements, which is checked. Rows beyond `last` stand for it.
    fn places(&self, first: usize, last: usize, element: Element, cols: usize) -> [Places; ROWS_AT_ONCE] {
        std::array::from_fn(|j| {
            let row = self.row((first + j).min(last));
            row.check(element, cols);
            row.places()
        })
    }
}

struct RowsOf<'a>(Matrix<'a>);
impl Rows for RowsOf<'_> {
    fn row(&self, i: usize) -> Row<'_> {
        self.0.row(i)
    }

    /// A matrix was checked when it was made.
    fn places(&self, first: usize, last: usize, element: Element, cols: usize) -> [Places; ROWS_AT_ONCE] {
        assert!(self.0.element() == element && self.0.cols() == cols, "rows of another shape");
        let mut places = [self.0.places(first.min(last)); ROWS_AT_ONCE];
        for j in 1..ROWS_AT_ONCE {
            places[j] = self.0.places((first + j).min(last));
        }
        places
    }
}

struct OneRow<'a>(Row<'a>);
impl Rows for OneRow<'_> {
    fn row(&self, _: usize) -> Row<'_> {
        self.0
    }
}

pub(crate) struct Gathered<'a, 'r> {
    pub(crate) rows: &'a RowAt<'r>,
    pub(crate) first: usize,
}
impl Rows for Gathered<'_, '_> {
    fn row(&self, i: usize) -> Row<'_> {
        (self.rows)(self.first + i)
    }
}

struct Dots<'a, W> {
    /// Dynamic, as one call for a few rows is nothing beside them, and code for every kind of list would be much.
    rows: &'a dyn Rows,
    element: Element,
    x: Input<'a>,
    y: &'a mut [f32],
    weight: PhantomData<W>,
}

impl<W: Weight> Op for Dots<'_, W> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { rows, element, x, y, weight: _ } = self;
        let count = y.len();
        if count == 0 {
            return;
        }
        let shift = rows.row(0).places().shift;
        // Rows beyond the last are only asked for.
        let pointers = |i: usize| -> [Places; ROWS_AT_ONCE] {
            let places = rows.places(i, count - 1, element, x.floats.len());
            assert!(places.iter().all(|row| row.shift == shift), "rows with groups of other sizes");
            places
        };
        let mut here = pointers(0);
        let mut i = 0;
        loop {
            let left = count - i;
            if left < ROWS_AT_ONCE {
                for (j, y) in y[i..].iter_mut().enumerate() {
                    // SAFETY: `pointers` checked each row's length against `x`.
                    *y = unsafe { dots::<S, W, 1, 1>(s, [here[j]], [here[j + 1]], [x]) }[0][0];
                }
                return;
            }
            let next = pointers(i + ROWS_AT_ONCE);
            // SAFETY: as above.
            let sums = unsafe { dots::<S, W, ROWS_AT_ONCE, 1>(s, here, next, [x]) };
            y[i..i + ROWS_AT_ONCE].copy_from_slice(sums.as_flattened());
            (here, i) = (next, i + ROWS_AT_ONCE);
        }
    }
}

/// The dot products of `R` rows with `T` vectors of equal length. Every pair's sum has the same order, whatever `R` and `T`.
///
/// `next` are the rows wanted after these: their beginnings are asked for in time.
///
/// # Safety
/// Each of `rows` and `next` must hold as many elements as each of `xs`; all must have groups of the same size.
#[inline(always)]
pub(crate) unsafe fn dots<S: Simd, W: Weight, const R: usize, const T: usize>(
    s: S,
    rows: [Places; R],
    next: [Places; R],
    xs: [Input<'_>; T],
) -> [[f32; T]; R] {
    for row in next {
        W::ask_scales(s, row, xs[0].floats.len());
    }
    if !W::WHOLE {
        // SAFETY: as the caller vouches.
        return unsafe { float_dots::<S, W, R, T>(s, rows, next, xs, 0, [[s.splat(0.0); T]; R]) };
    }
    let cols = xs[0].floats.len();
    let whole = whole_cols(cols);
    let row_bytes = W::bytes(whole);
    let ask = |r: usize, at: usize| {
        let mut line = 0;
        while line < W::bytes(INPUT_BLOCK) {
            let ahead = W::bytes(at) + line + AHEAD;
            let place = if ahead < row_bytes { rows[r].values } else { next[r].values.wrapping_sub(row_bytes) };
            s.prefetch(place.wrapping_add(ahead));
            line += 64;
        }
    };
    let mut lanes = [[s.splat(0.0); T]; R];
    // SAFETY: as the caller vouches.
    unsafe {
        add_dots::<S, W, R, T>(s, rows, xs, &mut lanes, ask);
        float_dots::<S, W, R, T>(s, rows, next, xs, whole, lanes)
    }
}

/// What [`dots`] says, in f32, from element `first` on, a multiple of two vectors, on top of `even`.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn float_dots<S: Simd, W: Weight, const R: usize, const T: usize>(
    s: S,
    rows: [Places; R],
    next: [Places; R],
    xs: [Input<'_>; T],
    first: usize,
    mut even: [[S::V; T]; R],
) -> [[f32; T]; R] {
    let cols = xs[0].floats.len();
    let xs = xs.map(|x| x.floats.as_ptr());
    let step = 2 * S::LANES;
    let steps = cols / step;
    let steps_ahead = AHEAD / W::bytes(step);
    let steps_here = steps.saturating_sub(steps_ahead);
    let row_bytes = W::bytes(steps * step);
    let mut odd = [[s.splat(0.0); T]; R];
    let mut range = first / step..steps_here;
    let mut ask = rows.map(|row| row.values.wrapping_add(AHEAD));
    // First the part whose look-ahead stays within these rows, then the part that asks for the next ones.
    for part in 0..2 {
        if part == 1 {
            range = steps_here.max(first / step)..steps;
            ask = next.map(|row| row.values.wrapping_add(AHEAD).wrapping_sub(row_bytes.max(AHEAD)));
        }
        for i in range.clone() {
            let at = i * step;
            // SAFETY: `at + step <= cols`, and the caller vouches for as many elements.
            unsafe {
                let (mut x0, mut x1) = ([s.splat(0.0); T], [s.splat(0.0); T]);
                for t in 0..T {
                    (x0[t], x1[t]) = (s.load(xs[t].add(at)), s.load(xs[t].add(at + S::LANES)));
                }
                for r in 0..R {
                    let mut line = 0;
                    while !W::WHOLE && line < W::bytes(step) {
                        s.prefetch(ask[r].wrapping_add(W::bytes(at) + line));
                        line += 64;
                    }
                    let [w0, w1] = W::load_two(s, rows[r], at);
                    for t in 0..T {
                        even[r][t] = s.fma(w0, x0[t], even[r][t]);
                        odd[r][t] = s.fma(w1, x1[t], odd[r][t]);
                    }
                }
            }
        }
    }
    // The tails' operands come first, each in a loop of its own, so that the loops over sums stay small enough to be
    // unrolled: indexed by a variable, the sums would live in memory. Loops, as a closure that is not inlined would be compiled for
    // another instruction set.
    let (mut w, mut x) = ([s.splat(0.0); R], [s.splat(0.0); T]);
    let mut at = steps * step;
    if cols - at >= S::LANES {
        // SAFETY: `at + LANES <= cols`.
        unsafe {
            for r in 0..R {
                w[r] = W::load(s, rows[r], at);
            }
            for t in 0..T {
                x[t] = s.load(xs[t].add(at));
            }
        }
        for r in 0..R {
            for t in 0..T {
                even[r][t] = s.fma(w[r], x[t], even[r][t]);
            }
        }
        at += S::LANES;
    }
    if at < cols {
        let left = cols - at;
        // SAFETY: `left` elements are left, fewer than LANES.
        unsafe {
            for r in 0..R {
                w[r] = W::load_part(s, rows[r], at, left);
            }
            for t in 0..T {
                x[t] = s.load_part(xs[t].add(at), left);
            }
        }
        for r in 0..R {
            for t in 0..T {
                odd[r][t] = s.fma(w[r], x[t], odd[r][t]);
            }
        }
    }
    for r in 0..R {
        for t in 0..T {
            even[r][t] = s.add(even[r][t], odd[r][t]);
        }
    }
    let mut sums = [[0.0; T]; R];
    let (fours, rest) = even.as_flattened().as_chunks::<4>();
    let (sums_of_fours, sums_of_rest) = sums.as_flattened_mut().as_chunks_mut::<4>();
    sums_of_fours.iter_mut().zip(fours).for_each(|(sums, four)| *sums = s.sum_four(*four));
    sums_of_rest.iter_mut().zip(rest).for_each(|(sum, v)| *sum = s.sum(*v));
    sums
}
