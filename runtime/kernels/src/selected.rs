//! Products of many tokens with the rows of a matrix that each of them selected.
//!
//! A row is read from memory once and meets all of its tokens from the cache. Rows of integers: `selected_whole.rs`.
#![expect(unsafe_code, reason = "tasks write disjoint parts of one output through pointers")]

use crate::dispatch::Kernels;
use crate::many::Of;
use crate::matmul::MatmulScratch;
use crate::matrix::Matrix;
use crate::matvec::{dots, rows_per_task};
use crate::pairs::RowTokens;
use crate::rows::Picked;
use crate::simd::{Op, Simd, Weight, with_weight};
use crate::threads::{SendPtr, Threads};
use crate::whole::Inputs;

/// Tokens that meet a row together where the registers suffice.
const TOKENS_AT_ONCE: usize = 4;
/// Bytes of rows that stay in a processor's second-level cache while every token meets them.
const CACHED_BYTES: usize = 512 << 10;

/// `y[i]` = dot product of the row that the `i`-th of `selected.tokens` selected with that token's vector, on all threads; `x` is
/// `[tokens, cols]`. A pair's bits do not depend on the others.
///
/// # Panics
/// If `selected` is not of `w`'s rows, `y` has another length than its tokens, or there is no such token in `x`.
pub fn selected_dots(
    threads: &Threads,
    w: Matrix<'_>,
    selected: RowTokens<'_>,
    x: &[f32],
    y: &mut [f32],
    scratch: &mut MatmulScratch,
) {
    Kernels::get().selected_dots(threads, w, selected, x, y, scratch);
}

/// `y[t] += sum of a * row of w`, in order, over the pairs `(row, a)` in `active[starts[t]..starts[t + 1]]`, rows ascending; on all
/// threads. `y` is `[tokens, cols]`. The same bits as [`add_scaled_rows`](crate::add_scaled_rows) of each token.
///
/// # Panics
/// If `y` does not hold a row for each token, or a row does not exist.
pub fn selected_add(threads: &Threads, w: Matrix<'_>, active: &[(u32, f32)], starts: &[usize], y: &mut [f32]) {
    Kernels::get().selected_add(threads, w, active, starts, y);
}

impl Kernels {
    /// [`selected_dots`] on this instruction set.
    pub fn selected_dots(
        self,
        threads: &Threads,
        w: Matrix<'_>,
        selected: RowTokens<'_>,
        x: &[f32],
        y: &mut [f32],
        scratch: &mut MatmulScratch,
    ) {
        let (rows, cols) = (w.rows(), w.cols());
        assert_eq!(selected.starts.len(), rows + 1, "selected_dots: the tokens of every row");
        assert!(selected.starts.is_sorted(), "selected_dots: rows in ascending order");
        assert_eq!(selected.starts[rows] as usize, selected.tokens.len(), "selected_dots: the tokens of every row");
        assert_eq!(selected.tokens.len(), y.len(), "selected_dots: a result for each pair");
        if y.is_empty() {
            return;
        }
        let tokens = x.len() / cols.max(1);
        let chunk = rows_per_task(threads, rows, w.row_bytes());
        let y = SendPtr(y.as_mut_ptr());
        if w.element().is_whole() {
            return self.selected_dots_whole(threads, w, selected, x, y, scratch.floats());
        }
        self.with_inputs(w.element(), (x, tokens, cols, cols), |inputs| {
            threads.run(rows.div_ceil(chunk), &|task| {
                let rows = task * chunk..rows.min((task + 1) * chunk);
                let first = selected.starts[rows.start] as usize;
                let count = selected.starts[rows.end] as usize - first;
                // SAFETY: `starts` ascend up to the length of `y`, as was asserted, so these pairs are this task's alone.
                let y = unsafe { std::slice::from_raw_parts_mut(y.get().add(first), count) };
                let op = SelectedDots { w: w.rows_range(rows.clone()), first: rows.start, selected, inputs, y };
                with_weight!(w.element(), W => self.run(Of::<_, W>::new(op)));
            });
        });
    }

    /// [`selected_add`] on this instruction set.
    pub fn selected_add(
        self,
        threads: &Threads,
        w: Matrix<'_>,
        active: &[(u32, f32)],
        starts: &[usize],
        y: &mut [f32],
    ) {
        let (cols, tokens) = (w.cols(), starts.len().saturating_sub(1));
        assert_eq!(y.len(), tokens * cols, "selected_add: elements of y against tokens * columns");
        // Two tasks for each thread, of whole vectors.
        let width = cols.div_ceil(2 * threads.count()).next_multiple_of(64);
        let rows_at_once = (CACHED_BYTES / w.element().row_bytes(width).max(1)).max(1) as u32;
        let y = SendPtr(y.as_mut_ptr());
        threads.run(cols.div_ceil(width), &|task| {
            let first = task * width;
            let width = width.min(cols - first);
            for end in (0..w.rows() as u32).step_by(rows_at_once as usize).map(|row| row + rows_at_once) {
                for (token, span) in starts.windows(2).enumerate() {
                    let of_token = &active[span[0]..span[1]];
                    let begin = of_token.partition_point(|(row, _)| row + rows_at_once < end);
                    let count = of_token[begin..].partition_point(|(row, _)| *row < end);
                    if count == 0 {
                        continue;
                    }
                    let list = Picked { w, active: &of_token[begin..begin + count] };
                    // SAFETY: `y` holds `cols` elements of each token, as was asserted; these columns are this task's alone.
                    let y = unsafe { std::slice::from_raw_parts_mut(y.get().add(token * cols + first), width) };
                    self.add(w.element(), cols, &list, first, y);
                }
            }
        });
    }
}

