//! Quantising rows of numbers to rows of integers with scales.
//!
//! Every group of a row is treated for itself: of a few scales, some of which cut off the largest weights, the one with the smallest
//! squared error is taken. For half bytes it is fitted once more to the integers it gives; for bytes the scales tried are all those
//! near the smallest that cuts nothing off. A scale is rounded to bf16 before the integers are chosen, so that its rounding costs
//! nothing.
//! It knows neither models nor files.

mod columns;
mod compensated;

use std::iter::Sum;
use std::ops::AddAssign;

pub(crate) use columns::quantise_columns_for;
pub(crate) use compensated::{Metric, quantise_rows_for};
use flashlm_formats::weight_format::{SCALE_BYTES, WeightFormat};
use half::bf16;

/// Elements of a block of half bytes.
const INT4_BLOCK: usize = 32;
/// What the largest weight of a group of half bytes becomes, for each scale that is tried: beyond the range it is cut off.
const INT4_TRIALS: [f32; 14] = [-8.0, 7.0, -8.4, -7.6, 7.4, -8.8, 7.8, -9.3, 8.3, -9.9, 8.9, -10.6, 9.6, -7.0];
/// How many bf16 above and below the smallest scale of bytes that cuts nothing off are tried.
const INT8_TRIALS: u16 = 4;

/// What quantising made of weights.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Squares {
    /// Of the weights.
    weights: f64,
    /// Of their errors.
    errors: f64,
}

impl Squares {
    /// Of what weights were, and of what they have become.
    pub(crate) fn between(before: &[f32], after: &[f32]) -> Self {
        let square = |v: f32| f64::from(v) * f64::from(v);
        let errors = before.iter().zip(after).map(|(before, after)| square(before - after)).sum();
        Self { weights: before.iter().map(|w| square(*w)).sum(), errors }
    }

    /// The errors' as a share of the weights'.
    pub(crate) fn share(self) -> f64 {
        if self.errors == 0.0 { 0.0 } else { self.errors / self.weights }
    }
}

impl AddAssign for Squares {
    fn add_assign(&mut self, other: Self) {
        self.weights += other.weights;
        self.errors += other.errors;
    }
}

impl Sum for Squares {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |mut sum, one| {
            sum += one;
            sum
        })
    }
}

/// A weight that is no finite number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotFinite;

/// Quantises `rows`, which have `cols` elements each, to `values` and `scales`, row after row, and says what that cost.
///
/// # Errors
/// If a weight is not finite.
///
/// # Panics
/// If `format` has no scales, or a length does not fit the others.
pub(crate) fn quantise_rows(
    format: WeightFormat,
    rows: &[f32],
    cols: usize,
    values: &mut [u8],
    scales: &mut [u8],
) -> Result<Squares, NotFinite> {
    let group = format.group().expect("a quantised format").elements();
    let (row_bytes, scale_bytes) = (format.row_bytes(cols), format.scales(cols) * SCALE_BYTES);
    assert_eq!(values.len(), rows.len() / cols * row_bytes, "bytes of the values");
    assert_eq!(scales.len(), rows.len() / cols * scale_bytes, "bytes of the scales");
    let (mut shares, range, costs) = (Vec::with_capacity(group.min(cols)), range(format), vec![1.0; group.min(cols)]);
    let mut squares = Squares::default();
    let places = values.chunks_exact_mut(row_bytes).zip(scales.chunks_exact_mut(scale_bytes));
    for (row, (values, scales)) in rows.chunks_exact(cols).zip(places) {
        for ((number, weights), to) in row.chunks(group).enumerate().zip(scales.chunks_exact_mut(SCALE_BYTES)) {
            let (scale, lost) = group_scale(format, weights, &costs, &mut shares)?;
            squares += lost;
            to.copy_from_slice(&scale.to_le_bytes());
            let by = inverse(scale.to_f32());
            for (i, w) in weights.iter().enumerate() {
                put(format, values, number * group + i, integer(w * by, range));
            }
        }
        pad(format, values, cols);
    }
    Ok(squares)
}

