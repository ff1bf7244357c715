//! Matrix products of a few tokens: each row of weights is read from memory once and meets every token from the cache.
//!
//! Bit for bit what one token at a time gives.
#![expect(unsafe_code, reason = "tasks write disjoint parts of one output through pointers")]

use crate::dispatch::Kernels;
use crate::many::{Of, Shape};
use crate::matrix::Matrix;
use crate::matvec::{ROWS_AT_ONCE, dots, rows_per_task};
use crate::row::Places;
use crate::rows::{self, cols_per_task};
use crate::simd::{Op, Simd, Weight, with_weight};
use crate::threads::{SendPtr, Threads};
use crate::whole::Inputs;

/// [`matvec`](crate::matvec()) for each of `tokens` vectors, with the weights read once for all of them: `x` is `[tokens, cols]`, `y`
/// `[tokens, rows]`. The caller also calls `beside` now and then, as in [`Threads::run_beside`]. A token's bits do not depend on the
/// others.
///
/// # Panics
/// If `x` has not `tokens * w.cols()` or `y` not `tokens * w.rows()` elements.
pub fn matvec_each(
    threads: &Threads,
    w: Matrix<'_>,
    x: &[f32],
    tokens: usize,
    y: &mut [f32],
    beside: &mut dyn FnMut(),
) {
    assert_eq!(x.len(), tokens * w.cols(), "matvec_each: elements of x against tokens * columns");
    assert_eq!(y.len(), tokens * w.rows(), "matvec_each: elements of y against tokens * rows");
    let shape = Shape { w, input: x, stride: w.cols(), tokens };
    Kernels::get().matmul_few(threads, shape, y, w.rows(), beside);
}

/// Several vectors in one slice: `count` of them, the `i`-th from `i * stride` on.
#[derive(Clone, Copy, Debug)]
pub struct Vectors {
    /// How many.
    pub count: usize,
    /// From one to the next.
    pub stride: usize,
}

impl Vectors {
    /// # Panics
    /// If `len` elements do not hold all vectors of `width`.
    fn check(self, len: usize, width: usize) {
        let needed = self.count.checked_sub(1).map_or(0, |last| last * self.stride + width);
        assert!(self.stride >= width && len >= needed, "{} vectors of {width} in {len} elements", self.count);
    }
}

/// [`matvec_serial`](crate::matvec_serial) for each of some vectors, with the weights read once for all of them: the scores of queries.
///
/// # Panics
/// If `x` does not hold vectors of `w.cols()` or `y` as many of `w.rows()` elements.
pub fn matvec_each_serial(w: Matrix<'_>, x: (&[f32], Vectors), y: &mut [f32], y_stride: usize) {
    Kernels::get().matvec_each_serial(w, x, y, y_stride);
}

/// [`add_weighted_rows_serial`](crate::add_weighted_rows_serial) for each of some vectors of coefficients, with the rows read once for
/// all of them.
///
/// # Panics
/// If `a` does not hold vectors of `w.rows()` or `y` as many of `w.cols()` elements.
pub fn add_weighted_rows_each_serial(w: Matrix<'_>, a: (&[f32], Vectors), y: &mut [f32], y_stride: usize) {
    Kernels::get().add_weighted_rows_each_serial(w, a, y, y_stride);
}

impl Kernels {
    /// [`matvec_each_serial`] on this instruction set.
    pub fn matvec_each_serial(self, w: Matrix<'_>, (x, of): (&[f32], Vectors), y: &mut [f32], y_stride: usize) {
        of.check(x.len(), w.cols());
        Vectors { stride: y_stride, ..of }.check(y.len(), w.rows());
        if w.rows() == 0 {
            return;
        }
        self.with_inputs(w.element(), (x, of.count, w.cols(), of.stride), |inputs| {
            let op = FewDots { w, tokens: of.count, inputs, y: y.as_mut_ptr(), y_stride };
            with_weight!(w.element(), W => self.run(Of::<_, W>::new(op)));
        });
    }

