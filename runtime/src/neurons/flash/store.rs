//! Which groups are in memory, and fetching those that are not.
//!
//! One arena holds the slots of every layer's neuron cache and, after them, two areas of transient places: a layer uses the
//! area of its parity, so that what is read ahead for the next layer never meets what this layer computes with. The store
//! decides nothing about neurons and computes nothing: it is asked for groups.

use std::sync::Arc;
use std::time::Instant;

use flashlm_formats::bundle::{Bundle, FlashLayout};
use flashlm_formats::ids::GroupId;
use flashlm_io::{Completion, DirectFile, Engines, ReadBatch, ReadEngine, SlotState, Slots};

use super::FlashOptions;
use super::arena::{ArenaPlan, ArenaSlot};
use crate::cache::{LayerCache, Placement, PolicyKind, Prefetch};
use crate::disk_cost::{ObservedCost, ReadCost};
use crate::error::Result;
use crate::neurons::place::LayerPlaces;
use crate::planner::{PlanLimits, Planner, ReadPlan, ReadRequest};

pub(super) const NO_SLOT: ArenaSlot = ArenaSlot(u32::MAX);
const NO_GROUP: GroupId = GroupId(u32::MAX);
/// The largest request: beyond it a disk gives no more bandwidth, and its bytes come late.
const REQUEST_BYTES_MAX: u64 = 512 << 10;
/// A wait of this length was for the disk, and not for what had arrived before.
const BLOCKED_NS_MIN: u64 = 20_000;
/// One plan of so many reads through no gap, to learn what that costs.
const PLANS_OF_ONE_APART: u64 = 16;

/// A group that is wanted, and the slot its bytes are in or will be in.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) group: GroupId,
    /// `NO_SLOT` while there is no place for it.
    pub(super) slot: ArenaSlot,
}

struct Layer {
    offset: u64,
    cache: LayerCache,
    first_slot: ArenaSlot,
    ahead: AheadRecord,
}

/// What reading ahead for a layer was worth lately.
#[derive(Default)]
struct AheadRecord {
    /// Groups read ahead for the token to come.
    groups: u64,
    /// Share of the groups read for the layer that were prefetched and not needed, fading.
    unused: f32,
    /// Scores above it are read ahead for.
    margin: f32,
}

/// The share of what is read for a layer that may be prefetched without use: above it the margin rises, below it falls.
const UNUSED_AIM: f32 = 0.12;
/// How far the margin moves with a token, in units of a predictor's logit.
const MARGIN_STEP: f32 = 0.1;
const MARGIN_MAX: f32 = 16.0;
/// Weight of the newest token in the fading share.
const NEWEST: f32 = 0.1;

/// What is kept of a slot: its state, fill and claim, what it holds, and whether that was checked.
const BYTES_OF_SLOT: u64 = 11;
/// What is kept of a group of the layer at work: what is missing, read and planned.
const BYTES_OF_GROUP: u64 = 128;

/// Transient places of the layers of one parity.
struct Area {
    free: Vec<ArenaSlot>,
    /// Places handed out, which may be in flight.
    taken: Vec<ArenaSlot>,
    /// Slot of the i-th transient group of the layer, or `NO_SLOT`.
    slot_of: Vec<ArenaSlot>,
}

/// What the store did.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct StoreCounters {
    /// Groups looked up, and those that needed no read since they were wanted.
    pub(super) wanted: u64,
    pub(super) hits: u64,
    /// Groups read ahead, and those of them that were wanted then.
    pub(super) ahead: u64,
    pub(super) ahead_hits: u64,
}

