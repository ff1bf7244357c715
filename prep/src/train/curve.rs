//! What each threshold costs and keeps.

use flashlm_formats::predictors::OperatingPoint;

use super::activity::TrainingSet;
use super::scores::NeuronScores;

/// Epochs, starts and forms are compared by their false positives where this share of the active pairs is missed.
pub(super) const JUDGED_MISSES: f64 = 0.03;
/// Logits are counted in this many steps from `-RANGE` to `RANGE`; those beyond fall into the first and last.
const STEPS: usize = 8192;
const RANGE: f32 = 32.0;

/// Counts of a predictor's logits on some tokens: of active and inactive pairs, and the active pairs' energy.
#[derive(Clone, Debug)]
pub struct Curve {
    active: Vec<u64>,
    inactive: Vec<u64>,
    energy: Vec<f64>,
    /// Pairs of neurons that can never be predicted, as they have no row: at any threshold a miss, or rightly left out.
    never: Never,
    tokens: usize,
    ffn: usize,
}

#[derive(Clone, Copy, Debug, Default)]
struct Never {
    active: u64,
    inactive: u64,
    energy: f64,
}

impl Curve {
    /// Runs the predictor over `tokens` of a dataset and counts.
    pub fn measure(predictor: &dyn NeuronScores, set: &TrainingSet, tokens: &[u32]) -> Self {
        let ffn = predictor.neurons();
        let mut curve = Curve {
            active: vec![0; STEPS],
            inactive: vec![0; STEPS],
            energy: vec![0.0; STEPS],
            never: Never::default(),
            tokens: tokens.len(),
            ffn,
        };
        predictor.scores(set.records(), tokens, &mut |block, logits| {
            for (row, &token) in logits.chunks_exact(ffn).zip(block) {
                for &z in row {
                    match z {
                        f32::NEG_INFINITY => curve.never.inactive += 1,
                        z => curve.inactive[step_of(z)] += 1,
                    }
                }
                let (neurons, energies) = set.targets().of(token as usize);
                for (&n, &energy) in neurons.iter().zip(energies) {
                    let z = row[n as usize];
                    if z == f32::NEG_INFINITY {
                        curve.never.inactive -= 1;
                        curve.never.active += 1;
                        curve.never.energy += energy as f64;
                        continue;
                    }
                    let step = step_of(z);
                    curve.inactive[step] -= 1;
                    curve.active[step] += 1;
                    curve.energy[step] += energy as f64;
                }
            }
        });
        curve
    }

    /// The point at the highest threshold that misses at most this share of the active pairs; where those without a row are more
    /// than that already, this share of the others.
    pub fn at_misses(&self, share: f64) -> OperatingPoint {
        let active = self.active.iter().sum::<u64>();
        let allowed = |of: u64| (share * of as f64).floor() as u64;
        let allowed = allowed(active + self.never.active).checked_sub(self.never.active).unwrap_or(allowed(active));
        let (mut missed, mut step) = (0, 0);
        while step < STEPS && missed + self.active[step] <= allowed {
            missed += self.active[step];
            step += 1;
        }
        self.at(step)
    }

    /// The point at the highest threshold that predicts at least this many times as many pairs as are active.
    pub fn at_over_fetch(&self, times: f64) -> OperatingPoint {
        let wanted = (times * self.active.iter().sum::<u64>() as f64).ceil() as u64;
        let (mut predicted, mut step) = (0, STEPS);
        while step > 0 && predicted < wanted {
            step -= 1;
            predicted += self.active[step] + self.inactive[step];
        }
        self.at(step)
    }

    /// The point where another false alarm no longer pays: as the threshold falls, the last step (smoothed over a few)
    /// in which each predicted neuron brought at least `worth` times the mean energy of an active one.
    pub fn at_worth(&self, worth: f64) -> OperatingPoint {
        const WINDOW: usize = 64;
        let mean = self.energy.iter().sum::<f64>() / (self.active.iter().sum::<u64>() as f64).max(1.0);
        let mut step = STEPS;
        if mean == 0.0 {
            // Nothing is active: nothing is worth a read.
            return self.at(STEPS);
        }
        while step >= WINDOW {
            let range = step - WINDOW..step;
            let gain: f64 = self.energy[range.clone()].iter().sum();
            let read: u64 = range.clone().map(|i| self.active[i] + self.inactive[i]).sum();
            // Steps in which nothing lies say nothing.
            if read > 0 && gain < worth * mean * read as f64 {
                break;
            }
            step -= WINDOW / 4;
        }
        self.at(step.min(STEPS - 1))
    }

