//! What decoding a token will cost, from what the bundle says about how often neurons are reused.

use flashlm_formats::bundle::{Bundle, FlashLayout, LayerSparsity};

use super::planned::Planned;
use super::resident_bytes_touched;
use crate::disk_cost::ReadCost;
use crate::neurons::records::Records;
use crate::options::FfnChoice;

/// What a layer adds at worst to the time of a token, beyond reading and touching memory one after the other: a read waited for
/// alone, and threads called together a dozen times. Measured: docs/measurements/plan.md.
const LAYER_MS: f64 = 0.15;

/// What decoding a token will cost, as far as the bundle tells.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Expectation {
    /// Bytes read from flash, those of gaps that are read through included.
    pub bytes_read: f64,
    /// Requests, where gaps are read through.
    pub reads: f64,
    /// Milliseconds that these take.
    pub io_ms: f64,
    /// Milliseconds that reads take if no gap turns out short enough to be read through.
    pub io_most_ms: f64,
    /// Bytes of memory touched.
    pub bytes_touched: f64,
    layers: usize,
}

/// What decoding does with memory and flash, as far as that decides what a token costs.
#[derive(Clone, Copy, Debug)]
pub struct Decoding<'a> {
    /// How neurons lie on flash.
    pub layout: &'a FlashLayout,
    /// Vectors of a neuron, and the bytes of each in memory.
    pub vectors: usize,
    /// Bytes of a vector in memory, its scales included.
    pub vector_bytes: usize,
    /// What reads cost.
    pub cost: &'a ReadCost,
    /// Whether predictors choose what is computed.
    pub is_predicted: bool,
    /// Bytes of the head that are read for every token.
    pub head_left_out: u64,
    /// Bytes of memory touched besides neurons: attention, head, keys and values, predictors.
    pub resident_touched: u64,
}

/// Where a layer's neurons are.
#[derive(Clone, Copy, Debug)]
pub enum Held {
    /// All in memory.
    Whole,
    /// So many groups in a cache.
    Slots(u32),
    /// Read for every token.
    Not,
}

impl Expectation {
    /// For decoding as planned with this context; `None` where the bundle does not tell what is predicted or reused.
    pub fn new(bundle: &Bundle, planned: &Planned, context: usize) -> Option<Self> {
        let sparsity = bundle.manifest().sparsity.as_ref()?;
        let held = |layer: usize| match (&planned.arena, planned.choice) {
            (Some(arena), _) => Held::Slots(arena.slots[layer]),
            (None, FfnChoice::Resident) => Held::Whole,
            _ if layer < planned.pinned => Held::Whole,
            _ => Held::Not,
        };
        let predictors = bundle.predictors().filter(|_| planned.predicted).map_or(0, |section| section.extent.bytes);
        let decoding = Decoding {
            layout: bundle.layout(),
            vectors: bundle.spec().ffn().vectors(),
            vector_bytes: bundle.layout().row_bytes() + Records::of(bundle).scale_bytes(),
            cost: &planned.cost.0,
            is_predicted: planned.predicted,
            // Of the embedding one row is read, which is nothing beside it.
            head_left_out: planned.tables.head_left_out(bundle),
            resident_touched: resident_bytes_touched(bundle, context, planned.kv) + predictors,
        };
        Self::of(&decoding, sparsity.iter().enumerate().map(|(at, layer)| (layer, held(at))))
    }

    /// For layers that are active and held so; `None` where it is not known what is predicted or reused.
    pub fn of<'a>(
        decoding: &Decoding<'_>,
        layers: impl IntoIterator<Item = (&'a LayerSparsity, Held)>,
    ) -> Option<Self> {
        let Decoding { layout, vectors, vector_bytes, cost, is_predicted, head_left_out, resident_touched } = *decoding;
        let (group_bytes, layer_bytes) = (layout.group_bytes() as f64, layout.layer_bytes() as f64);
        let (mut rows, mut count) = (0.0, 0);
        let (mut least, mut most) = (Reads::default(), Reads::default());
        for (layer, held) in layers {
            match held {
                Held::Whole => {}
                Held::Slots(slots) => {
                    let (missed, runs) = missed_with(layer, slots)?;
                    least.add(through_gaps(missed, runs, layout.groups() as f64, group_bytes, cost));
                    most.add(Reads { count: runs, bytes: missed * group_bytes });
                }
                Held::Not => {
                    let reads = Reads { count: (layer_bytes / STREAMED_BYTES).ceil(), bytes: layer_bytes };
                    least.add(reads);
                    most.add(reads);
                }
            }
            // Of a neuron that turns out zero the last vector is not touched.
            let chosen = if is_predicted { f64::from(layer.predicted?) } else { 1.0 };
            rows += layout.neurons() as f64 * (chosen * (vectors as f64 - 1.0) + f64::from(layer.active));
            count += 1;
        }
        let left_out = head_left_out as f64;
        let head = Reads { count: (left_out / STREAMED_BYTES).ceil(), bytes: left_out };
        least.add(head);
        most.add(head);
        Some(Self {
            bytes_read: least.bytes,
            reads: least.count,
            io_ms: least.ms(cost).min(most.ms(cost)),
            io_most_ms: most.ms(cost).max(least.ms(cost)),
            bytes_touched: resident_touched as f64 + rows * vector_bytes as f64,
            layers: count,
        })
    }

