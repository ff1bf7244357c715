//! Cholesky factors, triangular systems and orthonormal columns, nearly all of it in matrix products.
//!
//! Matrices are row-major slices. Work is cut into pieces of fixed size, so the number of threads changes no bit.

use flashlm_kernels::{View, product};
use rayon::prelude::*;

/// Rows of a piece of a product.
pub(super) const PIECE: usize = 128;
/// Columns that are factored or solved one by one; everything left of them is a matrix product.
const BLOCK: usize = 32;

/// `a b` with the rows of the result in pieces over threads.
pub(super) fn parallel_product(y: &mut [f32], n: usize, a: &[f32], k: usize, b: View<'_>) {
    y.par_chunks_mut(PIECE * n).zip(a.par_chunks(PIECE * k)).for_each(|(y, a)| {
        product(y, n, false, View::rows(a, a.len() / k, k, k), b);
    });
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Takes the part that columns before `first` explain off columns `first..end` of some rows: `y -= x l^T`, with `x` the
/// rows' and `l` the factor's columns before `first`.
fn take_off(rows: &mut [f32], n: usize, factor: &[f32], first: usize, end: usize) {
    let (count, width) = (rows.len() / n, end - first);
    if first == 0 || count == 0 {
        return;
    }
    let mut explained = vec![0.0; count * width];
    let left = View::rows(rows, count, first, n);
    product(&mut explained, width, false, left, View::rows(&factor[first * n..], width, first, n).t());
    for (row, explained) in rows.chunks_exact_mut(n).zip(explained.chunks_exact(width)) {
        row[first..end].iter_mut().zip(explained).for_each(|(y, e)| *y -= e);
    }
}

/// Solves for columns `first..end` of a row, given those before `first`, which are already taken off.
fn solve_block(row: &mut [f32], n: usize, factor: &[f32], first: usize, end: usize) {
    for i in first..end {
        let known = dot(&row[first..i], &factor[i * n + first..i * n + i]);
        row[i] = (row[i] - known) / factor[i * n + i];
    }
}

/// The lower Cholesky factor of a symmetric matrix `[n, n]`, in place; `None` when it is not positive definite.
pub(super) fn cholesky(m: &mut [f32], n: usize) -> Option<()> {
    for first in (0..n).step_by(BLOCK) {
        let end = (first + BLOCK).min(n);
        let (head, below) = m.split_at_mut(end * n);
        // The block on the diagonal. Its own rows stand for the factor's, of which it needs columns before `first` only.
        let known = head.to_vec();
        take_off(&mut head[first * n..], n, &known, first, end);
        for j in first..end {
            let (above, rest) = head.split_at_mut(j * n);
            let row = &mut rest[..n];
            solve_block(row, n, above, first, j);
            let pivot = row[j] - dot(&row[first..j], &row[first..j]);
            if pivot <= 0.0 || !pivot.is_finite() {
                return None;
            }
            row[j] = pivot.sqrt();
            row[j + 1..].fill(0.0);
        }
        let head = &*head;
        below.par_chunks_mut(PIECE * n).for_each(|rows| {
            take_off(rows, n, head, first, end);
            rows.chunks_exact_mut(n).for_each(|row| solve_block(row, n, head, first, end));
        });
    }
    Some(())
}

/// Solves `x L^T = y` for every row of `y`, in place: `L` lower triangular `[n, n]`.
pub(super) fn solve_rows(l: &[f32], n: usize, y: &mut [f32]) {
    y.par_chunks_mut(PIECE * n).for_each(|rows| {
        for first in (0..n).step_by(BLOCK) {
            let end = (first + BLOCK).min(n);
            take_off(rows, n, l, first, end);
            rows.chunks_exact_mut(n).for_each(|row| solve_block(row, n, l, first, end));
        }
    });
}

/// Makes the columns of `q` `[rows, n]` (nearly) orthonormal in the inner product that `m_q = M q` stands for.
///
/// Directions with next to no length keep less than unit length instead of being blown up.
pub(super) fn orthonormalise(q: &mut [f32], m_q: &[f32], n: usize) -> Option<()> {
    let rows = q.len() / n;
    let mut gram = vec![0.0; n * n];
    gram.par_chunks_mut(PIECE * n).enumerate().for_each(|(i, y)| {
        let first = i * PIECE;
        let part = View::rows(&q[first..], rows, y.len() / n, n);
        product(y, n, false, part.t(), View::rows(m_q, rows, n, n));
    });
    let largest = (0..n).map(|i| gram[i * n + i]).fold(0f32, f32::max);
    // What rounding in single precision may take from the smallest pivot; more where that was not enough.
    for ridge in [1e-6, 1e-5, 1e-4, 1e-3] {
        let mut factor = gram.clone();
        (0..n).for_each(|i| factor[i * n + i] += ridge * largest);
        if cholesky(&mut factor, n).is_some() {
            solve_rows(&factor, n, q);
            return Some(());
        }
    }
    None
}

/// Gives the columns of `q` `[rows, n]` unit length, so that their Gram matrix is well scaled.
pub(super) fn normalise_columns(q: &mut [f32], n: usize) {
    let mut squares = vec![0f32; n];
    for row in q.chunks_exact(n) {
        squares.iter_mut().zip(row).for_each(|(s, v)| *s += v * v);
    }
    for row in q.chunks_exact_mut(n) {
        row.iter_mut().zip(&squares).for_each(|(v, s)| *v /= s.sqrt().max(1e-30));
    }
}

#[cfg(test)]
mod tests {
    use super::super::random::Random;
    use super::*;

    #[test]
    fn factors_multiply_back() {
        // Less than a block, more than one, and more rows below than a piece.
        for n in [1, 3, BLOCK, BLOCK + 1, 3 * BLOCK + 7, PIECE + 2 * BLOCK + 5] {
            let mut random = Random::new(n as u64);
            let half: Vec<f32> = (0..n * n).map(|_| random.signed()).collect();
            let mut m = vec![0.0; n * n];
            product(&mut m, n, false, View::rows(&half, n, n, n), View::rows(&half, n, n, n).t());
            (0..n).for_each(|i| m[i * n + i] += 0.5);
            let mut l = m.clone();
            cholesky(&mut l, n).unwrap();
            let mut back = vec![0.0; n * n];
            product(&mut back, n, false, View::rows(&l, n, n, n), View::rows(&l, n, n, n).t());
            let worst = back.iter().zip(&m).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            assert!(worst < 1e-4 * n as f32, "{n}: {worst}");

            let x: Vec<f32> = (0..5 * n).map(|_| random.signed()).collect();
            let mut y = vec![0.0; 5 * n];
            product(&mut y, n, false, View::rows(&x, 5, n, n), View::rows(&l, n, n, n).t());
            solve_rows(&l, n, &mut y);
            let worst = y.iter().zip(&x).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            assert!(worst < 1e-3, "{n}: {worst}");
        }
        assert!(cholesky(&mut [1.0, 2.0, 2.0, 1.0], 2).is_none());
    }
}
