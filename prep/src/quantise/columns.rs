//! The same rounding for a matrix whose rows, and not whose columns, are multiplied with the inputs and summed: neurons' down rows.
//!
//! A row has scales of its own, which run across the direction that errors are made up for in: so each is chosen when the row's turn comes,
//! and any order of the rows will do.

use flashlm_formats::weight_format::{SCALE_BYTES, WeightFormat};
use rayon::prelude::*;

use super::compensated::Metric;
use super::{NotFinite, group_scale, integer, inverse, pad, put, range};

/// Least columns of a piece of work, which has whole groups.
const COLUMNS: usize = 64;

/// Quantises `rows` of `width` elements each, one for each input of `metric`, and leaves in `rows` what their weights have become.
///
/// # Errors
/// If a weight is not finite.
///
/// # Panics
/// If `format` has no scales, or a length does not fit the others.
pub(crate) fn quantise_columns_for(
    metric: &Metric,
    format: WeightFormat,
    rows: &mut [f32],
    width: usize,
    values: &mut [u8],
    scales: &mut [u8],
) -> Result<(), NotFinite> {
    let (row_bytes, row_scales) = (format.row_bytes(width), format.scales(width) * SCALE_BYTES);
    let count = rows.len() / width;
    assert_eq!((values.len(), scales.len()), (count * row_bytes, count * row_scales), "bytes of values and scales");
    let group = format.group().expect("a quantised format").elements();
    let wide = group.max(COLUMNS);
    let firsts: Vec<usize> = (0..width).step_by(wide).collect();
    let whole = &*rows;
    let stripes = firsts.par_iter().map(|&first| {
        let end = (first + wide).min(width);
        let rows = whole.chunks_exact(width).flat_map(|row| &row[first..end]).copied().collect();
        Stripe::new(metric, format, rows, end - first)
    });
    let stripes: Vec<Stripe> = stripes.collect::<Result<_, _>>()?;
    for (&first, stripe) in firsts.iter().zip(&stripes) {
        // A stripe begins with a group, and so with a whole byte.
        let (from, scale) = (format.row_bytes(first), format.scales(first) * SCALE_BYTES);
        spread(rows, width, first, &stripe.rows, count);
        spread(values, row_bytes, from, &stripe.values, count);
        spread(scales, row_scales, scale, &stripe.scales, count);
    }
    Ok(())
}

/// Copies a part of each of `count` rows to its place in the whole rows.
fn spread<T: Copy>(to: &mut [T], width: usize, first: usize, from: &[T], count: usize) {
    let part = from.len() / count;
    to.chunks_exact_mut(width).zip(from.chunks_exact(part)).for_each(|(to, from)| {
        to[first..first + part].copy_from_slice(from);
    });
}

/// Some columns of all rows.
struct Stripe {
    rows: Vec<f32>,
    values: Vec<u8>,
    scales: Vec<u8>,
}

impl Stripe {
    fn new(metric: &Metric, format: WeightFormat, mut rows: Vec<f32>, width: usize) -> Result<Self, NotFinite> {
        let group = format.group().expect("a quantised format").elements();
        let (row_bytes, row_scales) = (format.row_bytes(width), format.scales(width) * SCALE_BYTES);
        let count = rows.len() / width;
        let (mut values, mut scales) = (vec![0; count * row_bytes], vec![0; count * row_scales]);
        let (mut shares, mut errors, range) = (Vec::new(), vec![0.0; width], range(format));
        // All of a row are multiplied with the same input.
        let costs = vec![1.0; group.min(width)];
        for (i, (values, scales)) in
            values.chunks_exact_mut(row_bytes).zip(scales.chunks_exact_mut(row_scales)).enumerate()
        {
            let (row, behind) = rows[i * width..].split_at_mut(width);
            let from = metric.row(i);
            for (number, scale_to) in scales.chunks_exact_mut(SCALE_BYTES).enumerate() {
                let columns = number * group..((number + 1) * group).min(width);
                let (scale, _) = group_scale(format, &row[columns.clone()], &costs, &mut shares)?;
                scale_to.copy_from_slice(&scale.to_le_bytes());
                let (by, scale) = (inverse(scale.to_f32()), scale.to_f32());
                for column in columns {
                    let number = integer(row[column] * by, range);
                    put(format, values, column, number);
                    errors[column] = (row[column] - number * scale) / from[0];
                    row[column] = number * scale;
                }
            }
            pad(format, values, width);
            for (row, u) in behind.chunks_exact_mut(width).zip(&from[1..]) {
                row.iter_mut().zip(&errors).for_each(|(w, error)| *w -= error * u);
            }
        }
        Ok(Self { rows, values, scales })
    }
}

#[cfg(test)]
mod tests {
    use super::super::compensated::tests::{inputs, lost};
    use super::super::quantise_rows;
    use super::*;
    use crate::train::random::Random;

    fn transposed(rows: &[f32], width: usize) -> Vec<f32> {
        (0..width).flat_map(|j| rows.chunks_exact(width).map(move |row| row[j])).collect()
    }

    #[test]
    fn sums_lose_less_and_bytes_say_what_rows_became() {
        let (count, width) = (90, 2 * COLUMNS + 37);
        let (x, moments) = inputs(500, count);
        let metric = Metric::new(&moments, count, Metric::DAMPING).unwrap();
        let mut random = Random::new(2);
        let rows: Vec<f32> = (0..count * width).map(|_| random.signed()).collect();
        let before = transposed(&rows, width);
        for format in ["int4/32", "int4/128", "int8/64"] {
            let format: WeightFormat = format.parse().unwrap();
            let room = || (vec![0xa5; count * format.row_bytes(width)], vec![0xa5; count * format.scales(width) * 2]);
            let (mut values, mut scales) = room();
            let mut became = rows.clone();
            quantise_columns_for(&metric, format, &mut became, width, &mut values, &mut scales).unwrap();
            assert_eq!(super::super::tests::back(format, width, &values, &scales), became, "{format}");

            let (mut values, mut scales) = room();
            quantise_rows(format, &rows, width, &mut values, &mut scales).unwrap();
            let plain = super::super::tests::back(format, width, &values, &scales);
            let [plain, compensated] =
                [plain, became].map(|after| lost(&x, &before, &transposed(&after, width), count));
            assert!(compensated < 0.4 * plain, "{format}: {compensated} of {plain}");
        }
    }
}
