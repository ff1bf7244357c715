//! Which predictor each layer gets, under a budget for all of them.
//!
//! Layers differ widely: some are served by a handful of directions, others want many. A short trial of a few ranks on
//! each layer, and the quantised projection, give the false positives that remain at a fixed share of misses; of all ways to
//! spend the budget on the layers the one is taken that leaves least to be read for nothing.

use flashlm_formats::bundle::PredictorDType;
use flashlm_formats::predictors::{PredictorForm, RankCurve};

use super::params::TrainError;

/// A raise must lower the false-positive rate by this much of the growth in size (as a share of the layer's FFN): below,
/// the memory is better spent on cached neurons.
const GAIN_MIN: f64 = 0.05;
/// Steps that the bytes beyond the smallest predictors are counted in.
const STEPS: u64 = 4096;

/// A layer's shape, and how many of its neurons have rows.
#[derive(Clone, Copy, Debug)]
pub struct RowsOf {
    /// Width of the inputs.
    pub hidden: usize,
    /// Neurons.
    pub neurons: usize,
    /// Neurons that have a row.
    pub rows: usize,
}

/// Stored bytes of a predictor: matrices, scales, a bias for each row, and which neurons have rows where not all have. `dtype` is
/// that of two thin matrices.
pub fn form_bytes(form: PredictorForm, of: RowsOf, dtype: PredictorDType) -> u64 {
    match form {
        PredictorForm::LowRank(rank) => predictor_bytes(rank, of, dtype),
        PredictorForm::Projection(_) => predictor_bytes(of.hidden, of, PredictorDType::Int4),
    }
}

/// Stored bytes of a predictor of this rank, or of the quantised projection, whose rank is `hidden`.
pub fn predictor_bytes(rank: usize, of: RowsOf, dtype: PredictorDType) -> u64 {
    let (rank, hidden, rows) = (rank as u64, of.hidden as u64, of.rows as u64);
    let numbers = if of.rows < of.neurons { 4 * rows } else { 0 };
    let matrices = match dtype {
        PredictorDType::F16 => 2 * rank * (hidden + rows),
        PredictorDType::Int8 => rank * (hidden + rows) + 4 * (rank + rows),
        PredictorDType::Int4 => {
            rows * (hidden.div_ceil(32) * 16 + hidden.div_ceil(PredictorDType::INT4_GROUP as u64) * 2)
        }
    };
    matrices + 4 * rows + numbers
}

/// The ranks to try on a layer of this shape.
pub(crate) fn ladder(hidden: usize, ffn: usize) -> Vec<usize> {
    let most = hidden.min(ffn);
    let mut ranks: Vec<usize> = [1.0 / 32.0, 1.0 / 16.0, 1.0 / 8.0, 1.0 / 4.0, 3.0 / 8.0, 1.0 / 2.0]
        .iter()
        .map(|share| ((hidden as f64 * share / 8.0).round() as usize * 8).clamp(8.min(most), most))
        .collect();
    ranks.dedup();
    ranks
}

/// Whether a raise that takes `growth` more bytes could pay at all where `cost` false positives remain: no raise saves more.
pub(crate) fn can_pay(cost: f64, growth: u64, ffn_bytes: u64) -> bool {
    cost * ffn_bytes as f64 / growth as f64 >= GAIN_MIN
}