/// Some rows with the tokens that selected them.
struct SelectedDots<'a> {
    w: Matrix<'a>,
    /// Number of `w`'s first row in `selected`.
    first: usize,
    selected: RowTokens<'a>,
    inputs: Inputs<'a>,
    /// Results of these rows' pairs.
    y: &'a mut [f32],
}

impl<W: Weight> Op for Of<SelectedDots<'_>, W> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let SelectedDots { w, first, selected, inputs, mut y } = self.op;
        let last = w.rows().saturating_sub(1);
        for row in 0..w.rows() {
            let (here, next) = (w.row(row).places(), w.row((row + 1).min(last)).places());
            let mut tokens = selected.of_row(first + row);
            let of_row;
            (of_row, y) = y.split_at_mut(tokens.len());
            let mut of_row = of_row;
            macro_rules! at_once {
                ($T:expr) => {
                    while tokens.len() >= $T {
                        let xs = std::array::from_fn(|i| inputs.token(usize::from(tokens[i])));
                        // SAFETY: the row and the inputs have `cols` elements each, and rows of a matrix groups of one size.
                        let [sums] = unsafe { dots::<S, W, 1, $T>(s, [here], [next], xs) };
                        of_row[..$T].copy_from_slice(&sums);
                        (tokens, of_row) = (&tokens[$T..], &mut of_row[$T..]);
                    }
                };
            }
            if S::MANY_REGISTERS {
                at_once!(TOKENS_AT_ONCE);
            }
            at_once!(2);
            at_once!(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::element::Element;

    #[test]
    fn every_pair_has_the_bits_of_its_token_alone() {
        let value = |i: usize| ((i * 7919 + 13) % 1009) as f32 / 504.5 - 1.0;
        for threads in [1, 3] {
            let threads = Threads::new(std::num::NonZeroUsize::new(threads).unwrap()).unwrap();
            for (rows, cols, tokens) in [(1, 5, 1), (37, 200, 19), (300, 96, 40), (9000, 70, 2)] {
                let data: Vec<u8> =
                    (0..rows * cols).flat_map(|i| half::f16::from_f32(value(i)).to_le_bytes()).collect();
                let w = Matrix::new(Element::F16, &data, rows, cols).unwrap();
                let x: Vec<f32> = (0..tokens * cols).map(|i| value(i + 5)).collect();
                let chosen = |row: usize, token: usize| (row * 31 + token * 17) % 5 < 2;
                let (mut starts, mut list) = (vec![0], Vec::new());
                for row in 0..rows {
                    list.extend((0..tokens).filter(|t| chosen(row, *t)).map(|t| t as u16));
                    starts.push(list.len() as u32);
                }
                let (mut active, mut of_token) = (Vec::new(), vec![0]);
                for token in 0..tokens {
                    let of = (0..rows).filter(|row| chosen(*row, token)).map(|row| (row as u32, value(row + token)));
                    active.extend(of);
                    of_token.push(active.len());
                }
                for kernels in Kernels::all_present() {
                    let mut y = vec![0.0; list.len()];
                    kernels.selected_dots(
                        &threads,
                        w,
                        RowTokens { starts: &starts, tokens: &list },
                        &x,
                        &mut y,
                        &mut MatmulScratch::default(),
                    );
                    let mut at = 0;
                    for row in 0..rows {
                        for &token in &list[starts[row] as usize..starts[row + 1] as usize] {
                            let x = &x[usize::from(token) * cols..][..cols];
                            let alone = kernels.dot(Element::F16, w.row(row), x);
                            assert_eq!(y[at].to_bits(), alone.to_bits(), "row {row}, token {token}");
                            at += 1;
                        }
                    }
                    let mut sums: Vec<f32> = (0..tokens * cols).map(value).collect();
                    let mut expected = sums.clone();
                    kernels.selected_add(&threads, w, &active, &of_token, &mut sums);
                    for token in 0..tokens {
                        let y = &mut expected[token * cols..][..cols];
                        kernels.add_scaled_rows_serial(w, &active[of_token[token]..of_token[token + 1]], y);
                    }
                    assert_eq!(sums, expected);
                }
            }
        }
    }
}