/// The scale of a group, and what it costs, where a squared error of each weight counts as `costs` says, 1 at most; `shares` is room to work
/// in.
fn group_scale(
    format: WeightFormat,
    weights: &[f32],
    costs: &[f32],
    shares: &mut Vec<f32>,
) -> Result<(bf16, Squares), NotFinite> {
    let largest = weights.iter().fold(0f32, |m, w| if w.abs() > m.abs() { *w } else { m });
    // An infinity is the largest; NaN is never larger.
    if !largest.is_finite() || weights.iter().any(|w| w.is_nan()) {
        return Err(NotFinite);
    }
    let size = largest.abs();
    if size == 0.0 {
        return Ok((bf16::ZERO, Squares::default()));
    }
    // As shares of the largest: squares of what is very large or small would be lost.
    shares.clear();
    shares.extend(weights.iter().map(|w| w / size));
    let range = range(format);
    let better = |best: (f32, bf16), scale: bf16| {
        let error = squared_error(shares, costs, scale.to_f32() / size, range);
        if error < best.0 { (error, scale) } else { best }
    };
    let best = |tried: &[bf16]| tried.iter().fold((f32::INFINITY, bf16::ZERO), |best, scale| better(best, *scale));
    let (error, scale) = match format {
        WeightFormat::Int4(_) => {
            let best = best(&INT4_TRIALS.map(|becomes| bf16::from_f32(largest / becomes)));
            better(best, least_squares(shares, costs, best.1.to_f32() / size, size, range))
        }
        _ => {
            let middle = bf16_at_least(size / 127.0).to_bits();
            // The middle one first: of equals the first is taken.
            let mut tried = [bf16::from_bits(middle); 1 + 2 * INT8_TRIALS as usize];
            for (pair, off) in tried[1..].chunks_exact_mut(2).zip(1..) {
                let near = [middle.saturating_sub(off), middle + off];
                pair.copy_from_slice(&near.map(bf16::from_bits));
            }
            best(&tried)
        }
    };
    let of_all = f64::from(size) * f64::from(size);
    let weights = of_all * f64::from(squared_error(shares, costs, 0.0, range));
    Ok((scale, Squares { weights, errors: of_all * f64::from(error) }))
}

/// The least and the largest integer.
fn range(format: WeightFormat) -> (f32, f32) {
    match format {
        WeightFormat::Int4(_) => (-8.0, 7.0),
        _ => (-127.0, 127.0),
    }
}

/// The integer nearest to a weight over its scale.
fn integer(v: f32, (least, most): (f32, f32)) -> f32 {
    clamp(round(v), least, most)
}

/// Writes element `i` of a row, whose elements are written from first to last.
fn put(format: WeightFormat, values: &mut [u8], i: usize, number: f32) {
    let number = number as i8 as u8;
    match format {
        WeightFormat::Int4(_) => {
            let (block, i) = (i / INT4_BLOCK, i % INT4_BLOCK);
            let byte = &mut values[block * (INT4_BLOCK / 2) + i % (INT4_BLOCK / 2)];
            // The low half comes first.
            *byte = if i < INT4_BLOCK / 2 { number & 15 } else { *byte | number << 4 };
        }
        _ => values[i] = number,
    }
}

/// In a last block that is not full, low halves without a weight were never written.
fn pad(format: WeightFormat, values: &mut [u8], cols: usize) {
    let filled = cols % INT4_BLOCK;
    if matches!(format, WeightFormat::Int4(_)) && filled > 0 && filled < INT4_BLOCK / 2 {
        let last = values.len() - INT4_BLOCK / 2;
        values[last + filled..].fill(0);
    }
}

/// The scale with the least squared error for the integers that `scale` gives; the weights are `shares` of `size`.
fn least_squares(shares: &[f32], costs: &[f32], scale: f32, size: f32, range: (f32, f32)) -> bf16 {
    let by = inverse(scale);
    let (mut products, mut squares) = (0.0, 0.0);
    for (share, cost) in shares.iter().zip(costs) {
        let number = integer(share * by, range);
        products += f64::from(*cost) * f64::from(*share) * f64::from(number);
        squares += f64::from(*cost) * f64::from(number) * f64::from(number);
    }
    if squares > 0.0 { bf16::from_f32((products / squares) as f32 * size) } else { bf16::ZERO }
}