/// A predictor for every layer: together they read least for nothing, each byte of theirs at the price of `GAIN_MIN` bytes read,
/// and the sum of their bytes stays within `budget`. `ffn_bytes` are those of one layer's FFN.
pub fn allocate_ranks(curves: &[RankCurve], ffn_bytes: u64, budget: u64) -> Result<Vec<PredictorForm>, TrainError> {
    let smallest_of = |curve: &RankCurve| curve.bytes.iter().copied().min().unwrap_or(0);
    let smallest = curves.iter().map(smallest_of).sum();
    if smallest > budget {
        return Err(TrainError::Budget { budget, smallest });
    }
    // What is spent beyond each layer's smallest, in steps of this many bytes.
    let step = (budget - smallest).div_ceil(STEPS).max(1);
    let most = ((budget - smallest) / step) as usize;
    let steps_of = |curve: &RankCurve, bytes: u64| (bytes - smallest_of(curve)).div_ceil(step) as usize;
    // Least cost of the layers so far when so many steps are spent, and what the last of them took.
    let mut least = vec![0.0; most + 1];
    let mut taken: Vec<Vec<usize>> = Vec::new();
    for curve in curves {
        let options = curve.bytes.iter().zip(&curve.costs).map(|(&bytes, cost)| {
            let price = cost * ffn_bytes as f64 + GAIN_MIN * bytes as f64;
            (steps_of(curve, bytes), price)
        });
        let options: Vec<(usize, f64)> = options.collect();
        let best = |spent: usize| {
            let within = options.iter().enumerate().filter(|(_, (steps, _))| *steps <= spent);
            let costs = within.map(|(at, (steps, price))| (at, least[spent - steps] + price));
            costs.min_by(|a, b| a.1.total_cmp(&b.1)).expect("the smallest takes no step")
        };
        let (at, costs): (Vec<usize>, Vec<f64>) = (0..=most).map(best).unzip();
        taken.push(at);
        least = costs;
    }
    let mut spent = most;
    let mut chosen = Vec::new();
    for (curve, taken) in curves.iter().zip(&taken).rev() {
        let at = taken[spent];
        spent -= steps_of(curve, curve.bytes[at]);
        chosen.push(curve.ranks[at]);
    }
    chosen.reverse();
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(costs: [f64; 3]) -> RankCurve {
        RankCurve {
            ranks: [16, 32, 64].map(PredictorForm::LowRank).to_vec(),
            bytes: vec![16, 32, 64],
            costs: costs.to_vec(),
            admitted: vec![0.3, 0.2, 0.1],
        }
    }

    #[test]
    fn bytes_go_where_they_save_most() {
        let curves = [curve([0.10, 0.05, 0.02]), curve([0.001, 0.001, 0.001]), curve([0.05, 0.049, 0.02])];
        let allocate = |budget| allocate_ranks(&curves, 1000, budget);
        assert_eq!(allocate(1000).unwrap(), [64, 16, 64].map(PredictorForm::LowRank));
        // Not enough for both: the first layer gains more.
        assert_eq!(allocate(48 + 48).unwrap(), [64, 16, 16].map(PredictorForm::LowRank));
        assert_eq!(allocate(48 + 16).unwrap(), [32, 16, 16].map(PredictorForm::LowRank));
        assert!(matches!(allocate(47), Err(TrainError::Budget { budget: 47, smallest: 48 })));
        // A small step first would leave too little for the one that gains more.
        let mut curves = curves.clone();
        (curves[0].ranks[2], curves[0].bytes[2]) = (PredictorForm::PROJECTION, 40);
        (curves[1].bytes[1], curves[1].costs) = (17, vec![0.01, 0.005, 0.005]);
        let chosen = allocate_ranks(&curves, 1000, 72).unwrap();
        assert_eq!(chosen, [PredictorForm::PROJECTION, PredictorForm::LowRank(16), PredictorForm::LowRank(16)]);
    }

    #[test]
    fn what_was_tried_is_known() {
        let admitted = |rank| curve([0.1; 3]).admitted_at(PredictorForm::LowRank(rank));
        assert_eq!((admitted(32), admitted(33)), (Some(0.2), None));
    }

    #[test]
    fn ladders_fit_the_shape() {
        assert_eq!(ladder(256, 1024), [8, 16, 32, 64, 96, 128]);
        assert_eq!(ladder(4096, 16384), [128, 256, 512, 1024, 1536, 2048]);
        assert_eq!(ladder(4, 13), [4]);
    }
}
