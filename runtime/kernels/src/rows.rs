//! Sums of scaled rows: `y += sum of a * row`, for rows picked from a matrix or lying anywhere.
//!
//! Each output element has one accumulator, which takes the rows strictly in list order, in vector bodies and tails
//! alike. Threads share the columns, never the list.
#![expect(unsafe_code, reason = "vector loads and stores through pointers")]

use std::marker::PhantomData;
use std::ops::Range;

use crate::dispatch::Kernels;
use crate::element::Element;
use crate::matrix::Matrix;
use crate::matvec::RowAt;
use crate::row::{Places, Row};
use crate::simd::{Op, Simd, Weight, with_weight};
use crate::threads::Threads;

/// Rows added in one pass over the outputs.
pub(crate) const ROWS_AT_ONCE: usize = 8;
/// Of fewer than that, so many are added in one pass where there are as many.
const HALF: usize = ROWS_AT_ONCE / 2;
/// Fewest columns of a task, in bytes of a row: shorter pieces of rows waste cache lines.
const PIECE_BYTES_MIN: usize = 128;
/// Columns of a task are a multiple of this: two vectors, or a block of four-bit numbers, on every instruction set.
const PIECE_UNIT: usize = 32;
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
pub fn add_scaled<'a>(element: Element, row: impl Into<Row<'a>>, a: f32, y: &mut [f32]) {
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
        self.add(w.element(), w.cols(), &Picked { w, active }, 0, y);
    }

    /// [`add_weighted_rows_serial`] on this instruction set.
    pub fn add_weighted_rows_serial(self, w: Matrix<'_>, a: &[f32], y: &mut [f32]) {
        assert_eq!(a.len(), w.rows(), "add_weighted_rows: weights against rows");
        assert_eq!(y.len(), w.cols(), "add_weighted_rows: elements of y against columns");
        self.add(w.element(), w.cols(), &Every { w, a }, 0, y);
    }

    /// [`add_scaled`] on this instruction set.
    pub fn add_scaled<'a>(self, element: Element, row: impl Into<Row<'a>>, a: f32, y: &mut [f32]) {
        self.add(element, y.len(), &One { row: row.into(), a }, 0, y);
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
        self.add_on_threads(threads, element, &Gathered { rows, coefficients }, y);
    }

    fn add_on_threads(self, threads: &Threads, element: Element, list: &dyn ScaledRows, y: &mut [f32]) {
        let chunk = cols_per_task(threads, list.count(), y.len(), element);
        let cols = y.len();
        threads.chunks_mut(y, chunk, &|index, y| self.add(element, cols, list, index * chunk, y));
    }

    /// Adds columns `first..first + y.len()` of the listed rows of `cols` elements to `y`.
    pub(crate) fn add(self, element: Element, cols: usize, list: &dyn ScaledRows, first: usize, y: &mut [f32]) {
        assert!(first + y.len() <= cols, "columns of a row");
        with_weight!(element, W => self.run(Add { list, element, cols, first, y, weight: PhantomData::<W> }));
    }
}

/// Columns of a task: an equal share for each thread, unless the pieces of rows become too short.
pub(crate) fn cols_per_task(threads: &Threads, rows: usize, cols: usize, element: Element) -> usize {
    if rows * element.row_bytes(cols) < PARALLEL_BYTES_MIN {
        return cols.max(1);
    }
    let least = PIECE_BYTES_MIN * PIECE_UNIT / element.row_bytes(PIECE_UNIT);
    cols.div_ceil(threads.count()).max(least).next_multiple_of(PIECE_UNIT)
}

/// A list of rows with their coefficients.
pub(crate) trait ScaledRows: Sync {
    fn count(&self) -> usize;
    fn row(&self, i: usize) -> Row<'_>;
    fn coefficient(&self, i: usize) -> f32;

    /// The places and coefficients of rows `first..`, each of `cols` elements, which is checked. Rows beyond the last stand for it.
    fn places(&self, first: usize, element: Element, cols: usize) -> ([Places; ROWS_AT_ONCE], [f32; ROWS_AT_ONCE]) {
        let at = |j: usize| (first + j).min(self.count() - 1);
        let place = |j| {
            let row = self.row(at(j));
            row.check(element, cols);
            row.places()
        };
        (std::array::from_fn(place), std::array::from_fn(|j| self.coefficient(at(j))))
    }
}

/// [`ScaledRows::places`] of rows of a matrix, which was checked when it was made: their numbers and coefficients by their place in the list.
#[inline(always)]
fn places_in(
    w: Matrix<'_>,
    (element, cols): (Element, usize),
    row: impl Fn(usize) -> (usize, f32),
) -> ([Places; ROWS_AT_ONCE], [f32; ROWS_AT_ONCE]) {
    assert!(w.element() == element && w.cols() == cols, "rows of another shape");
    let (first, a) = row(0);
    let (mut places, mut factors) = ([w.places(first); ROWS_AT_ONCE], [a; ROWS_AT_ONCE]);
    for j in 1..ROWS_AT_ONCE {
        let (of, a) = row(j);
        (places[j], factors[j]) = (w.places(of), a);
    }
    (places, factors)
}