pub(super) struct Store {
    engine: Box<dyn ReadEngine>,
    layers: Vec<Layer>,
    areas: [Area; 2],
    /// For each slot the group whose bytes it holds or awaits.
    content: Vec<GroupId>,
    /// Slots whose bytes have not been verified against their checksum.
    unchecked: Vec<bool>,
    planner: Planner,
    /// What reads are seen to cost, where plans follow that.
    observed: Option<ObservedCost>,
    /// Plans made so far.
    plans: u64,
    group_bytes: u32,
    /// What is to be read next, ascending.
    reads: Vec<Wanted>,
    missing: Vec<GroupId>,
    requests: Vec<ReadRequest>,
    batch: ReadBatch,
    done: Vec<Completion>,
    ring_first: ArenaSlot,
    /// The first of the layers whose caches lengthen the ring for those before it.
    lent: usize,
    /// How many slots of the engine make one of ours.
    parts: u32,
    /// Requests of this many groups.
    sizes: Vec<u64>,
    places: LayerPlaces,
}

/// Bytes of one of our slots, once all have arrived.
fn slot_bytes(slots: &Slots, parts: u32, slot: ArenaSlot) -> Option<&[u8]> {
    let first = slot.parts(parts).start;
    if parts == 1 { slots.slot(first) } else { slots.contiguous(first, parts as usize) }
}

/// Whether a read is under way to one of our slots.
fn in_flight(slots: &Slots, parts: u32, slot: ArenaSlot) -> bool {
    slot.parts(parts).any(|part| slots.state(part) == Some(SlotState::InFlight))
}

/// The groups that are in memory, for all threads to see.
#[derive(Clone, Copy)]
pub(super) struct Arrived<'a> {
    slots: &'a Slots,
    content: &'a [GroupId],
    parts: u32,
}

impl<'a> Arrived<'a> {
    /// Bytes of a group, once they have arrived.
    pub(super) fn bytes(self, wanted: Wanted) -> Option<&'a [u8]> {
        let there = wanted.slot != NO_SLOT && self.content[wanted.slot.index()] == wanted.group;
        if there { slot_bytes(self.slots, self.parts, wanted.slot) } else { None }
    }
}

/// The first of the last layers whose slots together hold a whole layer, or of the later half.
fn lent(slots: &[u32], groups: usize) -> usize {
    let (mut lent, mut room) = (slots.len(), 0);
    while lent > slots.len().div_ceil(2) && room < groups {
        lent -= 1;
        room += slots[lent] as usize;
    }
    lent
}

impl Store {
    pub(super) fn new(bundle: &Bundle, file: Arc<DirectFile>, options: &FlashOptions) -> Result<Self> {
        let (layout, plan) = (bundle.layout(), &options.arena);
        let (groups, group_bytes) = (layout.groups(), layout.group_bytes());
        let parts = if options.reads == ReadPlan::Halves { 2 } else { 1 };
        let slots = Slots::new(plan.total() * parts, group_bytes / parts, file.alignment())?;
        let engine = options.engines.open(file, slots, Engines::DEPTH)?;
        let mut first_slot = ArenaSlot(0);
        let layers = plan.slots.iter().enumerate().map(|(layer, &slots)| {
            let first = first_slot;
            first_slot = first.after(slots);
            // Half of the places stay for what is known to be wanted, so that there is always room to go on.
            let cache = LayerCache::new(groups as u32, slots, options.policies[layer]);
            let cache = cache.with_prefetch_transients(plan.transient / 2);
            Layer { offset: bundle.layer(layer).offset, cache, first_slot: first, ahead: AheadRecord::default() }
        });
        let layers: Vec<Layer> = layers.collect();
        let area = |first: ArenaSlot| Area {
            free: (0..plan.transient).rev().map(|place| first.after(place)).collect(),
            taken: Vec::with_capacity(plan.transient as usize),
            slot_of: vec![NO_SLOT; groups],
        };
        let limits = match &options.reads {
            ReadPlan::Cost(cost) | ReadPlan::Observed(cost) => {
                PlanLimits::for_cost(cost, group_bytes as u64, REQUEST_BYTES_MAX)
            }
            ReadPlan::Groups | ReadPlan::Halves => PlanLimits::alone(group_bytes as u64),
        };
        Ok(Self {
            areas: [area(first_slot), area(first_slot.after(plan.transient))],
            content: vec![NO_GROUP; plan.total()],
            unchecked: vec![false; plan.total()],
            planner: Planner::new(limits, groups as u32),
            observed: match options.reads {
                ReadPlan::Observed(cost) => Some(ObservedCost::new(cost)),
                _ => None,
            },
            plans: 0,
            group_bytes: group_bytes as u32,
            reads: Vec::with_capacity(groups),
            missing: Vec::with_capacity(groups),
            requests: Vec::with_capacity(groups),
            // A request, and a gap before each group, for every group at most.
            batch: ReadBatch::with_capacity(groups * parts, 2 * groups * parts),
            done: Vec::with_capacity(groups),
            ring_first: first_slot,
            lent: lent(&plan.slots, groups),
            parts: parts as u32,
            sizes: vec![0; (REQUEST_BYTES_MAX as usize / group_bytes).max(1) + 1],
            places: LayerPlaces::new(bundle),
            engine,
            layers,
        })
    }

