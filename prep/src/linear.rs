//! Matrix products over threads, and faer's factorisations.
//!
//! Matrices are row-major slices. Work is cut into pieces of fixed size, so the number of threads changes no bit.

use std::num::NonZeroUsize;

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{LltRegularization, cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place};
use faer::{Mat, MatMut, MatRef, Par, Spec};
use flashlm_kernels::{View, product};
use rayon::prelude::*;

/// Rows of a piece of a product.
const PIECE: usize = 128;
/// faer cuts its work into four parts, whatever the number of threads.
const PAR: Par = Par::Rayon(NonZeroUsize::new(4).expect("four"));

/// `y = a b` with the rows of the result in pieces over threads; `n` columns of `y`, `k` of `a`.
pub(crate) fn parallel_product(y: &mut [f32], n: usize, a: &[f32], k: usize, b: View<'_>) {
    y.par_chunks_mut(PIECE * n).zip(a.par_chunks(PIECE * k)).for_each(|(y, a)| {
        product(y, n, false, View::rows(a, a.len() / k, k, k), b);
    });
}

/// Adds `rows^T rows` to a symmetric matrix `[d, d]`, on and right of the diagonal's pieces; [`mirror`] fills the rest.
pub(crate) fn add_gram(sum: &mut [f32], d: usize, rows: &[f32]) {
    let count = rows.len() / d;
    sum.par_chunks_mut(PIECE * d).enumerate().for_each(|(i, y)| {
        let first = i * PIECE;
        let left = View::rows(&rows[first..], count, y.len() / d, d);
        product(&mut y[first..], d, true, left.t(), View::rows(&rows[first..], count, d - first, d));
    });
}

/// Copies what is right of the diagonal to its left.
pub(crate) fn mirror(m: &mut [f32], d: usize) {
    for i in 0..d {
        for j in 0..i {
            m[i * d + j] = m[j * d + i];
        }
    }
}

/// Eigenvalues of a symmetric matrix `[d, d]`, falling, and the eigenvectors as columns in that order; none where they cannot
/// be had.
pub(crate) fn eigen(m: &[f32], d: usize) -> Option<(Vec<f32>, Vec<f32>)> {
    let m = MatRef::from_row_major_slice(m, d, d);
    let (mut values, mut vectors) = (Diag::zeros(d), Mat::zeros(d, d));
    let scratch = self_adjoint_evd_scratch::<f32>(d, ComputeEigenvectors::Yes, PAR, Spec::default());
    let mut memory = MemBuffer::new(scratch);
    let stack = MemStack::new(&mut memory);
    self_adjoint_evd(m, values.as_mut(), Some(vectors.as_mut()), PAR, stack, Spec::default()).ok()?;
    let falling = || (0..d).rev();
    let rows = (0..d).flat_map(|i| falling().map(move |j| (i, j)));
    Some((falling().map(|j| values[j]).collect(), rows.map(|at| vectors[at]).collect()))
}

/// The lower Cholesky factor of a symmetric matrix `[d, d]`, in its place; none when it is not positive definite.
pub(crate) fn cholesky(mut m: Vec<f32>, d: usize) -> Option<Vec<f32>> {
    let mut memory = MemBuffer::new(cholesky_in_place_scratch::<f32>(d, PAR, Spec::default()));
    let stack = MemStack::new(&mut memory);
    let whole = MatMut::from_row_major_slice_mut(&mut m, d, d);
    cholesky_in_place(whole, LltRegularization::default(), PAR, stack, Spec::default()).ok()?;
    m.chunks_exact_mut(d).enumerate().for_each(|(i, row)| row[i + 1..].fill(0.0));
    m.iter().all(|v| v.is_finite()).then_some(m)
}

/// Solves `l^T x = y` in place for a lower triangular `l` `[d, d]`; `y` is `[d, n]`.
pub(crate) fn solve_transposed(l: &[f32], d: usize, y: &mut [f32], n: usize) {
    let l = MatRef::from_row_major_slice(l, d, d);
    solve_upper_triangular_in_place(l.transpose(), MatMut::from_row_major_slice_mut(y, d, n), PAR);
}

/// The inverse of a lower triangular matrix `[d, d]`.
pub(crate) fn inverse_lower(l: &[f32], d: usize) -> Vec<f32> {
    let mut inverse = vec![0.0; d * d];
    (0..d).for_each(|i| inverse[i * d + i] = 1.0);
    let identity = MatMut::from_row_major_slice_mut(&mut inverse, d, d);
    solve_lower_triangular_in_place(MatRef::from_row_major_slice(l, d, d), identity, PAR);
    inverse
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::random::Random;

    fn matrix(rows: usize, columns: usize, seed: u64) -> Vec<f32> {
        let mut random = Random::new(seed);
        (0..rows * columns).map(|_| random.signed()).collect()
    }

    fn gram(rows: &[f32], d: usize) -> Vec<f32> {
        let mut sum = vec![0.0; d * d];
        add_gram(&mut sum, d, rows);
        mirror(&mut sum, d);
        sum
    }

    fn worst(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    #[test]
    fn grams_are_whole_and_factors_multiply_back() {
        for d in [1, 3, PIECE, PIECE + 5] {
            let rows = matrix(2 * d, d, d as u64);
            let view = View::rows(&rows, 2 * d, d, d);
            let mut expected = vec![0.0; d * d];
            product(&mut expected, d, false, view.t(), view);
            let m = gram(&rows, d);
            assert!(worst(&m, &expected) < 1e-4 * d as f32, "{d}");

            let l = cholesky(m.clone(), d).unwrap();
            let lower = View::rows(&l, d, d, d);
            let mut back = vec![0.0; d * d];
            product(&mut back, d, false, lower, lower.t());
            assert!(worst(&back, &m) < 1e-4 * d as f32, "{d}");

            let x = matrix(d, 3, 7);
            let mut y = vec![0.0; d * 3];
            product(&mut y, 3, false, lower.t(), View::rows(&x, d, 3, 3));
            solve_transposed(&l, d, &mut y, 3);
            assert!(worst(&x, &y) < 1e-2, "{d}");

            let mut unit = vec![0.0; d * d];
            product(&mut unit, d, false, lower, View::rows(&inverse_lower(&l, d), d, d, d));
            let identity: Vec<f32> = (0..d * d).map(|at| if at / d == at % d { 1.0 } else { 0.0 }).collect();
            assert!(worst(&unit, &identity) < 1e-2, "{d}");

            let (values, vectors) = eigen(&m, d).unwrap();
            assert!(values.is_sorted_by(|a, b| a >= b), "{values:?}");
            let scaled: Vec<f32> = vectors.iter().enumerate().map(|(at, v)| v * values[at % d]).collect();
            product(&mut back, d, false, View::rows(&scaled, d, d, d), View::rows(&vectors, d, d, d).t());
            assert!(worst(&back, &m) < 1e-4 * d as f32, "{d}");
        }
        assert!(cholesky(vec![1.0, 2.0, 2.0, 1.0], 2).is_none());
    }

    #[test]
    fn threads_change_no_bit() {
        let m = gram(&matrix(700, 600, 3), 600);
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| (eigen(&m, 600), cholesky(m.clone(), 600)))
        };
        assert!(on(1) == on(3));
    }
}
