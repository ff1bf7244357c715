//! Plain f32 matrix products on one thread, for preparation: a safe interface to the `gemm` crate.
//!
//! Cut the work into pieces of fixed size and give the pieces to threads: each piece is computed by one thread, so the
//! result does not depend on how many there are.
#![expect(unsafe_code, reason = "the gemm crate takes pointers")]

/// A matrix seen in a slice of f32: element `(i, j)` is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> View<'a> {
    /// A row-major matrix whose rows are `stride` apart.
    ///
    /// # Panics
    /// If the slice is too short, or rows overlap.
    pub fn rows(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(stride >= cols, "rows of {cols} columns cannot be {stride} apart");
        assert!(data.len() >= span(rows, cols, stride), "{rows} rows, {stride} apart, in {} elements", data.len());
        View { data, rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// The transposed matrix.
    pub fn t(self) -> Self {
        View { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// Elements that `rows` rows of `cols` elements, `stride` apart, reach over.
fn span(rows: usize, cols: usize, stride: usize) -> usize {
    if rows == 0 { 0 } else { (rows - 1) * stride + cols }
}

/// `y = a b`, or `y += a b` when `accumulate`; `y` is row-major with rows `y_stride` apart.
///
/// # Panics
/// If the shapes do not fit together.
pub fn product(y: &mut [f32], y_stride: usize, accumulate: bool, a: View<'_>, b: View<'_>) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert_eq!(k, b.rows, "columns of the first factor against rows of the second");
    assert!(y_stride >= n, "rows of {n} columns cannot be {y_stride} apart");
    assert!(y.len() >= span(m, n, y_stride), "product of {m} x {n} in {} elements", y.len());
    if m == 0 || n == 0 {
        return;
    }
    // SAFETY: `View::rows` and the asserts above checked that every index of `a`, `b` and `y` lies in its slice; `y` is
    // borrowed exclusively, so it does not alias the factors. Without `accumulate` beta alone counts and `y` is not read.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            y.as_mut_ptr(),
            1,
            y_stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mut x = seed;
        (0..n)
            .map(|_| {
                x = x.wrapping_mul(1664525).wrapping_add(1013904223);
                (x >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    #[test]
    fn agrees_with_the_definition() {
        for (m, k, n) in [(1, 1, 1), (3, 5, 7), (17, 33, 9), (64, 100, 65), (2, 0, 3)] {
            let (a, b) = (numbers(m * (k + 2), 1), numbers(n * (k + 1), 2));
            let first = numbers(m * (n + 3), 3);
            for accumulate in [false, true] {
                let mut y = first.clone();
                product(&mut y, n + 3, accumulate, View::rows(&a, m, k, k + 2), View::rows(&b, n, k, k + 1).t());
                for i in 0..m {
                    for j in 0..n + 3 {
                        let old = first[i * (n + 3) + j];
                        let sum: f32 = (0..k).map(|c| a[i * (k + 2) + c] * b[j.min(n - 1) * (k + 1) + c]).sum();
                        let expected = if j >= n {
                            old
                        } else if accumulate {
                            old + sum
                        } else {
                            sum
                        };
                        let found = y[i * (n + 3) + j];
                        assert!((found - expected).abs() < 1e-4, "{m}x{k}x{n} ({i}, {j}): {found} for {expected}");
                    }
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "columns of the first factor")]
    fn shapes_that_do_not_fit_are_refused() {
        let a = [0.0; 6];
        product(&mut [0.0; 4], 2, false, View::rows(&a, 2, 3, 3), View::rows(&a, 2, 2, 2));
    }
}