    /// Bytes of its tables and lists, beside those of the engine.
    pub(super) fn bytes(layout: &FlashLayout, arena: &ArenaPlan, policies: &[PolicyKind]) -> u64 {
        let groups = layout.groups();
        let layers = arena.slots.iter().zip(policies);
        let caches: u64 = layers.map(|(slots, policy)| LayerCache::bytes(groups as u32, *slots, *policy)).sum();
        caches + arena.total() as u64 * BYTES_OF_SLOT + groups as u64 * BYTES_OF_GROUP
    }

    pub(super) fn engine(&self) -> &dyn ReadEngine {
        &*self.engine
    }

    /// How often requests of each size, in bytes, were made.
    pub(super) fn read_sizes(&self) -> Vec<(u64, u64)> {
        let sizes = self.sizes.iter().enumerate().filter(|(_, count)| **count > 0);
        let parts = u64::from(self.parts);
        sizes.map(|(n, count)| (n as u64 * u64::from(self.group_bytes) / parts, count * parts)).collect()
    }

    /// What reads are seen to cost, where plans follow that.
    pub(super) fn observed_cost(&self) -> Option<ReadCost> {
        self.observed.as_ref().map(ObservedCost::cost)
    }

    pub(super) fn counters(&self) -> StoreCounters {
        let mut sum = StoreCounters::default();
        for counters in self.layers.iter().map(|layer| layer.cache.counters()) {
            sum.wanted += counters.wanted();
            sum.hits += counters.hits;
            sum.ahead += counters.prefetches;
            sum.ahead_hits += counters.prefetch_hits;
        }
        sum
    }

    /// Begins a layer's next token.
    pub(super) fn begin(&mut self, layer: usize) {
        self.layers[layer].cache.begin();
        self.reclaim(layer % 2);
    }

    /// Takes back the places of an area, but for those that a read is under way to.
    fn reclaim(&mut self, parity: usize) {
        let (area, slots, parts) = (&mut self.areas[parity], self.engine.slots(), self.parts);
        let free = &mut area.free;
        area.taken.retain(|&slot| {
            let busy = in_flight(slots, parts, slot);
            if !busy {
                free.push(slot);
            }
            busy
        });
    }

    /// The score above which it is worth reading ahead for a neuron of `layer`: as things went lately.
    pub(super) fn ahead_margin(&self, layer: usize) -> f32 {
        self.layers[layer].ahead.margin
    }

