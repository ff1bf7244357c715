//! Matrix products for several tokens at once: which way is taken for how many.

use crate::dispatch::Kernels;
use crate::many::{self, Shape};
use crate::many_whole;
use crate::matrix::Matrix;
use crate::selected_whole;
use crate::threads::Threads;

/// From this number of tokens on, [`matmul`] works in blocks; with fewer it equals [`crate::matvec`] per token.
pub const MATMUL_TOKENS_MIN: usize = 16;

/// From this number of tokens on, [`matmul_rows_add`] works in blocks. Not a promise: both ways give the same bits.
const ROWS_ADD_TOKENS_MIN: usize = 8;

/// Rows that [`matmul_rows_add`] takes at a time: it is fastest over multiples of this.
pub const ROW_BLOCK: usize = crate::tile::BLOCK;

/// Memory that the matrix products keep between calls.
#[derive(Debug, Default)]
pub struct MatmulScratch {
    floats: Vec<f32>,
}

impl MatmulScratch {
    pub(crate) fn floats(&mut self) -> &mut Vec<f32> {
        &mut self.floats
    }

    /// Bytes held now.
    pub fn bytes(&self) -> usize {
        self.floats.capacity() * 4
    }

    /// Bytes that products of up to `tokens` tokens make it hold, on this many threads, where no input has more than `cols` elements.
    pub fn bytes_needed(threads: usize, tokens: usize, cols: usize) -> usize {
        if tokens < ROWS_ADD_TOKENS_MIN {
            return 0;
        }
        let of = [many::floats_needed, many_whole::floats_needed, selected_whole::floats_needed];
        of.map(|floats| floats(threads, tokens, cols)).into_iter().fold(0, usize::max) * 4
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
        scratch: &mut MatmulScratch,
    ) {
        assert_eq!(x.len(), tokens * w.cols(), "matmul: elements of x against tokens * columns");
        assert!(y_stride >= w.rows(), "matmul: tokens of y {y_stride} apart, rows {}", w.rows());
        assert!(y.len() >= span(tokens, y_stride, w.rows()), "matmul: y has only {} elements", y.len());
        let shape = Shape { w, input: x, stride: w.cols(), tokens };
        if tokens < MATMUL_TOKENS_MIN {
            self.matmul_few(threads, shape, y, y_stride, &mut || {});
        } else if w.element().is_whole() {
            self.matmul_many_whole(threads, shape, y, y_stride, &mut scratch.floats);
        } else {
            self.matmul_many(threads, shape, y, y_stride, &mut scratch.floats);
        }
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
        scratch: &mut MatmulScratch,
    ) {
        assert_eq!(y.len(), tokens * w.cols(), "matmul_rows_add: elements of y against tokens * columns");
        assert!(a_stride >= w.rows(), "matmul_rows_add: tokens of a {a_stride} apart, rows {}", w.rows());
        assert!(a.len() >= span(tokens, a_stride, w.rows()), "matmul_rows_add: a has only {} elements", a.len());
        let shape = Shape { w, input: a, stride: a_stride, tokens };
        if tokens < ROWS_ADD_TOKENS_MIN {
            self.matmul_rows_add_few(threads, shape, y);
        } else {
            self.matmul_rows_add_many(threads, shape, y, &mut scratch.floats);
        }
    }
}