/// The squared error of a group's integers at this scale, each at its cost.
fn squared_error(weights: &[f32], costs: &[f32], scale: f32, range: (f32, f32)) -> f32 {
    // Eight sums side by side: a compiler may not reorder one.
    let (by, mut sums) = (inverse(scale), [0f32; 8]);
    let ((chunks, rest), (their_costs, rest_costs)) =
        (weights.as_chunks::<8>(), costs[..weights.len()].as_chunks::<8>());
    for (chunk, costs) in chunks.iter().zip(their_costs) {
        for (sum, (w, cost)) in sums.iter_mut().zip(chunk.iter().zip(costs)) {
            let error = w - integer(w * by, range) * scale;
            *sum += cost * (error * error);
        }
    }
    for (sum, (w, cost)) in sums.iter_mut().zip(rest.iter().zip(rest_costs)) {
        let error = w - integer(w * by, range) * scale;
        *sum += cost * (error * error);
    }
    let error: f32 = sums.iter().sum();
    if error.is_nan() { f32::INFINITY } else { error }
}

/// One over the scale; nothing where all is zero.
fn inverse(scale: f32) -> f32 {
    let by = 1.0 / scale;
    if by.is_finite() { by } else { 0.0 }
}

/// The nearest integer, ties to even, for magnitudes below 2^22: in plain additions, which compile to vectors.
fn round(v: f32) -> f32 {
    const SHIFT: f32 = 1.5 * (1u32 << 23) as f32;
    (clamp(v, -1e6, 1e6) + SHIFT) - SHIFT
}

/// As `f32::clamp` for what is no NaN, in plain comparisons.
fn clamp(v: f32, least: f32, most: f32) -> f32 {
    let v = if v > least { v } else { least };
    if v < most { v } else { most }
}