    /// Whether anything is read while decoding.
    pub fn is_reading(&self) -> bool {
        self.reads > 0.0
    }

    /// Milliseconds of a token: the least, with reading and computing side by side, and the most, one after the other.
    pub fn ms_per_token(&self, dram_bytes_per_s: f64) -> (f64, f64) {
        let touching = self.bytes_touched / dram_bytes_per_s * 1e3;
        (self.io_ms.max(touching), self.io_most_ms + touching + LAYER_MS * self.layers as f64)
    }
}

/// What is read at a time where everything is.
const STREAMED_BYTES: f64 = (256 << 10) as f64;

/// Requests and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Reads {
    count: f64,
    bytes: f64,
}

impl Reads {
    fn add(&mut self, more: Self) {
        self.count += more.count;
        self.bytes += more.bytes;
    }

    fn ms(&self, cost: &ReadCost) -> f64 {
        (cost.request_ns() * self.count + cost.byte_ns() * self.bytes) / 1e6
    }
}

/// The reads for this many missed groups of a layer, in this many runs, where gaps that are worth it are read through. Gaps are taken to
/// be as long as those between runs scattered by chance; a good storage order has more short ones, and costs less.
fn through_gaps(missed: f64, runs: f64, groups: f64, group_bytes: f64, cost: &ReadCost) -> Reads {
    let gap_max = (cost.gap_bytes_max() as f64 / group_bytes).floor();
    let free = (groups - missed).max(0.0);
    if runs <= 1.0 || gap_max < 1.0 || free <= 0.0 {
        return Reads { count: runs, bytes: missed * group_bytes };
    }
    // Lengths of gaps are geometric: a gap ends at the next group with this chance.
    let ends = ((runs + 1.0) / free).min(1.0);
    let longer = (1.0 - ends).powf(gap_max);
    let length_of_short = (1.0 - longer * (1.0 + gap_max * ends)) / ends;
    let gaps = runs - 1.0;
    Reads { count: 1.0 + gaps * longer, bytes: (missed + gaps * length_of_short) * group_bytes }
}

/// Missed groups and runs of them with this many slots: straight between the measured points.
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
    use crate::planner::{PlanLimits, Planner};
    use flashlm_formats::bundle::ReusePoint;
    use flashlm_formats::ids::GroupId;

    #[test]
    fn curves_are_straight_between_their_points() {
        let point = |slots, missed, runs| ReusePoint { slots, missed, runs };
        let reuse = vec![point(0, 100.0, 60.0), point(10, 50.0, 40.0), point(100, 5.0, 4.0)];
        let layer = LayerSparsity { active: 0.1, predicted: Some(0.2), missed: None, half_life: None, reuse };
        assert_eq!(missed_with(&layer, 0), Some((100.0, 60.0)));
        assert_eq!(missed_with(&layer, 5), Some((75.0, 50.0)));
        assert_eq!(missed_with(&layer, 55), Some((27.5, 22.0)));
        assert_eq!(missed_with(&layer, 100), Some((5.0, 4.0)));
        assert_eq!(missed_with(&layer, 101), None);
    }

    /// Against the planner itself, over groups that are missing by chance.
    #[test]
    fn gaps_are_counted_about_as_they_are_read() {
        let cost = ReadCost::new(14_500.0, 0.445).unwrap();
        let (groups, group_bytes) = (4096u32, 4096u64);
        let mut planner = Planner::new(PlanLimits::for_cost(&cost, group_bytes, u64::MAX), groups);
        for step in [3, 7, 20, 60, 200] {
            let mut state = 1u64;
            let missing: Vec<GroupId> = (0..groups)
                .filter(|_| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    (state >> 33).is_multiple_of(step)
                })
                .map(GroupId)
                .collect();
            let mut requests = Vec::new();
            planner.plan(&missing, &mut requests);
            let read: u32 = requests.iter().map(|request| request.groups).sum();
            let runs = 1 + missing.windows(2).filter(|pair| pair[1] != pair[0].after(1)).count();
            let said = through_gaps(missing.len() as f64, runs as f64, groups.into(), group_bytes as f64, &cost);
            let near = |said: f64, found: f64| (said / found - 1.0).abs() < 0.2;
            assert!(
                near(said.count, requests.len() as f64) && near(said.bytes, f64::from(read) * group_bytes as f64),
                "one of {step}: {said:?} for {} requests of {read} groups",
                requests.len()
            );
        }
    }
}
