//! What a bundle says of how often neurons come again, and what follows for the reads of a token.

use flashlm_formats::bundle::{Bundle, LayerSparsity};

use crate::cache::BenefitCurve;
use crate::ffn::flash::ArenaPlan;
use crate::model::ffn::Records;
use crate::plan::resident_bytes_touched;
use crate::planner::ReadCost;

/// Steps of the curve that stands in where none was measured.
const STEPS: u32 = 32;

/// What each layer gains from cache slots: nanoseconds of reading a token saves.
///
/// From the bundle's reuse curves; where there are none from the activity alone: firing rates are skewed, so the first slots
/// save most, and a layer that wants more groups gains more from each.
pub fn benefit_curves(bundle: &Bundle, cost: &ReadCost) -> Vec<BenefitCurve> {
    let (groups, group_bytes) = (bundle.layout().groups() as u32, bundle.layout().group_bytes() as f64);
    let layer = |layer: usize| {
        let sparsity = bundle.manifest().sparsity.as_ref().and_then(|layers| layers.get(layer));
        match sparsity.map(|sparsity| sparsity.reuse.as_slice()) {
            Some(reuse @ [first, .., last]) if last.slots == groups => {
                let spent = |missed: f32, runs: f32| {
                    cost.request_ns() * f64::from(runs) + cost.byte_ns() * group_bytes * f64::from(missed)
                };
                let nothing = spent(first.missed, first.runs);
                // The last slots save next to nothing, but more than none.
                BenefitCurve::new(reuse.iter().map(|point| {
                    let saved = nothing - spent(point.missed, point.runs);
                    (point.slots, saved.max(0.0) + f64::from(point.slots) / f64::from(groups))
                }))
            }
            _ => {
                let wanted = sparsity.map_or(0.1, |s| f64::from(s.active)).clamp(1e-3, 1.0);
                BenefitCurve::new((1..=STEPS).map(|step| {
                    let share = f64::from(step) / f64::from(STEPS);
                    let saved = wanted * (1.0 - (1.0 - share).powf(1.0 / wanted.sqrt())) + 1e-6 * share;
                    ((f64::from(groups) * share).ceil() as u32, saved)
                }))
            }
        }
    };
    (0..bundle.spec().layers).map(layer).collect()
}

/// What decoding a token will take, as far as the bundle tells.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Expectation {
    /// Bytes read from flash.
    pub bytes_read: f64,
    /// Requests, where no gap is read through.
    pub reads: f64,
    /// Milliseconds that these take.
    pub io_ms: f64,
    /// Bytes of memory touched.
    pub bytes_touched: f64,
}

impl Expectation {
    /// For decoding with this arena and so many tokens of context; `None` where reuse was not measured.
    pub fn new(bundle: &Bundle, arena: &ArenaPlan, cost: &ReadCost, context: usize) -> Option<Self> {
        let sparsity = bundle.manifest().sparsity.as_ref()?;
        let spec = bundle.spec();
        let (layout, vectors) = (bundle.layout(), spec.ffn.vectors() as f64);
        let (mut missed, mut reads, mut rows) = (0.0, 0.0, 0.0);
        for (layer, &slots) in sparsity.iter().zip(&arena.slots) {
            let (groups, runs) = missed_with(layer, slots)?;
            missed += groups;
            reads += runs;
            // Of a neuron that turns out zero the last vector is not touched.
            let neurons = layout.neurons() as f64;
            rows += neurons * (f64::from(layer.predicted?) * (vectors - 1.0) + f64::from(layer.active));
        }
        let bytes_read = missed * layout.group_bytes() as f64;
        let predictors = bundle.predictors().map_or(0, |section| section.extent.bytes);
        Some(Self {
            bytes_read,
            reads,
            io_ms: (cost.request_ns() * reads + cost.byte_ns() * bytes_read) / 1e6,
            bytes_touched: (resident_bytes_touched(bundle, context) + predictors) as f64
                + rows * (layout.row_bytes() + Records::of(bundle).scale_bytes()) as f64,
        })
    }

    /// Milliseconds of a token, at best: reading and computing side by side, the longer one counts.
    pub fn ms_per_token(&self, dram_bytes_per_s: f64) -> f64 {
        self.io_ms.max(self.bytes_touched / dram_bytes_per_s * 1e3)
    }
}

/// Missed groups and runs of them with so many slots: straight between the measured points.
fn missed_with(layer: &LayerSparsity, slots: u32) -> Option<(f64, f64)> {
    let above = layer.reuse.iter().position(|point| point.slots >= slots)?;
    let high = layer.reuse[above];
    let low = layer.reuse[above.saturating_sub(1)];
    let width = f64::from(high.slots - low.slots);
    let share = if width > 0.0 { f64::from(slots.saturating_sub(low.slots)) / width } else { 1.0 };
    let between = |low: f32, high: f32| f64::from(low) + share * f64::from(high - low);
    Some((between(low.missed, high.missed), between(low.runs, high.runs)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use flashlm_formats::bundle::ReusePoint;

    #[test]
    fn curves_are_straight_between_their_points() {
        let point = |slots, missed, runs| ReusePoint { slots, missed, runs };
        let reuse = vec![point(0, 100.0, 60.0), point(10, 50.0, 40.0), point(100, 5.0, 4.0)];
        let layer = LayerSparsity { active: 0.1, predicted: Some(0.2), reuse };
        assert_eq!(missed_with(&layer, 0), Some((100.0, 60.0)));
        assert_eq!(missed_with(&layer, 5), Some((75.0, 50.0)));
        assert_eq!(missed_with(&layer, 55), Some((27.5, 22.0)));
        assert_eq!(missed_with(&layer, 100), Some((5.0, 4.0)));
        assert_eq!(missed_with(&layer, 101), None);
    }
}