/// The smallest bf16 that is not below `v`, which is finite and not negative.
fn bf16_at_least(v: f32) -> bf16 {
    let bits = v.to_bits();
    bf16::from_bits((bits >> 16) as u16 + u16::from(bits & 0xffff != 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use flashlm_kernels::{Element, Row, ScaleGroup, to_f32};
    use proptest::prelude::*;

    pub(super) fn back(format: WeightFormat, cols: usize, values: &[u8], scales: &[u8]) -> Vec<f32> {
        let element = if matches!(format, WeightFormat::Int4(_)) { Element::Q4 } else { Element::Q8 };
        let group = ScaleGroup::new(format.group().unwrap().elements()).unwrap();
        let rows = values.chunks_exact(format.row_bytes(cols)).zip(scales.chunks_exact(group.scale_bytes(cols)));
        let mut out = vec![0.0; values.len() / format.row_bytes(cols) * cols];
        for (to, (values, scales)) in out.chunks_exact_mut(cols).zip(rows) {
            to_f32(element, Row::quantised(values, scales, group), to);
        }
        out
    }

    fn there_and_back(format: &str, cols: usize, rows: &[f32]) -> Vec<f32> {
        let format: WeightFormat = format.parse().unwrap();
        let count = rows.len() / cols;
        // Old bytes must not shine through.
        let mut values = vec![0xa5; count * format.row_bytes(cols)];
        let mut scales = vec![0xa5; count * format.scales(cols) * SCALE_BYTES];
        let squares = quantise_rows(format, rows, cols, &mut values, &mut scales).unwrap();
        let after = back(format, cols, &values, &scales);
        let (said, found) = (squares.share().sqrt(), relative_error(rows, &after));
        let is_zero = rows.iter().all(|w| *w == 0.0);
        assert!(is_zero || (said - found).abs() <= 1e-4 * found + 1e-6, "{format}: {said} is said, {found} found");
        after
    }

    fn weights(count: usize, seed: u64) -> Vec<f32> {
        // About normal: the sum of four even ones.
        let hash = |i: u64| flashlm_formats::bundle::checksum(&(seed << 32 | i).to_le_bytes()) as u32;
        let even = |i: u64| f64::from(hash(i)) / f64::from(u32::MAX) - 0.5;
        (0..count as u64).map(|i| (4 * i..4 * i + 4).map(even).sum::<f64>() as f32 / 20.0).collect()
    }

    /// Root of the mean squared error against that of the weights.
    fn relative_error(before: &[f32], after: &[f32]) -> f64 {
        let square = |v: f32| f64::from(v) * f64::from(v);
        let error: f64 = before.iter().zip(after).map(|(b, a)| square(b - a)).sum();
        (error / before.iter().map(|b| square(*b)).sum::<f64>()).sqrt()
    }

    #[test]
    fn errors_are_as_small_as_the_numbers_allow() {
        let rows = weights(64 * 256, 1);
        for (format, most) in [("int8/32", 0.0055), ("int8/128", 0.007), ("int4/32", 0.085), ("int4/128", 0.105)] {
            let error = relative_error(&rows, &there_and_back(format, 256, &rows));
            assert!(error < most && error > most / 3.0, "{format}: {error}");
        }
    }

    #[test]
    fn searching_beats_the_largest_weight() {
        let rows = weights(64 * 256, 2);
        let plain: f64 = rows
            .chunks(32)
            .map(|group| {
                let largest = group.iter().fold(0f32, |m, w| m.max(w.abs()));
                f64::from(squared_error(group, &[1.0; 32], largest / 7.0, (-8.0, 7.0)))
            })
            .sum();
        let searched: f64 = rows
            .iter()
            .zip(there_and_back("int4/32", 256, &rows))
            .map(|(b, a)| f64::from(b - a) * f64::from(b - a))
            .sum();
        assert!(searched < 0.85 * plain, "{searched} against {plain}");
    }

    #[test]
    fn bytes_may_cut_off_or_leave_room_where_that_loses_less() {
        let rows = weights(64 * 256, 4);
        let after = there_and_back("int8/32", 256, &rows);
        let (mut plain, mut searched) = (0.0, 0.0);
        for (before, after) in rows.chunks(32).zip(after.chunks(32)) {
            let largest = before.iter().fold(0f32, |m, w| m.max(w.abs()));
            let whole =
                f64::from(squared_error(before, &[1.0; 32], bf16_at_least(largest / 127.0).to_f32(), (-127.0, 127.0)));
            let found: f64 = before.iter().zip(after).map(|(b, a)| f64::from(b - a) * f64::from(b - a)).sum();
            // Sums in 32 bits, and of shares.
            assert!(found <= 1.001 * whole, "{found} against {whole}");
            (plain, searched) = (plain + whole, searched + found);
        }
        assert!(searched < 0.85 * plain, "{searched} against {plain}");
    }

    #[test]
    fn what_cannot_be_scaled_is_refused() {
        for format in ["int8/32", "int4/32"] {
            let format: WeightFormat = format.parse().unwrap();
            for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut rows = vec![0.5; 40];
                rows[33] = wrong;
                let (mut values, mut scales) = (vec![0; format.row_bytes(40)], vec![0; 4]);
                let result = quantise_rows(format, &rows, 40, &mut values, &mut scales);
                assert_eq!(result, Err(NotFinite), "{format} {wrong}");
            }
        }
    }

    #[test]
    fn extremes_survive() {
        for format in ["int8/32", "int4/32"] {
            assert_eq!(there_and_back(format, 32, &[0.0; 64]), [0.0; 64]);
            // Integers of one scale come back as they were.
            let exact: Vec<f32> = (0..32).map(|i| (i % 16) as f32 - 8.0).collect();
            assert!(format != "int4/32" || there_and_back(format, 32, &exact) == exact);
            for size in [1e-30f32, 1e30, f32::MAX] {
                let rows: Vec<f32> = (0..32).map(|i| size * (i as f32 / 31.0)).collect();
                let error = relative_error(&rows, &there_and_back(format, 32, &rows));
                assert!(error < 0.1, "{format} {size}: {error}");
            }
        }
    }

    proptest! {
        #[test]
        fn bytes_are_within_a_step(rows in prop::collection::vec(-1e3f32..1e3, 1..300)) {
            let after = there_and_back("int8/64", rows.len(), &rows);
            for (before, after) in rows.chunks(64).zip(after.chunks(64)) {
                let largest = before.iter().fold(0f32, |m, w| m.max(w.abs()));
                // Half a step of a scale five parts in 128 too large; or the largest, cut off by four parts in 128.
                for (b, a) in before.iter().zip(after) {
                    let most = (largest / 127.0 * 0.52 + 1e-6).max(b.abs() - largest * (1.0 - 4.01 / 128.0));
                    prop_assert!((b - a).abs() <= most, "{b} became {a} beside {largest}");
                }
            }
        }

        #[test]
        fn half_bytes_leave_no_old_bytes(cols in 1usize..100) {
            let format: WeightFormat = "int4/32".parse().unwrap();
            let rows = weights(cols, 3);
            let made = |old: u8| {
                let (mut values, mut scales) = (vec![old; format.row_bytes(cols)], vec![old; format.scales(cols) * 2]);
                quantise_rows(format, &rows, cols, &mut values, &mut scales).unwrap();
                (values, scales)
            };
            prop_assert_eq!(made(0), made(0xff));
        }
    }
}
