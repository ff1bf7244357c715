//! Plain twins: what each fast kernel computes, one element at a time, summed in f64. For tests; slow.

use half::{bf16, f16};

use crate::element::{Element, Q4_BLOCK};
use crate::matrix::Matrix;
use crate::row::Row;
use crate::whole::{INPUT_BLOCK, round_block, whole_cols};

/// Element `i` of a row.
pub fn element_at(element: Element, row: Row<'_>, i: usize) -> f32 {
    let values = row.values();
    match element {
        Element::F32 => f32::from_le_bytes(std::array::from_fn(|b| values[4 * i + b])),
        Element::F16 => f16::from_le_bytes([values[2 * i], values[2 * i + 1]]).to_f32(),
        Element::Bf16 => bf16::from_le_bytes([values[2 * i], values[2 * i + 1]]).to_f32(),
        Element::I8 => f32::from(values[i] as i8),
        Element::Q8 => f32::from(values[i] as i8) * row.scale(i),
        Element::Q4 => {
            let byte = values[i / Q4_BLOCK * (Q4_BLOCK / 2) + i % (Q4_BLOCK / 2)];
            let half = if i % Q4_BLOCK < Q4_BLOCK / 2 { byte & 15 } else { byte >> 4 };
            (f32::from(half) - if half > 7 { 16.0 } else { 0.0 }) * row.scale(i)
        }
    }
}

/// The first `cols` elements of a row as f32.
pub fn to_f32(element: Element, row: Row<'_>, cols: usize) -> Vec<f32> {
    (0..cols).map(|i| element_at(element, row, i)).collect()
}

/// The dot product of a row with `x`, and the sum of the absolute values of its terms (what errors are measured by).
pub fn dot(element: Element, row: Row<'_>, x: &[f32]) -> (f64, f64) {
    let terms = x.iter().enumerate().map(|(i, &x)| f64::from(element_at(element, row, i)) * f64::from(x));
    terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()))
}

/// `x` as dot products with rows of `element` see it: rounded, block by block, where these are integers.
pub fn input_of(element: Element, x: &[f32]) -> Vec<f32> {
    let mut x = x.to_vec();
    if element.is_whole() {
        let whole = whole_cols(x.len());
        for block in x[..whole].chunks_mut(INPUT_BLOCK) {
            let (mut floats, mut numbers) = ([0.0; INPUT_BLOCK], [0; INPUT_BLOCK]);
            floats[..block.len()].copy_from_slice(block);
            let scale = round_block(&floats, &mut numbers);
            block.iter_mut().zip(numbers).for_each(|(value, number)| *value = f32::from(number) * scale);
        }
    }
    x
}

/// `y = W x`, each with the size of its terms.
pub fn matvec(w: Matrix<'_>, x: &[f32]) -> Vec<(f64, f64)> {
    let x = input_of(w.element(), x);
    (0..w.rows()).map(|r| dot(w.element(), w.row(r), &x)).collect()
}

/// `y + sum of a * W[row]`, each with the size of its terms.
pub fn add_scaled_rows(w: Matrix<'_>, active: &[(u32, f32)], y: &[f32]) -> Vec<(f64, f64)> {
    let start = |&y: &f32| (f64::from(y), f64::from(y).abs());
    let mut sums: Vec<(f64, f64)> = y.iter().map(start).collect();
    for &(row, a) in active {
        for (c, (sum, size)) in sums.iter_mut().enumerate() {
            let term = f64::from(a) * f64::from(element_at(w.element(), w.row(row as usize), c));
            *sum += term;
            *size += term.abs();
        }
    }
    sums
}

/// Vectors times the softmax of their scores.
pub fn softmax_sum<const N: usize>(scores: &[f32], vectors: &[[f32; N]]) -> [f64; N] {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let factors: Vec<f64> = scores.iter().map(|score| f64::from(score - largest).exp()).collect();
    let total: f64 = factors.iter().sum();
    std::array::from_fn(|c| factors.iter().zip(vectors).map(|(a, v)| a / total * f64::from(v[c])).sum())
}

/// `row` as bytes and their scale, a bf16: see [`crate::store_i8`].
pub fn store_i8(row: &[f32]) -> (Vec<i8>, bf16) {
    let largest = row.iter().fold(0.0, |largest: f32, v| largest.max(v.abs()));
    let mut scale = bf16::from_f32(largest / 127.0);
    if scale.to_f32() < largest / 127.0 {
        scale = bf16::from_bits(scale.to_bits() + 1);
    }
    if scale.to_f32() < f32::MIN_POSITIVE {
        scale = bf16::ZERO;
    }
    let whole = |v: &f32| if scale == bf16::ZERO { 0 } else { (v / scale.to_f32()).round_ties_even() as i8 };
    (row.iter().map(whole).collect(), scale)
}

/// `y[t, r] = sum over c of x[t, c] W[r, c]`, tightly packed, each with the size of its terms.
pub fn matmul(w: Matrix<'_>, x: &[f32], tokens: usize) -> Vec<(f64, f64)> {
    (0..tokens).flat_map(|t| matvec(w, &x[t * w.cols()..(t + 1) * w.cols()])).collect()
}

/// `y[t, c] + sum over r of a[t, r] W[r, c]`, each with the size of its terms.
pub fn matmul_rows_add(w: Matrix<'_>, a: &[f32], a_stride: usize, tokens: usize, y: &[f32]) -> Vec<(f64, f64)> {
    let token = |t: usize| {
        let active: Vec<(u32, f32)> = (0..w.rows()).map(|r| (r as u32, a[t * a_stride + r])).collect();
        add_scaled_rows(w, &active, &y[t * w.cols()..(t + 1) * w.cols()])
    };
    (0..tokens).flat_map(token).collect()
}