    /// The point at a threshold on the logit.
    pub fn at_threshold(&self, threshold: f32) -> OperatingPoint {
        let steps = ((threshold + RANGE) / (2.0 * RANGE) * STEPS as f32).round();
        self.at((steps.max(0.0) as usize).min(STEPS))
    }

    /// Mean of the logistic loss over all pairs, with logits as fine as they are counted; an active pair weighs `active_weight`.
    pub(super) fn loss(&self, active_weight: f64) -> f64 {
        let softplus = |z: f64| z.max(0.0) + (-z.abs()).exp().ln_1p();
        let of_step = |(step, (&active, &inactive)): (usize, (&u64, &u64))| {
            let z = ((step as f64 + 0.5) / STEPS as f64 * 2.0 - 1.0) * f64::from(RANGE);
            active_weight * active as f64 * softplus(-z) + inactive as f64 * softplus(z)
        };
        let sum: f64 = self.active.iter().zip(&self.inactive).enumerate().map(of_step).sum();
        sum / (self.tokens as f64 * self.ffn as f64)
    }

    fn at(&self, step: usize) -> OperatingPoint {
        let sum = |counts: &[u64]| counts.iter().sum::<u64>();
        let missed = sum(&self.active[..step]) + self.never.active;
        let hits = sum(&self.active[step..]);
        let alarms = sum(&self.inactive[step..]);
        let quiet = sum(&self.inactive[..step]) + self.never.inactive;
        let energy: f64 = self.energy.iter().sum::<f64>() + self.never.energy;
        let kept: f64 = self.energy[step..].iter().sum();
        let share = |part: f64, whole: f64, empty: f64| if whole > 0.0 { part / whole } else { empty };
        let pairs = self.tokens as f64 * self.ffn as f64;
        OperatingPoint {
            threshold: step as f32 / STEPS as f32 * 2.0 * RANGE - RANGE,
            false_negative_rate: share(missed as f64, (missed + hits) as f64, 0.0),
            false_positive_rate: share(alarms as f64, (alarms + quiet) as f64, 0.0),
            predicted_fraction: share((hits + alarms) as f64, pairs, 0.0),
            active_fraction: share((hits + missed) as f64, pairs, 0.0),
            over_fetch: share((hits + alarms) as f64, (hits + missed) as f64, 0.0),
            energy_recall: share(kept, energy, 1.0),
            precision: share(hits as f64, (hits + alarms) as f64, 1.0),
        }
    }
}

fn step_of(z: f32) -> usize {
    (((z + RANGE) * (STEPS as f32 / (2.0 * RANGE))) as usize).min(STEPS - 1)
}

#[cfg(test)]
mod tests {
    use linfa::metrics::ToConfusionMatrix;

    use super::*;

    fn curve() -> Curve {
        let mut curve = Curve {
            active: vec![0; STEPS],
            inactive: vec![0; STEPS],
            energy: vec![0.0; STEPS],
            never: Never::default(),
            tokens: 10,
            ffn: 20,
        };
        // Logits -1: 5 active of energy 1 each; 1: 15 active of energy 3 each, 20 inactive; -3: 160 inactive.
        for (z, active, inactive, energy) in [(-1.0, 5, 0, 5.0), (1.0, 15, 20, 45.0), (-3.0, 0, 160, 0.0)] {
            let step = step_of(z);
            curve.active[step] = active;
            curve.inactive[step] = inactive;
            curve.energy[step] = energy;
        }
        curve
    }