    /// Starts reading those of `groups` (ascending) that will probably be wanted by `layer`, as far as there is room.
    pub(super) fn read_ahead(&mut self, layer: usize, groups: &[GroupId]) -> Result<()> {
        self.reads.clear();
        let Layer { cache, first_slot, ahead, .. } = &mut self.layers[layer];
        let area = &mut self.areas[layer % 2];
        for &group in groups {
            match cache.prefetch(group) {
                Prefetch::Read(Placement::Kept(slot)) => {
                    let slot = first_slot.of_cache(slot);
                    self.reads.push(Wanted { group, slot });
                }
                Prefetch::Read(Placement::Transient(index)) => match area.free.pop() {
                    Some(slot) => {
                        area.taken.push(slot);
                        area.slot_of[index as usize] = slot;
                        self.reads.push(Wanted { group, slot });
                    }
                    // Places of an earlier token are still being read to: the lookup misses, and the group is read then.
                    None => {
                        area.slot_of[index as usize] = NO_SLOT;
                        cache.forget(group);
                    }
                },
                Prefetch::Present(_) | Prefetch::Refused => {}
            }
        }
        ahead.groups += self.reads.len() as u64;
        self.submit(layer)
    }

    /// Looks up what `layer` wants (ascending), finds places for what is missing and starts reading it.
    pub(super) fn look_up(&mut self, layer: usize, wanted: &mut [Wanted]) -> Result<()> {
        let Layer { cache, first_slot, ahead, .. } = &mut self.layers[layer];
        let area = &mut self.areas[layer % 2];
        let before = cache.counters();
        for entry in wanted.iter_mut() {
            entry.slot = match cache.lookup(entry.group) {
                Some(Placement::Kept(slot)) => first_slot.of_cache(slot),
                Some(Placement::Transient(index)) => area.slot_of[index as usize],
                None => NO_SLOT,
            };
        }
        let (issued, counters) = (std::mem::take(&mut ahead.groups), cache.counters());
        let unused = issued - (counters.prefetch_hits - before.prefetch_hits).min(issued);
        let read = issued + counters.misses - before.misses;
        ahead.unused += NEWEST * (unused as f32 / read.max(1) as f32 - ahead.unused);
        let step = if ahead.unused > UNUSED_AIM { MARGIN_STEP } else { -MARGIN_STEP };
        ahead.margin = (ahead.margin + step).clamp(-MARGIN_MAX, MARGIN_MAX);
        self.reads.clear();
        for entry in wanted.iter_mut() {
            if entry.slot == NO_SLOT {
                match cache.admit(entry.group) {
                    Placement::Kept(slot) => entry.slot = first_slot.of_cache(slot),
                    Placement::Transient(index) => {
                        area.slot_of[index as usize] = NO_SLOT;
                        let Some(slot) = area.free.pop() else { continue };
                        area.taken.push(slot);
                        entry.slot = slot;
                    }
                }
            } else if self.content[entry.slot.index()] == entry.group {
                continue;
            }
            // Also what an interrupted prefill promised and never brought.
            self.reads.push(*entry);
        }
        self.submit(layer)
    }

    /// Finds places for those of `wanted` that still have none, as far as there is room, and starts reading them.
    pub(super) fn read_more(&mut self, layer: usize, wanted: &mut [Wanted]) -> Result<()> {
        self.reclaim_unwanted(layer % 2, wanted);
        let area = &mut self.areas[layer % 2];
        self.reads.clear();
        for entry in wanted.iter_mut().filter(|w| w.slot == NO_SLOT) {
            let Some(slot) = area.free.pop() else { break };
            area.taken.push(slot);
            entry.slot = slot;
            self.reads.push(*entry);
        }
        self.submit(layer)
    }

    /// Takes back the places of groups that are not among `wanted`: computed already, or read ahead and never used.
    fn reclaim_unwanted(&mut self, parity: usize, wanted: &[Wanted]) {
        let (area, slots, content, parts) = (&mut self.areas[parity], self.engine.slots(), &self.content, self.parts);
        let free = &mut area.free;
        area.taken.retain(|&slot| {
            let group = content[slot.index()];
            let wanted_still = wanted.binary_search_by_key(&group, |w| w.group).is_ok_and(|at| wanted[at].slot == slot);
            let keep = wanted_still || in_flight(slots, parts, slot);
            if !keep {
                free.push(slot);
            }
            keep
        });
    }

