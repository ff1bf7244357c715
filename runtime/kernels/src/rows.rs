//! Sums of scaled rows: `y += sum of a * row`, for rows picked from a matrix or lying anywhere.
//!
//! Each output element has one accumulator, which takes the rows strictly in list order, in vector bodies and tails
//! alike. Threads share the columns, never the list.
#![expect(unsafe_code, reason = "vector loads and stores through pointers")]

use std::marker::PhantomData;

use crate::dispatch::Kernels;
use crate::element::Element;
use crate::matrix::Matrix;
use crate::matvec::RowAt;
use crate::simd::{Op, Simd, Weight, with_weight};
use crate::threads::Threads;

/// Rows added in one pass over the outputs.
pub(crate) const ROWS_AT_ONCE: usize = 8;
/// Fewest columns of a task, in bytes of a row: shorter pieces of rows waste DRAM pages.
const PIECE_BYTES_MIN: usize = 1024;
/// Fewest bytes of weights for which threads are worth waking.
const PARALLEL_BYTES_MIN: usize = 64 << 10;

/// `y[c] += sum over active (row, a), in the order given, of a * W[row][c]`, on all threads.
///
/// # Panics
/// If `y` has not `w.cols()` elements or a row does not exist.
pub fn add_scaled_rows(threads: &Threads, w: Matrix<'_>, active: &[(u32, f32)], y: &mut [f32]) {
    Kernels::get().add_scaled_rows(threads, w, active, y);
}

/// [`add_scaled_rows`] on the calling thread; the same bits.
///
/// # Panics
/// As [`add_scaled_rows`].
pub fn add_scaled_rows_serial(w: Matrix<'_>, active: &[(u32, f32)], y: &mut [f32]) {
    Kernels::get().add_scaled_rows_serial(w, active, y);
}

/// `y[c] += sum over rows i, in order, of a[i] * W[i][c]`, on the calling thread: attention's weighted sum of values. The
/// same bits as [`add_scaled_rows`] with every row listed.
///
/// # Panics
/// If `a` has not `w.rows()` or `y` not `w.cols()` elements.
pub fn add_weighted_rows_serial(w: Matrix<'_>, a: &[f32], y: &mut [f32]) {
    Kernels::get().add_weighted_rows_serial(w, a, y);
}

/// `y += a * row`; the same bits as [`add_scaled_rows`].
///
/// # Panics
/// If `row` does not hold exactly `y.len()` elements.
pub fn add_scaled(element: Element, row: &[u8], a: f32, y: &mut [f32]) {
    Kernels::get().add_scaled(element, row, a, y);
}

/// `y += sum over i, in order, of coefficients[i] * row i of rows`, on all threads. The same bits as [`add_scaled_rows`].
///
/// # Panics
/// If a row does not hold exactly `y.len()` elements.
pub fn gathered_add(threads: &Threads, element: Element, rows: &RowAt<'_>, coefficients: &[f32], y: &mut [f32]) {
    Kernels::get().gathered_add(threads, element, rows, coefficients, y);
}

impl Kernels {
    /// [`add_scaled_rows`] on this instruction set.
    pub fn add_scaled_rows(self, threads: &Threads, w: Matrix<'_>, active: &[(u32, f32)], y: &mut [f32]) {
        assert_eq!(y.len(), w.cols(), "add_scaled_rows: elements of y against columns");
        self.add_on_threads(threads, w.element(), &Picked { w, active }, y);
    }

    /// [`add_scaled_rows_serial`] on this instruction set.
    pub fn add_scaled_rows_serial(self, w: Matrix<'_>, active: &[(u32, f32)], y: &mut [f32]) {
        assert_eq!(y.len(), w.cols(), "add_scaled_rows: elements of y against columns");
        self.add(w.element(), &Picked { w, active }, 0, y);
    }

    /// [`add_weighted_rows_serial`] on this instruction set.
    pub fn add_weighted_rows_serial(self, w: Matrix<'_>, a: &[f32], y: &mut [f32]) {
        assert_eq!(a.len(), w.rows(), "add_weighted_rows: weights against rows");
        assert_eq!(y.len(), w.cols(), "add_weighted_rows: elements of y against columns");
        self.add(w.element(), &Every { w, a }, 0, y);
    }

    /// [`add_scaled`] on this instruction set.
    pub fn add_scaled(self, element: Element, row: &[u8], a: f32, y: &mut [f32]) {
        assert_eq!(row.len(), y.len() * element.bytes(), "add_scaled: bytes of the row against elements of y");
        self.add(element, &One { row, a }, 0, y);
    }

    /// [`gathered_add`] on this instruction set.
    pub fn gathered_add(
        self,
        threads: &Threads,
        element: Element,
        rows: &RowAt<'_>,
        coefficients: &[f32],
        y: &mut [f32],
    ) {
        let row_bytes = y.len() * element.bytes();
        self.add_on_threads(threads, element, &Gathered { rows, row_bytes, coefficients }, y);
    }

    fn add_on_threads(self, threads: &Threads, element: Element, list: &dyn ScaledRows, y: &mut [f32]) {
        let chunk = cols_per_task(threads, list.count(), y.len(), element);
        threads.chunks_mut(y, chunk, &|index, y| self.add(element, list, index * chunk, y));
    }

    /// Adds columns `first..first + y.len()` of the listed rows to `y`.
    fn add(self, element: Element, list: &dyn ScaledRows, first: usize, y: &mut [f32]) {
        with_weight!(element, W => self.run(Add { list, first, y, weight: PhantomData::<W> }));
    }
}