    /// [`add_weighted_rows_each_serial`] on this instruction set.
    pub fn add_weighted_rows_each_serial(
        self,
        w: Matrix<'_>,
        (a, of): (&[f32], Vectors),
        y: &mut [f32],
        y_stride: usize,
    ) {
        of.check(a.len(), w.rows());
        Vectors { stride: y_stride, ..of }.check(y.len(), w.cols());
        if of.count == 0 {
            return;
        }
        let shape = Shape { w, input: a, stride: of.stride, tokens: of.count };
        let op = FewSums { shape, start: 0, cols: w.cols(), y: y.as_mut_ptr(), y_stride };
        with_weight!(w.element(), W => self.run(Of::<_, W>::new(op)));
    }

    /// `y[t, r] = sum over c of x[t, c] W[r, c]`. `y` holds `tokens` rows every `y_stride >= w.rows()`.
    pub(crate) fn matmul_few(
        self,
        threads: &Threads,
        shape: Shape<'_>,
        y: &mut [f32],
        y_stride: usize,
        beside: &mut dyn FnMut(),
    ) {
        let Shape { w, .. } = shape;
        if shape.tokens == 0 {
            return;
        }
        let chunk = rows_per_task(threads, w.rows(), w.row_bytes());
        let y = SendPtr(y.as_mut_ptr());
        self.with_inputs(w.element(), (shape.input, shape.tokens, w.cols(), shape.stride), |inputs| {
            threads.run_beside(w.rows().div_ceil(chunk), beside, &|task| {
                let start = task * chunk;
                let w = w.rows_range(start..w.rows().min(start + chunk));
                // SAFETY: there is a token 0, and its row `start` is in `y`.
                let y = unsafe { y.get().add(start) };
                let op = FewDots { w, tokens: shape.tokens, inputs, y, y_stride };
                with_weight!(w.element(), W => self.run(Of::<_, W>::new(op)));
            });
        });
    }

    /// `y[t, c] += sum over r, in order, of a[t, r] W[r, c]`. `y` holds `tokens` rows of `w.cols()`.
    pub(crate) fn matmul_rows_add_few(self, threads: &Threads, shape: Shape<'_>, y: &mut [f32]) {
        let Shape { w, tokens, .. } = shape;
        if tokens == 0 {
            return;
        }
        let chunk = cols_per_task(threads, w.rows(), w.cols(), w.element());
        let y = SendPtr(y.as_mut_ptr());
        threads.run(w.cols().div_ceil(chunk), &|task| {
            let start = task * chunk;
            // SAFETY: there is a token 0, and its column `start` is in `y`.
            let y = unsafe { y.get().add(start) };
            let op = FewSums { shape, start, cols: chunk.min(w.cols() - start), y, y_stride: w.cols() };
            with_weight!(w.element(), W => self.run(Of::<_, W>::new(op)));
        });
    }
}

/// All tokens with some rows of W.
struct FewDots<'a> {
    w: Matrix<'a>,
    tokens: usize,
    inputs: Inputs<'a>,
    /// Token 0, first row.
    y: *mut f32,
    y_stride: usize,
}

impl<W: Weight> Op for Of<FewDots<'_>, W> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let rows = self.op.w.rows();
        let whole = rows / ROWS_AT_ONCE * ROWS_AT_ONCE;
        for r in (0..whole).step_by(ROWS_AT_ONCE) {
            self.op.tokens::<S, W, ROWS_AT_ONCE>(s, r);
        }
        for r in whole..rows {
            self.op.tokens::<S, W, 1>(s, r);
        }
    }
}