    /// Plans and starts `self.reads`.
    fn submit(&mut self, layer: usize) -> Result<()> {
        if self.reads.is_empty() {
            return Ok(());
        }
        for at in 0..self.reads.len() {
            // A slot given up while an unused prefetch was still on its way to it.
            while in_flight(self.engine.slots(), self.parts, self.reads[at].slot) {
                self.wait(1)?;
            }
        }
        self.missing.clear();
        self.missing.extend(self.reads.iter().map(|read| read.group));
        if let Some(observed) = &self.observed {
            // Now and then no gap is read through: other mixes of requests and bytes tell what each of them costs.
            let apart = self.plans.is_multiple_of(PLANS_OF_ONE_APART);
            self.planner.set_gap_bytes_max(if apart { 0 } else { observed.cost().gap_bytes_max() });
            self.plans += 1;
        }
        self.planner.plan(&self.missing, &mut self.requests);
        self.batch.clear();
        let bytes = self.group_bytes;
        let mut next = 0;
        for request in &self.requests {
            let offset = self.layers[layer].offset + u64::from(request.first.0) * u64::from(bytes);
            self.batch.begin(layer as u64, offset);
            self.sizes[request.groups as usize] += 1;
            let mut at = request.first;
            while let Some(read) = self.reads.get(next).filter(|read| read.group < request.range().end) {
                self.batch.gap((read.group.0 - at.0) * bytes);
                for (part, slot) in (0..).zip(read.slot.parts(self.parts)) {
                    if part > 0 {
                        self.batch.begin(layer as u64, offset + u64::from(part * (bytes / self.parts)));
                    }
                    self.batch.slot(slot, bytes / self.parts);
                }
                self.content[read.slot.index()] = read.group;
                self.unchecked[read.slot.index()] = true;
                (at, next) = (read.group.after(1), next + 1);
            }
        }
        self.send()
    }

    /// Starts the reads in `self.batch`.
    fn send(&mut self) -> Result<()> {
        if let Some(observed) = &mut self.observed
            && self.engine.in_flight() == 0
        {
            observed.begins(Instant::now());
        }
        self.engine.submit(&self.batch)?;
        Ok(())
    }

    /// Lets the disk go on, and takes note of what has arrived; blocks until `at_least` reads have.
    pub(super) fn wait(&mut self, at_least: usize) -> Result<()> {
        self.done.clear();
        let waited = self.engine.counters().wait_ns;
        let outcome = self.engine.wait(at_least, &mut self.done);
        if let Some(observed) = &mut self.observed {
            observed.arrived(self.done.len() as u64, self.done.iter().map(|done| done.bytes).sum());
            let blocked = at_least > 0 && self.engine.counters().wait_ns - waited > BLOCKED_NS_MIN;
            match (blocked, self.engine.in_flight() > 0) {
                (true, busy) => observed.waited(Instant::now(), busy),
                (false, false) => observed.idled(),
                (false, true) => {}
            }
        }
        let failed = self.done.drain(..).find_map(|completion| completion.result.err());
        match failed.map_or(outcome.map(|_| ()), Err) {
            Ok(()) => Ok(()),
            Err(error) => {
                self.forget_all();
                Err(self.places.name(error))
            }
        }
    }

    /// After an error nothing in memory is trusted: every group will be read again.
    pub(super) fn forget_all(&mut self) {
        for layer in &mut self.layers {
            (0..layer.cache.groups()).map(GroupId).for_each(|group| layer.cache.forget(group));
        }
        self.content.fill(NO_GROUP);
    }

    /// Waits for all reads, wanted or not.
    pub(super) fn settle(&mut self) -> Result<()> {
        while self.engine.in_flight() > 0 {
            self.wait(self.engine.in_flight())?;
        }
        Ok(())
    }

