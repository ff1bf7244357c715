//! What a bundle says about how often neurons are reused, and how much the slots of a cache save.

use flashlm_formats::bundle::{Bundle, FlashLayout, LayerSparsity};

use crate::cache::BenefitCurve;
use crate::disk_cost::ReadCost;

/// Steps of the curve that stands in where none was measured.
const STEPS: u32 = 32;

/// What each layer of a bundle gains from cache slots: nanoseconds of reading a token saves.
pub fn benefit_curves(bundle: &Bundle, cost: &ReadCost) -> Vec<BenefitCurve> {
    let sparsity = bundle.manifest().sparsity.as_ref();
    let of = |layer: usize| sparsity.and_then(|layers| layers.get(layer));
    (0..bundle.spec().layers.len()).map(|layer| benefit_curve(of(layer), bundle.layout(), cost)).collect()
}

/// The same of one layer.
///
/// From its reuse curve; where there is none from its activity alone: firing rates are skewed, so the first slots save most, and a
/// layer that wants more groups gains more from each.
pub fn benefit_curve(sparsity: Option<&LayerSparsity>, layout: &FlashLayout, cost: &ReadCost) -> BenefitCurve {
    let (groups, group_bytes) = (layout.groups() as u32, layout.group_bytes() as f64);
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
}
