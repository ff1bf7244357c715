//! Matrix products for several tokens at once.
#![expect(unsafe_code, reason = "threads write disjoint columns of one output")]

use std::marker::PhantomData;

use crate::dispatch::Kernels;
use crate::matrix::Matrix;
use crate::matvec::dots;
use crate::rows::ScaledRows;
use crate::simd::{Op, Simd, Weight, with_weight};
use crate::threads::{SendPtr, Threads};

/// From this number of tokens on, [`matmul`] works in blocks; with fewer it equals [`crate::matvec`] per token.
pub const MATMUL_TOKENS_MIN: usize = 8;

/// Rows that [`matmul_rows_add`] takes at a time: cut rows at its multiples.
pub const ROW_BLOCK: usize = 256;

/// Memory that the matrix products keep between calls.
#[derive(Debug, Default)]
pub struct MatmulScratch {
    floats: Vec<f32>,
}

impl MatmulScratch {
    /// Bytes held now.
    pub fn bytes(&self) -> usize {
        self.floats.capacity() * 4
    }
}

/// `y[t, r] = sum over c of x[t, c] W[r, c]`: `x` is `[tokens, cols]`, token `t` of `y` begins at `t * y_stride`.
///
/// # Panics
/// If `x` has not `tokens * cols` elements, `y_stride` is less than `w.rows()`, or `y` is too short.
pub fn matmul(
    threads: &Threads,
    w: Matrix<'_>,
    x: &[f32],
    tokens: usize,
    y: &mut [f32],
    y_stride: usize,
    scratch: &mut MatmulScratch,
) {
    Kernels::get().matmul(threads, w, x, tokens, y, y_stride, scratch);
}

/// `y[t, c] += sum over r, in order, of a[t, r] W[r, c]`: token `t` of `a` begins at `t * a_stride`, `y` is `[tokens, cols]`.
///
/// # Panics
/// If `y` has not `tokens * cols` elements, `a_stride` is less than `w.rows()`, or `a` is too short.
pub fn matmul_rows_add(
    threads: &Threads,
    w: Matrix<'_>,
    a: &[f32],
    a_stride: usize,
    tokens: usize,
    y: &mut [f32],
    scratch: &mut MatmulScratch,
) {
    Kernels::get().matmul_rows_add(threads, w, a, a_stride, tokens, y, scratch);
}

/// Elements that `tokens` rows of `width` at every `stride` need.
fn span(tokens: usize, stride: usize, width: usize) -> usize {
    if tokens == 0 { 0 } else { (tokens - 1) * stride + width }
}

impl Kernels {
    /// [`matmul`] on this instruction set.
    #[expect(clippy::too_many_arguments, reason = "three arrays and their shapes")]
    pub fn matmul(
        self,
        threads: &Threads,
        w: Matrix<'_>,
        x: &[f32],
        tokens: usize,
        y: &mut [f32],
        y_stride: usize,
        _scratch: &mut MatmulScratch,
    ) {
        assert_eq!(x.len(), tokens * w.cols(), "matmul: elements of x against tokens * columns");
        assert!(y_stride >= w.rows(), "matmul: tokens of y {y_stride} apart, rows {}", w.rows());
        assert!(y.len() >= span(tokens, y_stride, w.rows()), "matmul: y has only {} elements", y.len());
        let chunk = ((256 << 10) / w.row_bytes().max(1)).max(4);
        let y = SendPtr(y.as_mut_ptr());
        threads.run(w.rows().div_ceil(chunk), &|task| {
            let rows = task * chunk..w.rows().min((task + 1) * chunk);
            let op = Few { w, first: rows.start, end: rows.end, x, tokens, y: y.get(), y_stride };
            with_weight!(w.element(), W => self.run(FewOf { op, weight: PhantomData::<W> }));
        });
    }

    /// [`matmul_rows_add`] on this instruction set.
    #[expect(clippy::too_many_arguments, reason = "three arrays and their shapes")]
    pub fn matmul_rows_add(
        self,
        threads: &Threads,
        w: Matrix<'_>,
        a: &[f32],
        a_stride: usize,
        tokens: usize,
        y: &mut [f32],
        _scratch: &mut MatmulScratch,
    ) {
        assert_eq!(y.len(), tokens * w.cols(), "matmul_rows_add: elements of y against tokens * columns");
        assert!(a_stride >= w.rows(), "matmul_rows_add: tokens of a {a_stride} apart, rows {}", w.rows());
        assert!(a.len() >= span(tokens, a_stride, w.rows()), "matmul_rows_add: a has only {} elements", a.len());
        if w.cols() == 0 {
            return;
        }
        for (t, y) in y.chunks_exact_mut(w.cols()).enumerate() {
            let a = &a[t * a_stride..][..w.rows()];
            self.add_on_threads(threads, w.element(), &Every { w, a }, y);
        }
    }
}

/// Every row of a matrix, each with its coefficient.
struct Every<'a> {
    w: Matrix<'a>,
    a: &'a [f32],
}
impl ScaledRows for Every<'_> {
    #[inline(always)]
    fn count(&self) -> usize {
        self.a.len()
    }
    #[inline(always)]
    fn row(&self, i: usize) -> &[u8] {
        self.w.row(i)
    }
    #[inline(always)]
    fn coefficient(&self, i: usize) -> f32 {
        self.a[i]
    }
}

struct Few<'a> {
    w: Matrix<'a>,
    first: usize,
    end: usize,
    x: &'a [f32],
    tokens: usize,
    y: *mut f32,
    y_stride: usize,
}

struct FewOf<'a, W> {
    op: Few<'a>,
    weight: PhantomData<W>,
}

impl<W: Weight> Op for FewOf<'_, W> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Few { w, first, end, x, tokens, y, y_stride } = self.op;
        let cols = w.cols();
        for r in first..end {
            let row = w.row(r).as_ptr();
            let next = w.row((r + 1).min(end - 1)).as_ptr();
            for t in 0..tokens {
                let xt = x[t * cols..][..cols].as_ptr();
                // SAFETY: the row and the token have `cols` elements; `Kernels::matmul` checked that `y` holds every
                // (token, row), and this task alone writes its rows.
                unsafe { *y.add(t * y_stride + r) = dots::<S, W, 1, 1>(s, [row], [next], [xt], cols)[0][0] };
            }
        }
    }
}
