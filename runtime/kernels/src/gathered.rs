//! Rows that lie anywhere, each with the token it is for: a few tokens' products with the rows that each of them chose.
//!
//! Bit for bit what one token at a time gives. Where a list is ordered so that a row's tokens lie close together, the row is read
//! from memory once and meets the others from the cache.
#![expect(unsafe_code, reason = "tasks write disjoint columns of one output through pointers")]

use crate::dispatch::Kernels;
use crate::element::Element;
use crate::matvec::{Gathered, RowAt, rows_per_task};
use crate::row::Row;
use crate::rows::{ScaledRows, cols_per_task};
use crate::threads::{SendPtr, Threads};

/// The token that the i-th row of a list is for.
pub type TokenAt<'a> = dyn Fn(usize) -> usize + Sync + 'a;

/// `y[i]` = dot product of row `i` with the vector of its token; `x` is `[tokens, cols]`.
///
/// # Panics
/// If a row does not hold exactly `cols` elements, or there is no such token.
pub fn gathered_dots_each(
    threads: &Threads,
    element: Element,
    rows: &RowAt<'_>,
    token_of: &TokenAt<'_>,
    (x, cols): (&[f32], usize),
    y: &mut [f32],
) {
    let kernels = Kernels::get();
    let chunk = rows_per_task(threads, y.len(), element.row_bytes(cols));
    kernels.with_inputs(element, (x, x.len() / cols.max(1), cols, cols), |inputs| {
        threads.chunks_mut(y, chunk, &|index, y| {
            let first = index * chunk;
            let mut at = 0;
            while at < y.len() {
                let (token, end) = run(token_of, first, at, y.len());
                kernels.dots(element, &Gathered { rows, first: first + at }, inputs.token(token), &mut y[at..end]);
                at = end;
            }
        });
    });
}

/// `y[token of i] += coefficients[i] * row i`, in order; `y` is `[tokens, cols]`.
///
/// # Panics
/// If a row does not hold exactly `cols` elements, or there is no such token.
pub fn gathered_add_each(
    threads: &Threads,
    element: Element,
    rows: &RowAt<'_>,
    token_of: &TokenAt<'_>,
    coefficients: &[f32],
    (y, cols): (&mut [f32], usize),
) {
    let (kernels, count, tokens) = (Kernels::get(), coefficients.len(), y.len() / cols.max(1));
    let chunk = cols_per_task(threads, count, cols, element);
    let y = SendPtr(y.as_mut_ptr());
    threads.run(cols.div_ceil(chunk), &|task| {
        let first = task * chunk;
        let mut at = 0;
        while at < count {
            let (token, end) = run(token_of, 0, at, count);
            assert!(token < tokens, "a token of the output");
            let list = Part { rows, coefficients: &coefficients[at..end], first: at };
            // SAFETY: the token was checked, and its columns from `first` on, at most `chunk` of them, are this task's alone.
            let part =
                unsafe { std::slice::from_raw_parts_mut(y.get().add(token * cols + first), chunk.min(cols - first)) };
            kernels.add(element, cols, &list, first, part);
            at = end;
        }
    });
}

/// The token of the entry `first + at`, and the end of the entries after it, below `len`, that are for the same one.
fn run(token_of: &TokenAt<'_>, first: usize, at: usize, len: usize) -> (usize, usize) {
    let token = token_of(first + at);
    let same = (at + 1..len).take_while(|next| token_of(first + next) == token).count();
    (token, at + 1 + same)
}

/// A part of the list, for one token.
struct Part<'a, 'r> {
    rows: &'a RowAt<'r>,
    coefficients: &'a [f32],
    first: usize,
}

impl ScaledRows for Part<'_, '_> {
    fn count(&self) -> usize {
        self.coefficients.len()
    }
    fn row(&self, i: usize) -> Row<'_> {
        (self.rows)(self.first + i)
    }
    fn coefficient(&self, i: usize) -> f32 {
        self.coefficients[i]
    }
}