impl FewDots<'_> {
    /// Rows `r..r + R` with all tokens: two rows with four tokens at a time, or `R` with two, where the registers suffice.
    #[inline(always)]
    fn tokens<S: Simd, W: Weight, const R: usize>(&self, s: S, r: usize) {
        let (w, tokens) = (self.w, self.tokens);
        let last = w.rows() - 1;
        let (mut here, mut next) = ([w.places(r); R], [w.places((r + R).min(last)); R]);
        for j in 1..R {
            (here[j], next[j]) = (w.places(r + j), w.places((r + R + j).min(last)));
        }
        let mut t = 0;
        if S::MANY_REGISTERS {
            while R.is_multiple_of(2) && t + 4 <= tokens {
                for first in (0..R).step_by(2) {
                    let two = |of: [Places; R]| [of[first], of[first + 1]];
                    self.store::<S, W, 2, 4>(s, r + first, t, two(here), two(next));
                }
                t += 4;
            }
            while t + 2 <= tokens {
                self.store::<S, W, R, 2>(s, r, t, here, next);
                t += 2;
            }
        }
        while t < tokens {
            self.store::<S, W, R, 1>(s, r, t, here, next);
            t += 1;
        }
    }

    #[inline(always)]
    fn store<S: Simd, W: Weight, const R: usize, const T: usize>(
        &self,
        s: S,
        r: usize,
        t: usize,
        here: [Places; R],
        next: [Places; R],
    ) {
        let mut xs = [self.inputs.token(t); T];
        for i in 1..T {
            xs[i] = self.inputs.token(t + i);
        }
        // SAFETY: rows and tokens have `cols` elements each, and the rows of a matrix groups of one size.
        let sums = unsafe { dots::<S, W, R, T>(s, here, next, xs) };
        for j in 0..R {
            for i in 0..T {
                // SAFETY: whoever made this checked that `y` holds every (token, row); this task alone writes its rows.
                unsafe { *self.y.add((t + i) * self.y_stride + r + j) = sums[j][i] };
            }
        }
    }
}

/// All tokens with all rows and some columns of W.
struct FewSums<'a> {
    shape: Shape<'a>,
    /// First column.
    start: usize,
    cols: usize,
    /// Token 0, first column.
    y: *mut f32,
    y_stride: usize,
}

impl<W: Weight> Op for Of<FewSums<'_>, W> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        const ROWS: usize = rows::ROWS_AT_ONCE;
        let rows = self.op.shape.w.rows();
        let whole = rows / ROWS * ROWS;
        for r in (0..whole).step_by(ROWS) {
            self.op.add_rows::<S, W, ROWS>(s, r);
        }
        for r in whole..rows {
            self.op.add_rows::<S, W, 1>(s, r);
        }
    }
}

impl FewSums<'_> {
    /// Adds rows `r..r + R` to all tokens: each vector of each row is widened once.
    #[inline(always)]
    fn add_rows<S: Simd, W: Weight, const R: usize>(&self, s: S, r: usize) {
        let Shape { w, input, stride, tokens } = self.shape;
        let y_stride = self.y_stride;
        assert!(self.start + self.cols <= w.cols(), "columns of a row");
        let last = w.rows() - 1;
        let (mut here, mut next) = ([w.places(r); R], [w.places((r + R).min(last)); R]);
        for j in 1..R {
            (here[j], next[j]) = (w.places(r + j), w.places((r + R + j).min(last)));
        }
        for row in next {
            W::ask_scales(s, row, w.cols());
        }
        let factors = &input[r..];
        assert!(factors.len() >= (tokens - 1) * stride + R, "factors of every token");
        let whole = self.cols / S::LANES * S::LANES;
        for at in (0..whole).step_by(S::LANES) {
            // SAFETY: columns `at..at + LANES` are in each row and in each token of `y`; this task alone writes them. Factors of every
            // token were asserted.
            unsafe {
                let mut part = [s.splat(0.0); R];
                for j in 0..R {
                    part[j] = W::load(s, here[j], self.start + at);
                }
                // Once for a cache line.
                let line = W::bytes(self.start + at);
                if line % 64 < W::bytes(S::LANES) {
                    for row in next {
                        s.prefetch(row.values.wrapping_add(line));
                    }
                }
                for t in 0..tokens {
                    let y = self.y.add(t * y_stride + at);
                    let mut sum = s.load(y);
                    for j in 0..R {
                        sum = s.fma(s.splat(*factors.get_unchecked(t * stride + j)), part[j], sum);
                    }
                    s.store(y, sum);
                }
            }
        }
        let left = self.cols - whole;
        if left > 0 {
            // SAFETY: as above, for the columns `whole..whole + left`, fewer than LANES.
            unsafe {
                let mut part = [s.splat(0.0); R];
                for j in 0..R {
                    part[j] = W::load_part(s, here[j], self.start + whole, left);
                }
                for t in 0..tokens {
                    let y = self.y.add(t * y_stride + whole);
                    let mut sum = s.load_part(y, left);
                    for j in 0..R {
                        sum = s.fma(s.splat(*factors.get_unchecked(t * stride + j)), part[j], sum);
                    }
                    s.store_part(y, sum, left);
                }
            }
        }
    }
}
