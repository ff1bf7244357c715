//! Rounding for inputs that are known: what a row's product loses with one weight, the weights after it make up for.
//!
//! That is GPTQ (Frantar et al. 2022): columns are rounded from first to last, and each one's error is taken from the
//! columns that are left, as the inputs' second moments say they stand in for it. Scales are chosen by the same search as without; there an
//! error of a weight counts as what is left of it when all weights after it have made up for it.

use flashlm_formats::weight_format::{SCALE_BYTES, WeightFormat};
use flashlm_kernels::{View, product};
use rayon::prelude::*;

use super::{NotFinite, group_scale, integer, inverse, pad, put, range};
use crate::linear::{cholesky, inverse_lower};

/// Columns whose errors reach the columns after them in one product.
const COLUMNS: usize = 128;
/// Rows of a piece of work.
const ROWS: usize = 64;

/// What errors of a row's weights cost on some inputs.
pub(crate) struct Metric {
    /// `[d, d]`, upper triangular: its square is the inverse of the inputs' second moments.
    upper: Vec<f32>,
    /// What is left of an error of each input's weight when those after it have made up for it, as a share of the largest.
    costs: Vec<f32>,
    d: usize,
}

impl Metric {
    /// Damping where inputs have a few times as many tokens as there are of them.
    pub(crate) const DAMPING: f32 = 0.01;

    /// From second moments of the inputs, `[d, d]`; about the mean, where a bias makes up for the mean's part. `damping` is added to their
    /// diagonal, of its mean: little-used inputs must not be traded at any price. None if they are not those of numbers.
    pub(crate) fn new(moments: &[f32], d: usize, damping: f32) -> Option<Self> {
        let ridge = damping * (0..d).map(|i| moments[i * d + i]).sum::<f32>() / d as f32;
        // The inverse's upper factor is the inverse of the factor from the last row upwards.
        let mut reversed: Vec<f32> = moments.iter().rev().copied().collect();
        // Inputs that are always the same say nothing: all errors cost alike.
        (0..d).for_each(|i| reversed[i * d + i] += if ridge > 0.0 { ridge } else { 1.0 });
        let mut upper = inverse_lower(&cholesky(reversed, d)?, d);
        upper.reverse();
        let costs = (0..d).map(|i| upper[i * d + i].powi(-2));
        let most = costs.clone().fold(0f32, f32::max);
        let costs: Vec<f32> = costs.map(|cost| cost / most).collect();
        upper.iter().chain(&costs).all(|v| v.is_finite()).then_some(Self { upper, costs, d })
    }

    /// The diagonal's element of an input, and those after it.
    pub(super) fn row(&self, i: usize) -> &[f32] {
        &self.upper[i * self.d + i..(i + 1) * self.d]
    }
}

/// Quantises `rows` as [`super::quantise_rows`] does, for inputs of this metric, and leaves in `rows` what their weights have become.
///
/// # Errors
/// If a weight is not finite.
///
/// # Panics
/// If `format` has no scales, or a length does not fit the others.
pub(crate) fn quantise_rows_for(
    metric: &Metric,
    format: WeightFormat,
    rows: &mut [f32],
    values: &mut [u8],
    scales: &mut [u8],
) -> Result<(), NotFinite> {
    let d = metric.d;
    let (row_bytes, scale_bytes) = (format.row_bytes(d), format.scales(d) * SCALE_BYTES);
    assert_eq!(values.len(), rows.len() / d * row_bytes, "bytes of the values");
    assert_eq!(scales.len(), rows.len() / d * scale_bytes, "bytes of the scales");
    let values = values.par_chunks_mut(ROWS * row_bytes);
    let scales = scales.par_chunks_mut(ROWS * scale_bytes);
    let pieces = rows.par_chunks_mut(ROWS * d).zip(values.zip(scales));
    pieces.map(|(rows, (values, scales))| piece(metric, format, rows, values, scales)).collect()
}

