//! How fast a token would come in how much memory.

use flashlm::cache::divide_slots;
use flashlm::disk_cost::ReadCost;
use flashlm::plan::{Decoding, Expectation, Held};
use flashlm::reuse::benefit_curve;
use flashlm_formats::bundle::{FlashLayout, LayerSparsity, ReusePoint};
use flashlm_formats::model::{DType, ModelSpec};

use crate::expected_run::PREDICTOR_SHARE;

/// Neurons that predictors admit for one that fires: at best, and where they have a hard time. Assumed; what came of it:
/// docs/measurements/assess.md.
pub const ADMITTED: (f64, f64) = (1.1, 2.0);

/// Tokens of context that are counted, where the model has as many.
pub const CONTEXT: usize = 2048;
/// What a process takes besides weights and keys and values.
const PROCESS_BYTES: u64 = 12 << 20;
/// Sizes that are tried between the least memory and all of it.
const STEPS: u64 = 24;
/// A token that comes faster by less than this is no gain.
const GAIN: f64 = 1.03;
/// The share of a layer in the smallest cache worth having.
const CACHE_LEAST: f64 = 0.05;

/// What the speed of a machine comes down to here.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// Bytes of memory that all threads together read in a second.
    pub dram_bytes_per_s: f64,
    /// What reads cost.
    pub cost: ReadCost,
}

/// Tokens a second in so much memory.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Speed {
    /// Bytes of memory for the whole process.
    pub memory_bytes: u64,
    /// Share of the neurons that this holds.
    pub cached: f64,
    /// At least, and at most.
    pub tokens_per_s: (f64, f64),
    /// Whether more memory makes it no faster.
    pub is_enough: bool,
}

/// Speeds from the least memory that makes sense to the most that changes anything, about `count` of them. `measured` are the first
/// layers; the others are taken to be like the last of them.
pub fn speeds(
    spec: &ModelSpec,
    layout: &FlashLayout,
    measured: &[LayerSparsity],
    machine: &Machine,
    count: usize,
) -> Vec<Speed> {
    let model = Model::new(spec, layout, measured);
    let (least, all) = (model.memory(CACHE_LEAST), model.memory(1.0));
    let at = |step: u64| least + (all - least) * step / STEPS;
    let steps: Vec<Speed> = (0..=STEPS).map(|step| model.speed(at(step), machine)).collect();
    let best = steps.last().map_or(0.0, |speed| speed.tokens_per_s.1);
    let enough = steps.iter().position(|speed| speed.tokens_per_s.1 * GAIN >= best).unwrap_or(steps.len() - 1);
    let last = count.saturating_sub(1).max(1);
    let mut shown: Vec<usize> = (0..=last).map(|at| enough * at / last).collect();
    shown.dedup();
    shown.into_iter().map(|step| Speed { is_enough: step == enough, ..steps[step] }).collect()
}

/// A model's bytes, and what its layers do.
struct Model<'a> {
    layout: &'a FlashLayout,
    vectors: usize,
    layers: [Vec<LayerSparsity>; 2],
    fixed_bytes: u64,
    neuron_bytes: u64,
    resident_touched: u64,
}

impl<'a> Model<'a> {
    fn new(spec: &ModelSpec, layout: &'a FlashLayout, measured: &[LayerSparsity]) -> Self {
        let count = spec.layers.len();
        let tensors = spec.resident_tensors();
        // As wide as those of the neurons, which are not quantised here.
        let weight_bytes = layout.row_bytes() / spec.hidden_size;
        let bytes = |shape: &[usize]| (shape.iter().product::<usize>() * weight_bytes) as u64;
        let resident: u64 = tensors.iter().map(|tensor| bytes(&tensor.shape)).sum();
        // Of an embedding that is not the head, a token touches a row.
        let rows = tensors.iter().find(|tensor| tensor.name == "embed.tokens" && !spec.tied_head);
        let untouched = rows.map_or(0, |tensor| bytes(&tensor.shape));
        let attention = spec.attention();
        let context = CONTEXT.min(spec.max_positions);
        let kv = (2 * attention.kv_heads * attention.head_dim * count * context * DType::F16.bytes()) as u64;
        let neuron_bytes = (layout.groups() * layout.group_bytes() * count) as u64;
        let predictors = (PREDICTOR_SHARE * neuron_bytes as f64) as u64;
        let layers = [ADMITTED.0, ADMITTED.1].map(|admitted| {
            let like = |at: usize| measured.get(at).or(measured.last()).cloned();
            (0..count).filter_map(like).map(|layer| admitting(layer, admitted, layout)).collect()
        });
        Self {
            layout,
            vectors: spec.ffn().vectors(),
            layers,
            fixed_bytes: resident + kv + predictors + PROCESS_BYTES,
            neuron_bytes,
            resident_touched: resident - untouched + predictors,
        }
    }