pub(crate) struct Picked<'a> {
    pub(crate) w: Matrix<'a>,
    pub(crate) active: &'a [(u32, f32)],
}
impl ScaledRows for Picked<'_> {
    fn count(&self) -> usize {
        self.active.len()
    }
    fn row(&self, i: usize) -> Row<'_> {
        self.w.row(self.active[i].0 as usize)
    }
    fn coefficient(&self, i: usize) -> f32 {
        self.active[i].1
    }
    fn places(&self, first: usize, element: Element, cols: usize) -> ([Places; ROWS_AT_ONCE], [f32; ROWS_AT_ONCE]) {
        let last = self.active.len() - 1;
        places_in(self.w, (element, cols), |j| {
            let (row, a) = self.active[(first + j).min(last)];
            (row as usize, a)
        })
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
    fn row(&self, i: usize) -> Row<'_> {
        self.w.row(i)
    }
    fn coefficient(&self, i: usize) -> f32 {
        self.a[i]
    }
    fn places(&self, first: usize, element: Element, cols: usize) -> ([Places; ROWS_AT_ONCE], [f32; ROWS_AT_ONCE]) {
        let last = self.a.len() - 1;
        places_in(self.w, (element, cols), |j| ((first + j).min(last), self.a[(first + j).min(last)]))
    }
}

struct One<'a> {
    row: Row<'a>,
    a: f32,
}
impl ScaledRows for One<'_> {
    fn count(&self) -> usize {
        1
    }
    fn row(&self, _: usize) -> Row<'_> {
        self.row
    }
    fn coefficient(&self, _: usize) -> f32 {
        self.a
    }
}

struct Gathered<'a, 'r> {
    rows: &'a RowAt<'r>,
    coefficients: &'a [f32],
}
impl ScaledRows for Gathered<'_, '_> {
    fn count(&self) -> usize {
        self.coefficients.len()
    }
    fn row(&self, i: usize) -> Row<'_> {
        (self.rows)(i)
    }
    fn coefficient(&self, i: usize) -> f32 {
        self.coefficients[i]
    }
}

struct Add<'a, W> {
    /// Dynamic, as one call for a few rows is nothing beside them, and code for every kind of list would be much.
    list: &'a dyn ScaledRows,
    element: Element,
    /// Elements of a row.
    cols: usize,
    first: usize,
    y: &'a mut [f32],
    weight: PhantomData<W>,
}

impl<W: Weight> Op for Add<'_, W> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { list, element, cols, first, y, weight: _ } = self;
        let count = list.count();
        let columns = first..first + y.len();
        if count == 0 {
            return;
        }
        // Rows beyond the last are only asked for.
        let (mut here, mut a) = list.places(0, element, cols);
        let mut i = 0;
        loop {
            let left = count - i;
            if left < ROWS_AT_ONCE {
                let half = left / HALF * HALF;
                if half > 0 {
                    let rows = std::array::from_fn::<_, HALF, _>(|j| here[j]);
                    let next = std::array::from_fn(|j| here[HALF + j]);
                    let a = std::array::from_fn(|j| a[j]);
                    // SAFETY: `places` checked that each row has `cols` elements, and `Kernels::add` that `columns` are among them.
                    unsafe { add_rows::<S, W, HALF>(s, rows, next, a, y.as_mut_ptr(), columns.clone()) };
                }
                for j in half..left {
                    // SAFETY: as above.
                    unsafe {
                        add_rows::<S, W, 1>(s, [here[j]], [here[j + 1]], [a[j]], y.as_mut_ptr(), columns.clone())
                    };
                }
                return;
            }
            let next = list.places(i + ROWS_AT_ONCE, element, cols);
            // SAFETY: as above.
            unsafe { add_rows::<S, W, ROWS_AT_ONCE>(s, here, next.0, a, y.as_mut_ptr(), columns.clone()) };
            ((here, a), i) = (next, i + ROWS_AT_ONCE);
        }
    }
}

/// `y[c] += a[0] * rows[0][first + c]`, then `a[1] * rows[1][first + c]`, and so on; asks for the `next` rows meanwhile.
/// `columns` begin at a multiple of two vectors.
///
/// # Safety
/// Each of `rows` and `next` must hold `columns`, and `y` point to as many elements.
#[inline(always)]
unsafe fn add_rows<S: Simd, W: Weight, const R: usize>(
    s: S,
    rows: [Places; R],
    next: [Places; R],
    a: [f32; R],
    y: *mut f32,
    columns: Range<usize>,
) {
    let step = 2 * S::LANES;
    let mut factors = [s.splat(0.0); R];
    for r in 0..R {
        factors[r] = s.splat(a[r]);
    }
    let a = factors;
    let (first, cols) = (columns.start, columns.len());
    for row in next {
        W::ask_scales(s, row, columns.end);
    }
    let mut at = 0;
    // SAFETY: every access is to elements below `cols`, for which the caller vouches.
    unsafe {
        while at + step <= cols {
            let mut y0 = s.load(y.add(at));
            let mut y1 = s.load(y.add(at + S::LANES));
            for r in 0..R {
                let mut line = 0;
                while line < W::bytes(step) {
                    s.prefetch(next[r].values.wrapping_add(W::bytes(first + at) + line));
                    line += 64;
                }
                let [w0, w1] = W::load_two(s, rows[r], first + at);
                y0 = s.fma(a[r], w0, y0);
                y1 = s.fma(a[r], w1, y1);
            }
            s.store(y.add(at), y0);
            s.store(y.add(at + S::LANES), y1);
            at += step;
        }
        if at + S::LANES <= cols {
            let mut y0 = s.load(y.add(at));
            for r in 0..R {
                y0 = s.fma(a[r], W::load(s, rows[r], first + at), y0);
            }
            s.store(y.add(at), y0);
            at += S::LANES;
        }
        if at < cols {
            let left = cols - at;
            let mut y0 = s.load_part(y.add(at), left);
            for r in 0..R {
                y0 = s.fma(a[r], W::load_part(s, rows[r], first + at, left), y0);
            }
            s.store_part(y.add(at), y0, left);
        }
    }
}
