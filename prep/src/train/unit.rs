//! Inputs in units of their own size, in which a fit's steps mean the same however large the inputs are.
//!
//! Adam's steps are absolute: weights of an input hundreds of times larger than usual would be thrown about. What is trained in these
//! units is folded into the encoder, so that nobody else knows of them.

use ndarray::aview1;

use super::moments::Moments;
use super::predictor::LowRankPredictor;

/// An input's root mean square counts as usual up to so many times the median spread of all inputs.
const USUAL: f32 = 8.0;

/// What each input is measured in: all usual ones in their median spread, as their differences tell, and a larger one in its size.
pub(super) struct Unit(Vec<f32>);

impl Unit {
    pub(super) fn of(moments: &Moments) -> Self {
        let d = moments.mean.len();
        let variance = |i: usize| moments.covariance[i * d + i];
        let mut spreads: Vec<f32> = (0..d).map(|i| variance(i).sqrt()).collect();
        let (_, &mut median, above) = spreads.select_nth_unstable_by(d / 2, f32::total_cmp);
        // Most inputs may never change.
        let usual = std::iter::once(median).chain(above.iter().copied()).find(|spread| *spread > 0.0).unwrap_or(1.0);
        let size = |i: usize| (variance(i) + moments.mean[i] * moments.mean[i]).sqrt();
        Self((0..d).map(size).map(|size| if size > USUAL * usual { size } else { usual }).collect())
    }

    /// Puts inputs, row after row, into these units.
    pub(super) fn apply(&self, inputs: &mut [f32]) {
        for row in inputs.chunks_exact_mut(self.0.len()) {
            row.iter_mut().zip(&self.0).for_each(|(x, size)| *x /= size);
        }
    }

    /// Makes a predictor for inputs as they are one for inputs in these units.
    pub(super) fn convert(&self, predictor: &mut LowRankPredictor) {
        predictor.encoder *= &aview1(&self.0);
    }

    /// And back.
    pub(super) fn convert_back(&self, predictor: &mut LowRankPredictor) {
        predictor.encoder /= &aview1(&self.0);
    }
}