    /// Bytes with this share of the neurons in memory.
    fn memory(&self, cached: f64) -> u64 {
        self.fixed_bytes + (cached * self.neuron_bytes as f64) as u64
    }

    fn speed(&self, memory_bytes: u64, machine: &Machine) -> Speed {
        let cached = memory_bytes.saturating_sub(self.fixed_bytes) as f64 / self.neuron_bytes.max(1) as f64;
        let slots = (cached.min(1.0) * (self.layout.groups() * self.layers[0].len()) as f64) as u64;
        let decoding = Decoding {
            layout: self.layout,
            vectors: self.vectors,
            vector_bytes: self.layout.row_bytes(),
            cost: &machine.cost,
            is_predicted: true,
            head_left_out: 0,
            resident_touched: self.resident_touched,
        };
        let [few, many] = &self.layers;
        let ms = |layers: &[LayerSparsity]| {
            // Divided as a run divides them.
            let curves: Vec<_> =
                layers.iter().map(|layer| benefit_curve(Some(layer), self.layout, &machine.cost)).collect();
            let shares = divide_slots(&curves, slots);
            let held = layers.iter().zip(shares).map(|(layer, slots)| (layer, Held::Slots(slots)));
            Expectation::of(&decoding, held).map_or((0.0, 0.0), |e| e.ms_per_token(machine.dram_bytes_per_s))
        };
        let per_s = |ms: f64| 1e3 / ms.max(1e-6);
        Speed { memory_bytes, cached, tokens_per_s: (per_s(ms(many).1), per_s(ms(few).0)), is_enough: false }
    }
}

/// The layer with predictors that admit so many neurons for one that fires.
fn admitting(layer: LayerSparsity, admitted: f64, layout: &FlashLayout) -> LayerSparsity {
    let more = |count: f32, of: f64| (f64::from(count) * admitted).min(of) as f32;
    let left = |point: &ReusePoint| layout.groups() as f64 - f64::from(point.slots);
    let reuse = layer.reuse.iter().map(|point| ReusePoint {
        slots: point.slots,
        missed: more(point.missed, left(point)),
        runs: more(point.runs, left(point)),
    });
    LayerSparsity { predicted: Some(more(layer.active, 1.0)), reuse: reuse.collect(), ..layer }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::expected_run::opt_6_7b;

    #[test]
    fn memory_beyond_what_is_needed_is_not_asked_for() {
        use flashlm_formats::bundle::LayoutOptions;
        use flashlm_formats::weight_format::WeightFormat;
        let spec = opt_6_7b();
        let layout = FlashLayout::new(&spec, WeightFormat::Plain(DType::F16), LayoutOptions::default()).unwrap();
        // 4 % fire, and caches of a quarter have nine of ten.
        let point = |slots, missed| ReusePoint { slots, missed, runs: missed * 0.9 };
        let reuse = vec![point(0, 655.0), point(1638, 260.0), point(4096, 65.0), point(8192, 10.0), point(16_384, 0.0)];
        let layer = LayerSparsity { active: 0.04, predicted: Some(0.04), missed: None, half_life: None, reuse };
        let machine = Machine { dram_bytes_per_s: 4e10, cost: ReadCost::new(14_500.0, 0.445).unwrap() };
        let speeds = speeds(&spec, &layout, &[layer], &machine, 4);
        assert_eq!(speeds.len(), 4);
        assert!(speeds.is_sorted_by(|a, b| a.memory_bytes < b.memory_bytes && a.tokens_per_s.1 <= b.tokens_per_s.1));
        assert!(speeds.iter().all(|speed| speed.tokens_per_s.0 < speed.tokens_per_s.1));
        let (first, last) = (speeds[0], speeds[3]);
        // Attention and embeddings alone are 4.7 GB, everything is 13.3.
        assert!((5_000_000_000..7_500_000_000).contains(&first.memory_bytes), "{first:?}");
        assert!(last.is_enough && last.memory_bytes < 12_000_000_000 && last.cached < 0.6, "{last:?}");
        // 4.7 GB at 40 GB/s take 117 ms, and that is not all.
        assert!((4.0..8.5).contains(&last.tokens_per_s.1), "{last:?}");
    }
}
