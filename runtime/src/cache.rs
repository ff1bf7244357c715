//! The neuron cache: which groups of a layer stay in memory.
//!
//! [`LayerCache`] is the mechanism: a table from group to slot over slots that are laid out once, so that weights never
//! move and nothing is allocated while decoding. What to give up for a new group is a [`Policy`]'s decision:
//! [`PolicyKind`] names those there are. A slot in use by the current token is never given up; a group for which there is
//! no slot is read to a transient place and forgotten after the token, so a cache may be smaller than what one token wants,
//! or have no slots at all.
//!
//! For each token and layer: [`LayerCache::begin`]; if the reads start early, [`LayerCache::prefetch`]; then
//! [`LayerCache::lookup`] for every wanted group, and [`LayerCache::admit`] for those that were missing. Looking everything
//! up before admitting anything keeps what the token itself needs from being evicted.
//!
//! Knows group and slot numbers: nothing of weights, files or threads.

mod divide;
mod frequency;
mod kind;
mod lfu;
mod lists;
mod policy;
mod recency;
mod s3_fifo;
mod slot;
mod w_tinylfu;

pub use divide::{BenefitCurve, divide_slots};
pub use kind::{ParsePolicyError, PolicyKind};
pub use policy::Policy;
pub use slot::SlotId;

use flashlm_formats::ids::GroupId;

use crate::buffers::Buffers;

const NONE: u32 = u32::MAX;
const NO_GROUP: GroupId = GroupId(u32::MAX);
/// Marks the index of a transient place in the table of places.
const TRANSIENT: u32 = 1 << 31;

/// Where the bytes of a group are, or go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// In this slot; when admitted, the group that was there is forgotten.
    Kept(SlotId),
    /// In a place that lasts for this token only: the index of the group among such groups of the token, from 0. An engine with
    /// fewer places than that works in waves.
    Transient(u32),
}

/// What a prefetch asks of the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefetch {
    /// The group is there, and will stay until the token ends.
    Present(Placement),
    /// The group is to be read to this place.
    Read(Placement),
    /// No slot may be given up and no transient place is left: the group has to wait until it is known to be wanted.
    Refused,
}

/// What happened since the cache was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheCounters {
    /// Tokens begun.
    pub tokens: u64,
    /// Wanted groups that were in a slot before the token began.
    pub hits: u64,
    /// Wanted groups that a prefetch of the same token had fetched.
    pub prefetch_hits: u64,
    /// Wanted groups that were in no slot.
    pub misses: u64,
    /// Groups read ahead into slots; all beyond `prefetch_hits` were read and never used.
    pub prefetches: u64,
    /// Admitted groups that found no slot.
    pub transients: u64,
    /// Groups given up, expired ones included.
    pub evictions: u64,
}

impl CacheCounters {
    /// Wanted groups.
    pub fn wanted(&self) -> u64 {
        self.hits + self.prefetch_hits + self.misses
    }

    /// Share of the wanted groups that did not have to be read; 1 where nothing was wanted.
    pub fn hit_rate(&self) -> f64 {
        if self.wanted() == 0 { 1.0 } else { self.hits as f64 / self.wanted() as f64 }
    }
}

/// The cache of one layer.
#[derive(Debug)]
pub struct LayerCache {
    /// Slot of each group, `TRANSIENT` and an index, or `NONE`.
    place_of: Box<[u32]>,
    /// Group in each slot, or `NO_GROUP`.
    group_in: Box<[GroupId]>,
    /// The token (counted from 1) that last took or looked up each slot.
    held_by: Box<[u64]>,
    /// The token that prefetched each group and has not looked it up; 0: none.
    ahead: Box<[u64]>,
    /// Slots without a group; the last is taken first.
    free: Vec<SlotId>,
    /// Groups in transient places.
    transient: Vec<GroupId>,
    prefetch_transients_max: u32,
    policy: Box<dyn Policy>,
    token: u64,
    counters: CacheCounters,
}

impl LayerCache {
    /// A cache of `slots` slots for a layer of `groups` groups (each below 2^31).
    pub fn new(groups: u32, slots: u32, policy: PolicyKind) -> Self {
        Self::with(&mut Buffers::default(), groups, slots, policy)
    }

    /// Bytes of its tables.
    pub fn bytes(groups: u32, slots: u32, policy: PolicyKind) -> u64 {
        Buffers::bytes_of(|buffers| Self::with(buffers, groups, slots, policy))
    }

    fn with(buffers: &mut Buffers, groups: u32, slots: u32, policy: PolicyKind) -> Self {
        assert!(groups < TRANSIENT && slots < TRANSIENT, "{groups} groups, {slots} slots");
        let (of_groups, of_slots) = (groups as usize, slots as usize);
        LayerCache {
            place_of: buffers.filled(of_groups, NONE).into(),
            group_in: buffers.filled(of_slots, NO_GROUP).into(),
            held_by: buffers.zeros(of_slots).into(),
            ahead: buffers.zeros(of_groups).into(),
            free: buffers.listed(of_slots, (0..slots).rev().map(SlotId)),
            transient: buffers.room(of_groups),
            prefetch_transients_max: groups,
            policy: policy.build(buffers, groups, slots),
            token: 0,
            counters: CacheCounters::default(),
        }
    }