    /// What has arrived.
    pub(super) fn arrived(&self) -> Arrived<'_> {
        Arrived { slots: self.engine.slots(), content: &self.content, parts: self.parts }
    }

    /// Whether the bytes in a slot still have to be verified against their checksum.
    pub(super) fn is_unchecked(&self, slot: ArenaSlot) -> bool {
        self.unchecked[slot.index()]
    }

    pub(super) fn set_checked(&mut self, slot: ArenaSlot) {
        self.unchecked[slot.index()] = false;
    }

    /// Makes all transient places free. Nothing may be in flight.
    pub(super) fn free_transients(&mut self) {
        self.reclaim(0);
        self.reclaim(1);
    }

    /// Neighbouring slots through which `layer` can be streamed, the first and how many: the transient places, and the caches of the
    /// last layers while it is not their turn. What these held is streamed past them before the prompt ends, and kept again.
    pub(super) fn ring(&self, layer: usize) -> (ArenaSlot, u32) {
        let lent = self.layers.get(self.lent).filter(|_| layer < self.lent);
        let first = lent.map_or(self.ring_first, |lent| lent.first_slot);
        (first, self.content.len() as u32 - first.0)
    }

    /// Whether slots lie side by side without gaps.
    pub(super) fn slots_are_contiguous(&self) -> bool {
        let slots = self.engine.slots();
        slots.arena_bytes() == slots.count() * slots.slot_bytes()
    }

    /// Starts reading `count` neighbouring groups of `layer`, from `group` on, into neighbouring slots of the ring.
    pub(super) fn read_into_ring(&mut self, layer: usize, group: GroupId, count: u32, slot: ArenaSlot) -> Result<()> {
        let bytes = self.group_bytes;
        self.batch.clear();
        self.batch.begin(layer as u64, self.layers[layer].offset + u64::from(group.0) * u64::from(bytes));
        for at in 0..count {
            let slot = slot.after(at);
            // Not for those who ask by group: the slot may be another layer's.
            self.content[slot.index()] = NO_GROUP;
            slot.parts(self.parts).for_each(|part| self.batch.slot(part, bytes / self.parts));
        }
        self.send()
    }

    /// The bytes of neighbouring slots of the ring, once all have arrived.
    pub(super) fn ring_bytes(&self, slot: ArenaSlot, count: u32) -> Option<&[u8]> {
        let slots = self.engine.slots();
        match count {
            1 => slot_bytes(slots, self.parts, slot),
            _ => slots.contiguous(slot.parts(self.parts).start, (count * self.parts) as usize),
        }
    }

    /// Makes the cache of `layer` as it would be had a token wanted these groups, without their bytes.
    pub(super) fn warm(&mut self, layer: usize, groups: &[GroupId]) {
        let cache = &mut self.layers[layer].cache;
        cache.begin();
        self.missing.clear();
        for &group in groups {
            if cache.lookup(group).is_none() {
                self.missing.push(group);
            }
        }
        for &group in &self.missing {
            cache.admit(group);
        }
    }

    /// Copies a checked group from the ring to the cache slot that waits for it, if one does.
    pub(super) fn keep(&mut self, layer: usize, group: GroupId, ring_slot: ArenaSlot) {
        let Layer { cache, first_slot, .. } = &self.layers[layer];
        let Some(Placement::Kept(slot)) = cache.peek(group) else { return };
        let slot = first_slot.of_cache(slot);
        let parts = self.parts;
        if self.content[slot.index()] != group || slot_bytes(self.engine.slots(), parts, slot).is_none() {
            self.content[slot.index()] = NO_GROUP;
            let slots = self.engine.slots_mut();
            if ring_slot.parts(parts).zip(slot.parts(parts)).all(|(from, to)| slots.copy(from, to)) {
                self.content[slot.index()] = group;
                self.unchecked[slot.index()] = false;
            }
        }
    }
}
