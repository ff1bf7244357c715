//! How much memory the neurons get, and how it is divided over the layers.

use std::ops::Range;

use flashlm_formats::bundle::Bundle;

use crate::cache::{BenefitCurve, SlotId, divide_slots};
use crate::disk_cost::ReadCost;
use crate::reuse::benefit_curves;

/// Fewest transient places of an area: below it reads come in dribs and drabs.
const TRANSIENT_MIN: u32 = 32;
/// An area has one place for this many groups of a layer: about what one token misses.
const GROUPS_PER_TRANSIENT: usize = 16;

flashlm_formats::id! {
    /// A slot of the arena, of whichever layer's cache, or a transient place.
    pub(super) ArenaSlot
}

impl ArenaSlot {
    /// Where the slot of a cache is whose first one this is.
    pub(super) fn of_cache(self, slot: SlotId) -> Self {
        self.after(slot.0)
    }

    /// The slots of the reader that make this one, where `parts` do.
    pub(super) fn parts(self, parts: u32) -> Range<u32> {
        self.0 * parts..(self.0 + 1) * parts
    }
}

/// How the arena is divided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArenaPlan {
    /// Cache slots of each layer.
    pub slots: Vec<u32>,
    /// Transient places of each of the two areas, at least 2.
    pub transient: u32,
}

impl ArenaPlan {
    /// Slots and places in all.
    pub fn total(&self) -> usize {
        self.slots.iter().map(|s| *s as usize).sum::<usize>() + 2 * self.transient as usize
    }

    /// The largest arena that `fits`, or the smallest there is, divided by what slots save on a disk of this cost.
    pub fn within(bundle: &Bundle, cost: &ReadCost, fits: impl Fn(&ArenaPlan) -> bool) -> Self {
        let (layers, groups) = (bundle.spec().layers.len(), bundle.layout().groups());
        let curves = benefit_curves(bundle, cost);
        let (mut low, mut high) = (0, (layers * groups) as u64);
        while low < high {
            let middle = low + (high - low).div_ceil(2);
            if fits(&Self::with_slots(&curves, groups, middle)) { low = middle } else { high = middle - 1 }
        }
        Self::with_slots(&curves, groups, low)
    }

    /// An arena of this many slots, and its transient places.
    fn with_slots(curves: &[BenefitCurve], groups: usize, slots: u64) -> Self {
        let transient = ((groups / GROUPS_PER_TRANSIENT) as u32).max(TRANSIENT_MIN).min(groups as u32).max(2);
        Self { slots: divide_slots(curves, slots), transient }
    }
}