fn piece(
    metric: &Metric,
    format: WeightFormat,
    rows: &mut [f32],
    values: &mut [u8],
    scales: &mut [u8],
) -> Result<(), NotFinite> {
    let d = metric.d;
    let group = format.group().expect("a quantised format").elements();
    let (row_bytes, scale_bytes) = (format.row_bytes(d), format.scales(d) * SCALE_BYTES);
    let count = rows.len() / d;
    let mut errors = vec![0.0; count * COLUMNS];
    let (mut shares, mut by, range) = (Vec::new(), vec![(0.0, 0.0); count], range(format));
    for first in (0..d).step_by(COLUMNS) {
        let end = (first + COLUMNS).min(d);
        errors.fill(0.0);
        let places = values.chunks_exact_mut(row_bytes).zip(scales.chunks_exact_mut(scale_bytes));
        let each = rows.chunks_exact_mut(d).zip(places).zip(errors.chunks_exact_mut(COLUMNS).zip(&mut by));
        for ((row, (values, scales)), (errors, by)) in each {
            for i in first..end {
                if i % group == 0 {
                    let (scale, _) = group_scale(format, &row[i..(i + group).min(d)], &metric.costs[i..], &mut shares)?;
                    scales[i / group * SCALE_BYTES..][..SCALE_BYTES].copy_from_slice(&scale.to_le_bytes());
                    *by = (inverse(scale.to_f32()), scale.to_f32());
                }
                let number = integer(row[i] * by.0, range);
                put(format, values, i, number);
                let upper = &metric.upper[i * d..][..end];
                let error = (row[i] - number * by.1) / upper[i];
                row[i] = number * by.1;
                row[i + 1..end].iter_mut().zip(&upper[i + 1..]).for_each(|(w, u)| *w -= error * u);
                errors[i - first] = -error;
            }
        }
        if end < d {
            let errors = View::rows(&errors, count, end - first, COLUMNS);
            let behind = View::rows(&metric.upper[first * d + end..], end - first, d - end, d);
            product(&mut rows[end..], d, true, errors, behind);
        }
    }
    values.chunks_exact_mut(row_bytes).for_each(|values| pad(format, values, d));
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::quantise_rows;
    use super::*;
    use crate::linear::{add_gram, mirror};
    use crate::train::random::Random;

    /// Inputs that depend on each other, and the second moments of them.
    pub(in super::super) fn inputs(tokens: usize, d: usize) -> (Vec<f32>, Vec<f32>) {
        let mut random = Random::new(1);
        let mut x = Vec::new();
        for _ in 0..tokens {
            let common = [random.signed(), random.signed(), random.signed()];
            x.extend((0..d).map(|i| common[i % 3] * (1 + i % 5) as f32 + 0.3 * random.signed()));
        }
        let mut moments = vec![0.0; d * d];
        add_gram(&mut moments, d, &x);
        mirror(&mut moments, d);
        (x, moments)
    }

    /// Squared error of the products of `rows` with the inputs.
    pub(in super::super) fn lost(x: &[f32], before: &[f32], after: &[f32], d: usize) -> f64 {
        let off: Vec<f32> = before.iter().zip(after).map(|(b, a)| b - a).collect();
        let (tokens, rows) = (x.len() / d, off.len() / d);
        let mut products = vec![0.0; tokens * rows];
        product(&mut products, rows, false, View::rows(x, tokens, d, d), View::rows(&off, rows, d, d).t());
        products.iter().map(|v| f64::from(*v) * f64::from(*v)).sum()
    }

    #[test]
    fn products_lose_less_and_bytes_say_what_rows_became() {
        let (d, count) = (COLUMNS + 71, ROWS + 3);
        let (x, moments) = inputs(500, d);
        let metric = Metric::new(&moments, d, Metric::DAMPING).unwrap();
        let mut random = Random::new(2);
        let rows: Vec<f32> = (0..count * d).map(|_| random.signed()).collect();
        for format in ["int4/32", "int4/64", "int8/128"] {
            let format: WeightFormat = format.parse().unwrap();
            let room = || (vec![0xa5; count * format.row_bytes(d)], vec![0xa5; count * format.scales(d) * SCALE_BYTES]);
            let (mut values, mut scales) = room();
            let mut became = rows.clone();
            quantise_rows_for(&metric, format, &mut became, &mut values, &mut scales).unwrap();
            assert_eq!(super::super::tests::back(format, d, &values, &scales), became, "{format}");

            let (mut values, mut scales) = room();
            quantise_rows(format, &rows, d, &mut values, &mut scales).unwrap();
            let plain = super::super::tests::back(format, d, &values, &scales);
            let (plain, compensated) = (lost(&x, &rows, &plain, d), lost(&x, &rows, &became, d));
            assert!(compensated < 0.3 * plain, "{format}: {compensated} of {plain}");
        }
    }

    #[test]
    fn scales_are_for_what_cannot_be_made_up_for() {
        let (d, count) = (COLUMNS + 64, ROWS);
        let (x, moments) = inputs(500, d);
        let weighed = Metric::new(&moments, d, Metric::DAMPING).unwrap();
        let alike = Metric { costs: vec![1.0; d], upper: weighed.upper.clone(), d };
        let mut random = Random::new(4);
        let rows: Vec<f32> = (0..count * d).map(|_| random.signed()).collect();
        let with = |metric: &Metric| {
            let format = WeightFormat::INT4;
            let (mut values, mut scales) =
                (vec![0; count * format.row_bytes(d)], vec![0; count * format.scales(d) * SCALE_BYTES]);
            let mut became = rows.clone();
            quantise_rows_for(metric, format, &mut became, &mut values, &mut scales).unwrap();
            lost(&x, &rows, &became, d)
        };
        assert!(with(&weighed) < 0.97 * with(&alike), "{} against {}", with(&weighed), with(&alike));
    }

    #[test]
    fn threads_change_no_bit_and_nothing_known_is_plain_rounding() {
        let d = 96;
        let (_, moments) = inputs(300, d);
        let metric = Metric::new(&moments, d, Metric::DAMPING).unwrap();
        let mut random = Random::new(3);
        let rows: Vec<f32> = (0..200 * d).map(|_| random.signed()).collect();
        let format = WeightFormat::INT4;
        let with = |metric: &Metric| {
            let (mut values, mut scales) =
                (vec![0; 200 * format.row_bytes(d)], vec![0; 200 * format.scales(d) * SCALE_BYTES]);
            quantise_rows_for(metric, format, &mut rows.clone(), &mut values, &mut scales).unwrap();
            (values, scales)
        };
        let on =
            |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| with(&metric));
        assert!(on(1) == on(3));
        let (mut values, mut scales) =
            (vec![0; 200 * format.row_bytes(d)], vec![0; 200 * format.scales(d) * SCALE_BYTES]);
        quantise_rows(format, &rows, d, &mut values, &mut scales).unwrap();
        assert!(with(&Metric::new(&vec![0.0; d * d], d, Metric::DAMPING).unwrap()) == (values, scales));
    }
}