    #[test]
    fn rates_follow_their_definitions() {
        let point = curve().at_threshold(0.0);
        assert_eq!(point.false_negative_rate, 0.25);
        assert_eq!(point.false_positive_rate, 20.0 / 180.0);
        assert_eq!(point.predicted_fraction, 35.0 / 200.0);
        assert_eq!(point.active_fraction, 0.1);
        assert_eq!(point.over_fetch, 1.75);
        assert_eq!(curve().at_over_fetch(1.75).over_fetch, 1.75);
        assert_eq!(curve().at_over_fetch(1.8).over_fetch, 2.0);
        assert_eq!(curve().at_over_fetch(100.0).predicted_fraction, 1.0);
        assert_eq!(point.energy_recall, 0.9);
        assert_eq!(point.precision, 15.0 / 35.0);
        // linfa counts samples one by one, which is too slow for every (token, neuron) pair: it judges our counts here.
        let pairs = [(true, true, 15), (false, true, 5), (true, false, 20), (false, false, 160)];
        let side = |which: fn(&(bool, bool, usize)) -> bool| {
            ndarray::Array1::from_iter(pairs.iter().flat_map(|p| std::iter::repeat_n(which(p), p.2)))
        };
        // linfa's matrix has the argument's classes in its columns, and takes those for what was predicted.
        let matrix = side(|p| p.1).confusion_matrix(&side(|p| p.0)).unwrap();
        assert!((matrix.precision() as f64 - point.precision).abs() < 1e-6, "{matrix:?}");
        assert!((matrix.recall() as f64 - (1.0 - point.false_negative_rate)).abs() < 1e-6, "{matrix:?}");
    }

    #[test]
    fn the_loss_is_logistic() {
        let softplus = |z: f64| z.exp().ln_1p();
        let pairs =
            5.0 * 2.0 * softplus(1.0) + 15.0 * 2.0 * softplus(-1.0) + 20.0 * softplus(1.0) + 160.0 * softplus(-3.0);
        assert!((curve().loss(2.0) - pairs / 200.0).abs() < 0.01);
    }

    #[test]
    fn what_has_no_row_is_missed_at_any_threshold() {
        let mut curve = curve();
        curve.never = Never { active: 5, inactive: 40, energy: 10.0 };
        let point = curve.at_misses(0.0);
        assert_eq!((point.false_negative_rate, point.false_positive_rate), (5.0 / 25.0, 20.0 / 220.0));
        // Five of the ten that may be missed have no row.
        assert_eq!(curve.at_misses(0.4).false_negative_rate, 0.4);
        assert_eq!(curve.at_misses(0.39).false_negative_rate, 0.2);
        // No threshold finds more than have rows: then it is chosen among those.
        assert_eq!(curve.at_misses(0.1).false_negative_rate, 0.2);
        assert_eq!((point.energy_recall, curve.at_misses(1.0).predicted_fraction), (50.0 / 60.0, 0.0));
        // No threshold predicts them.
        assert_eq!(curve.at_over_fetch(100.0).false_negative_rate, 5.0 / 25.0);
        let mut idle = curve.clone();
        (idle.active, idle.energy) = (vec![0; STEPS], vec![0.0; STEPS]);
        assert_eq!(idle.at_worth(0.05).predicted_fraction, 0.0);
        assert_eq!(idle.at_misses(0.03).predicted_fraction, 0.0);
    }

    #[test]
    fn misses_stay_within_what_is_allowed() {
        assert_eq!(curve().at_misses(0.25).false_negative_rate, 0.25);
        assert_eq!(curve().at_misses(0.24).false_negative_rate, 0.0);
        assert_eq!(curve().at_misses(1.0).predicted_fraction, 0.0);
        // Nothing is given away: the threshold is right under the next active pair.
        assert_eq!(curve().at_misses(0.0).false_positive_rate, 20.0 / 180.0);
    }

    #[test]
    fn worth_stops_where_alarms_bring_nothing() {
        // At logit 1 each neuron read brings 45 / 35, at -1 5 / 5, at -3 nothing; an active one has 2.5 on average.
        let all = curve().at_worth(0.1);
        assert_eq!((all.false_negative_rate, all.false_positive_rate), (0.0, 20.0 / 180.0));
        assert_eq!(curve().at_worth(0.45).false_negative_rate, 0.25);
    }
}
