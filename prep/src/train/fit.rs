//! Fitting: epochs of steps from the best start, of which held-out tokens choose the best.

use flashlm_formats::predictors::{EpochLog, FitLog};
use linfa::dataset::Records;
use linfa::traits::Fit;

use super::activity::{Activity, Inputs, TrainingSet, thin};
use super::curve::{Curve, JUDGED_MISSES};
use super::params::{LowRankPredictorValidParams, TrainError};
use super::predictor::LowRankPredictor;
use super::random::Random;
use super::start::{StartParams, Starts};
use super::steps::Training;

/// Held-out tokens that an epoch is judged by, at most.
const JUDGED_TOKENS: usize = 4096;

impl Fit<Inputs, Activity, TrainError> for LowRankPredictorValidParams {
    type Object = LowRankPredictor;

    /// Fits on the tokens that are not held out, and keeps the epoch that is best on those that are.
    fn fit(&self, set: &TrainingSet) -> Result<LowRankPredictor, TrainError> {
        Ok(self.fit_from(&self.starts(set)?, set)?.0)
    }
}

/// What a dataset's tokens are for.
pub(super) struct Tokens {
    pub(super) train: Vec<u32>,
    pub(super) judged: Vec<u32>,
}

impl LowRankPredictorValidParams {
    /// The starts for every rank, which fits on the same tokens can share.
    pub(crate) fn starts(&self, set: &TrainingSet) -> Result<Starts, TrainError> {
        let tokens = self.tokens(set)?.train;
        StartParams { tokens, projection: self.projection.clone() }.fit(set)
    }

    /// The tokens to train on, and those that epochs are judged by.
    pub(super) fn tokens(&self, set: &TrainingSet) -> Result<Tokens, TrainError> {
        let (tokens, activity) = (set.nsamples(), set.targets());
        if tokens != activity.tokens() {
            return Err(TrainError::Lengths { inputs: tokens, activity: activity.tokens() });
        }
        let (hidden, ffn) = (set.nfeatures(), activity.ffn());
        if self.rank > hidden.min(ffn) {
            return Err(TrainError::Rank { rank: self.rank, hidden, ffn });
        }
        if let Some(projection) = &self.projection
            && (projection.hidden(), projection.bias().len()) != (hidden, ffn)
        {
            let (rows, columns) = (projection.bias().len(), projection.hidden());
            return Err(TrainError::Projection { rows, columns, hidden, ffn });
        }
        let (mut train, held_out) = (activity.part(false), activity.part(true));
        if train.len() < 32 || held_out.len() < 8 {
            return Err(TrainError::TooFewTokens { tokens: train.len(), held_out: held_out.len() });
        }
        thin(&mut train, self.tokens_max);
        let mut judged = held_out;
        thin(&mut judged, JUDGED_TOKENS);
        Ok(Tokens { train, judged })
    }

    /// Fits from the best of the starts, and says how it went.
    pub(crate) fn fit_from(
        &self,
        starts: &Starts,
        set: &TrainingSet,
    ) -> Result<(LowRankPredictor, FitLog), TrainError> {
        let Tokens { mut train, judged } = self.tokens(set)?;
        let start = starts.best(set, self.rank, &judged);
        let mut log =
            FitLog { start: start.kind, start_false_positive_rate: start.cost, epochs: Vec::new(), kept: None };
        let mut model = Training::new(self, set, &train, starts.unit(), &start.predictor);
        let mut random = Random::new(self.seed);
        let mut best: Option<(f64, LowRankPredictor)> = None;
        let mut without_gain = 0;
        for epoch in 0..self.epochs {
            random.shuffle(&mut train);
            for batch in train.chunks(self.batch) {
                model.step(set, batch);
            }
            let predictor = model.predictor();
            if !predictor.is_finite() {
                return Err(TrainError::Diverged { epoch });
            }
            let curve = Curve::measure(&predictor, set, &judged);
            let cost = curve.at_misses(JUDGED_MISSES).false_positive_rate;
            let loss = curve.loss(f64::from(model.active_weight));
            log.epochs.push(EpochLog { loss, false_positive_rate: cost });
            if best.as_ref().is_none_or(|(least, _)| cost < *least) {
                best = Some((cost, predictor));
                log.kept = Some(epoch);
                without_gain = 0;
            } else {
                without_gain += 1;
                if without_gain >= self.patience {
                    break;
                }
            }
        }
        // Patience is with the epochs; whether all of them together were worth it is seen now.
        let mut predictor = match best {
            Some((least, predictor)) if least < start.cost => predictor,
            _ => {
                log.kept = None;
                start.predictor
            }
        };
        predictor.balance_components();
        Ok((predictor, log))
    }
}

#[cfg(test)]
mod tests {
    use linfa::ParamGuard;

    use super::super::tests::{dataset, projection};
    use super::*;

    /// The weights of a layer of rank 6 tell all of it: whatever follows in large steps is worse.
    #[test]
    fn the_start_is_kept_where_every_epoch_is_worse() {
        let set = dataset(2000, |_| 1.0);
        let params = LowRankPredictor::params(6).projection(projection()).learning_rate(1.0).check().unwrap();
        let starts = params.starts(&set).unwrap();
        let (kept, log) = params.fit_from(&starts, &set).unwrap();
        assert_eq!(log.kept, None, "{log:?}");
        assert!(
            log.epochs.iter().all(|epoch| epoch.false_positive_rate > 2.0 * log.start_false_positive_rate),
            "{log:?}"
        );
        let judged = params.tokens(&set).unwrap().judged;
        let cost = Curve::measure(&kept, &set, &judged).at_misses(JUDGED_MISSES).false_positive_rate;
        assert!((cost - log.start_false_positive_rate).abs() < 1e-4, "{cost}: {log:?}");
    }

    /// All inputs, or one of them, hundreds of times larger.
    #[test]
    fn the_size_of_inputs_spoils_no_fit() {
        let cost = |size: fn(usize) -> f32| {
            let set = dataset(2000, size);
            let params = LowRankPredictor::params(8).epochs(20).patience(20).batch(32).check().unwrap();
            let (_, log) = params.fit_from(&params.starts(&set).unwrap(), &set).unwrap();
            log.epochs.iter().map(|epoch| epoch.false_positive_rate).fold(1.0, f64::min)
        };
        let usual = cost(|_| 1.0);
        for (name, size) in [
            ("all larger", (|_| 500.0) as fn(usize) -> f32),
            ("all smaller", |_| 1.0 / 64.0),
            ("one larger", |i| if i == 3 { 500.0 } else { 1.0 }),
        ] {
            let other = cost(size);
            assert!(other < 1.3 * usual + 0.005, "{name}: {other}, {usual} of the usual inputs");
        }
    }
}