/// Columns of a task: an equal share for each thread, unless the pieces of rows become too short.
pub(crate) fn cols_per_task(threads: &Threads, rows: usize, cols: usize, element: Element) -> usize {
    if rows * cols * element.bytes() < PARALLEL_BYTES_MIN {
        return cols.max(1);
    }
    cols.div_ceil(threads.count()).max(PIECE_BYTES_MIN / element.bytes()).next_multiple_of(64)
}

/// A list of rows with their coefficients.
trait ScaledRows: Sync {
    fn count(&self) -> usize;
    fn row(&self, i: usize) -> &[u8];
    fn coefficient(&self, i: usize) -> f32;
}

struct Picked<'a> {
    w: Matrix<'a>,
    active: &'a [(u32, f32)],
}
impl ScaledRows for Picked<'_> {
    fn count(&self) -> usize {
        self.active.len()
    }
    fn row(&self, i: usize) -> &[u8] {
        self.w.row(self.active[i].0 as usize)
    }
    fn coefficient(&self, i: usize) -> f32 {
        self.active[i].1
    }
}

struct Every<'a> {
    w: Matrix<'a>,
    a: &'a [f32],
}
impl ScaledRows for Every<'_> {
    fn count(&self) -> usize {
        self.a.len()
    }
    fn row(&self, i: usize) -> &[u8] {
        self.w.row(i)
    }
    fn coefficient(&self, i: usize) -> f32 {
        self.a[i]
    }
}

struct One<'a> {
    row: &'a [u8],
    a: f32,
}
impl ScaledRows for One<'_> {
    fn count(&self) -> usize {
        1
    }
    fn row(&self, _: usize) -> &[u8] {
        self.row
    }
    fn coefficient(&self, _: usize) -> f32 {
        self.a
    }
}

struct Gathered<'a, 'r> {
    rows: &'a RowAt<'r>,
    row_bytes: usize,
    coefficients: &'a [f32],
}
impl ScaledRows for Gathered<'_, '_> {
    fn count(&self) -> usize {
        self.coefficients.len()
    }
    fn row(&self, i: usize) -> &[u8] {
        let row = (self.rows)(i);
        assert_eq!(row.len(), self.row_bytes, "gathered_add: bytes of a row against elements of y");
        row
    }
    fn coefficient(&self, i: usize) -> f32 {
        self.coefficients[i]
    }
}

struct Add<'a, W> {
    /// Dynamic, as one call per row is nothing beside the row, and code for every kind of list would be much.
    list: &'a dyn ScaledRows,
    first: usize,
    y: &'a mut [f32],
    weight: PhantomData<W>,
}

impl<W: Weight> Op for Add<'_, W> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { list, first, y, weight: _ } = self;
        let (count, cols) = (list.count(), y.len());
        let pointer = |i: usize| list.row(i)[first * W::BYTES..][..cols * W::BYTES].as_ptr();
        if count == 0 {
            return;
        }
        // Rows beyond the last stand for the last, and are only asked for.
        let pointers =
            |i: usize| -> [*const u8; ROWS_AT_ONCE] { std::array::from_fn(|j| pointer((i + j).min(count - 1))) };
        let mut here = pointers(0);
        let mut i = 0;
        loop {
            let left = count - i;
            if left < ROWS_AT_ONCE {
                for j in 0..left {
                    let a = [list.coefficient(i + j)];
                    // SAFETY: `pointer` checked that each row has `cols` elements from column `first`.
                    unsafe { add_rows::<S, W, 1>(s, [here[j]], [here[j + 1]], a, y.as_mut_ptr(), cols) };
                }
                return;
            }
            let next = pointers(i + ROWS_AT_ONCE);
            let a = std::array::from_fn(|j| list.coefficient(i + j));
            // SAFETY: as above.
            unsafe { add_rows::<S, W, ROWS_AT_ONCE>(s, here, next, a, y.as_mut_ptr(), cols) };
            (here, i) = (next, i + ROWS_AT_ONCE);
        }
    }
}

/// `y[c] += a[0] * rows[0][c]`, then `a[1] * rows[1][c]`, and so on; asks for the `next` rows meanwhile.
///
/// # Safety
/// Each of `rows` must hold, and `y` point to, `cols` elements.
#[inline(always)]
unsafe fn add_rows<S: Simd, W: Weight, const R: usize>(
    s: S,
    rows: [*const u8; R],
    next: [*const u8; R],
    a: [f32; R],
    y: *mut f32,
    cols: usize,
) {
    let step = 2 * S::LANES;
    let a = a.map(|a| s.splat(a));
    let mut at = 0;
    // SAFETY: every access is to elements below `cols`, for which the caller vouches.
    unsafe {
        while at + step <= cols {
            let mut y0 = s.load(y.add(at));
            let mut y1 = s.load(y.add(at + S::LANES));
            for r in 0..R {
                let mut line = 0;
                while line < step * W::BYTES {
                    s.prefetch(next[r].wrapping_add(at * W::BYTES + line));
                    line += 64;
                }
                y0 = s.fma(a[r], W::load(s, rows[r].add(at * W::BYTES)), y0);
                y1 = s.fma(a[r], W::load(s, rows[r].add((at + S::LANES) * W::BYTES)), y1);
            }
            s.store(y.add(at), y0);
            s.store(y.add(at + S::LANES), y1);
            at += step;
        }
        if at + S::LANES <= cols {
            let mut y0 = s.load(y.add(at));
            for r in 0..R {
                y0 = s.fma(a[r], W::load(s, rows[r].add(at * W::BYTES)), y0);
            }
            s.store(y.add(at), y0);
            at += S::LANES;
        }
        if at < cols {
            let left = cols - at;
            let mut y0 = s.load_part(y.add(at), left);
            for r in 0..R {
                y0 = s.fma(a[r], W::load_part(s, rows[r].add(at * W::BYTES), left), y0);
            }
            s.store_part(y.add(at), y0, left);
        }
    }
}