    /// The same, but a prefetch is refused rather than given a transient place beyond the first `places`.
    pub fn with_prefetch_transients(mut self, places: u32) -> Self {
        self.prefetch_transients_max = places;
        self
    }

    /// Number of groups of the layer.
    pub fn groups(&self) -> u32 {
        self.place_of.len() as u32
    }

    /// Number of slots.
    pub fn slots(&self) -> u32 {
        self.group_in.len() as u32
    }

    /// Slots that hold a group.
    pub fn occupied(&self) -> u32 {
        self.slots() - self.free.len() as u32
    }

    /// What happened so far.
    pub fn counters(&self) -> CacheCounters {
        self.counters
    }

    /// Where a group is, without counting this as a use.
    pub fn peek(&self, group: GroupId) -> Option<Placement> {
        match self.place_of[group.index()] {
            NONE => None,
            place if place & TRANSIENT != 0 => Some(Placement::Transient(place & !TRANSIENT)),
            slot => Some(Placement::Kept(SlotId(slot))),
        }
    }

    /// Begins the next token: transient groups are forgotten, and so is what is too old for the policy; what the last token
    /// held may be given up again.
    pub fn begin(&mut self) {
        self.token += 1;
        self.counters.tokens += 1;
        for group in self.transient.drain(..) {
            self.place_of[group.index()] = NONE;
        }
        self.policy.begin(self.token);
        while let Some(slot) = self.policy.expire() {
            self.counters.evictions += 1;
            self.vacate(slot);
        }
    }

    /// Where a wanted group is, which the token now holds; `None` when it must be read and [admitted](Self::admit).
    ///
    /// To be called once for each wanted group of a token.
    pub fn lookup(&mut self, group: GroupId) -> Option<Placement> {
        let place = self.peek(group);
        match place {
            None => self.counters.misses += 1,
            Some(_) if self.ahead[group.index()] == self.token => self.counters.prefetch_hits += 1,
            Some(_) => self.counters.hits += 1,
        }
        self.ahead[group.index()] = 0;
        if let Some(Placement::Kept(slot)) = place {
            self.held_by[slot.index()] = self.token;
            self.policy.used(slot, group);
        } else {
            self.policy.missed(group);
        }
        place
    }

    /// Finds a place for a group that [`lookup`](Self::lookup) missed.
    pub fn admit(&mut self, group: GroupId) -> Placement {
        debug_assert_eq!(self.place_of[group.index()], NONE, "group {group} is cached already");
        if let Some(slot) = self.take_slot(group) {
            return Placement::Kept(slot);
        }
        self.take_transient(group)
    }

    /// Makes room for a group that will probably be wanted, and keeps it until the token ends.
    ///
    /// It counts as a use only when it is looked up. One that never is remains an ordinary, unpopular, group.
    pub fn prefetch(&mut self, group: GroupId) -> Prefetch {
        if let Some(place) = self.peek(group) {
            if let Placement::Kept(slot) = place
                && self.held_by[slot.index()] != self.token
            {
                self.held_by[slot.index()] = self.token;
                self.policy.hold(slot);
            }
            return Prefetch::Present(place);
        }
        let place = match self.take_slot(group) {
            Some(slot) => Placement::Kept(slot),
            None if self.transient.len() < self.prefetch_transients_max as usize => self.take_transient(group),
            None => return Prefetch::Refused,
        };
        self.ahead[group.index()] = self.token;
        self.counters.prefetches += 1;
        Prefetch::Read(place)
    }

    /// Forgets a group, whose read failed, say. Its transient place, if it has one, stays used until the token ends.
    pub fn forget(&mut self, group: GroupId) {
        match self.peek(group) {
            Some(Placement::Kept(slot)) => {
                self.policy.removed(slot);
                self.vacate(slot);
            }
            _ => self.place_of[group.index()] = NONE,
        }
    }

    /// Looks all of `wanted` up: fills `hits` and `misses`, both in the order of `wanted`. Nothing is allocated once both
    /// have room for all groups.
    pub fn lookup_all(&mut self, wanted: &[GroupId], hits: &mut Vec<(GroupId, Placement)>, misses: &mut Vec<GroupId>) {
        hits.clear();
        misses.clear();
        for &group in wanted {
            match self.lookup(group) {
                Some(place) => hits.push((group, place)),
                None => misses.push(group),
            }
        }
    }

    fn take_slot(&mut self, group: GroupId) -> Option<SlotId> {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                let slot = self.policy.victim(group)?;
                debug_assert_ne!(self.held_by[slot.index()], self.token, "victim {slot} is in use");
                self.counters.evictions += 1;
                self.place_of[self.group_in[slot.index()].index()] = NONE;
                slot
            }
        };
        self.place_of[group.index()] = slot.0;
        self.group_in[slot.index()] = group;
        self.held_by[slot.index()] = self.token;
        self.policy.placed(slot, group);
        Some(slot)
    }

    fn take_transient(&mut self, group: GroupId) -> Placement {
        let index = self.transient.len() as u32;
        self.transient.push(group);
        self.place_of[group.index()] = TRANSIENT | index;
        self.counters.transients += 1;
        Placement::Transient(index)
    }

    fn vacate(&mut self, slot: SlotId) {
        self.place_of[self.group_in[slot.index()].index()] = NONE;
        self.group_in[slot.index()] = NO_GROUP;
        self.free.push(slot);
    }
}

#[cfg(test)]
mod tests;
