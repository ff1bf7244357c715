//! W-TinyLFU (Einziger, Friedman and Manes, "TinyLFU: a highly efficient cache admission policy", 2017).
//!
//! New groups enter a small window kept by recency. What falls out of it must have been used more often than what the main
//! part would give up for it. The main part is a segmented LRU: groups used again there are protected, up to four fifths.
//! The counters are exact, one per group and at most 15, and all are halved after every ten uses per slot.

use flashlm_formats::ids::GroupId;

use super::lists::Lists;
use super::policy::Policy;
use super::slot::SlotId;
use crate::buffers::Buffers;

const WINDOW: u32 = 0;
const PROBATION: u32 = 1;
const PROTECTED: u32 = 2;
const COUNT_MAX: u8 = 15;
const USES_PER_SLOT: u64 = 10;

#[derive(Debug)]
pub(super) struct WTinyLfu {
    lists: Lists,
    group_in: Box<[GroupId]>,
    segment: Box<[u8]>,
    used_at: Box<[u64]>,
    /// Members of each segment.
    members: [u32; 3],
    window_max: u32,
    protected_max: u32,
    count: Box<[u8]>,
    /// Uses until the counters are halved.
    until_halved: u64,
    sample: u64,
    token: u64,
}

impl WTinyLfu {
    pub(super) fn new(buffers: &mut Buffers, groups: u32, slots: u32) -> Self {
        // A window of a hundredth is the paper's default.
        let window_max = (slots / 100).max(1);
        let sample = (slots as u64 * USES_PER_SLOT).max(groups as u64);
        WTinyLfu {
            lists: Lists::new(buffers, slots, 3),
            group_in: buffers.filled(slots as usize, GroupId(0)).into(),
            segment: buffers.zeros(slots as usize).into(),
            used_at: buffers.zeros(slots as usize).into(),
            members: [0; 3],
            window_max,
            protected_max: (slots.saturating_sub(window_max) as u64 * 4 / 5) as u32,
            count: buffers.zeros(groups as usize).into(),
            until_halved: sample,
            sample,
            token: 0,
        }
    }

    fn count(&mut self, group: GroupId) {
        let count = &mut self.count[group.index()];
        *count = (*count + 1).min(COUNT_MAX);
        self.until_halved -= 1;
        if self.until_halved == 0 {
            self.count.iter_mut().for_each(|c| *c /= 2);
            self.until_halved = self.sample;
        }
    }

    fn enter(&mut self, segment: u32, slot: SlotId) {
        self.segment[slot.index()] = segment as u8;
        self.members[segment as usize] += 1;
        self.lists.push_front(segment, slot);
    }

    fn leave(&mut self, slot: SlotId) {
        self.members[self.segment[slot.index()] as usize] -= 1;
        self.lists.unlink(slot);
    }

    /// The last slot of a segment, unless the token holds it.
    fn last(&self, segment: u32) -> Option<SlotId> {
        self.lists.back(segment).filter(|&s| self.used_at[s.index()] != self.token)
    }

    fn frequency(&self, slot: SlotId) -> u8 {
        self.count[self.group_in[slot.index()].index()]
    }
}

impl Policy for WTinyLfu {
    fn begin(&mut self, token: u64) {
        self.token = token;
    }

    fn used(&mut self, slot: SlotId, group: GroupId) {
        self.count(group);
        let segment = self.segment[slot.index()] as u32;
        self.used_at[slot.index()] = self.token;
        self.leave(slot);
        if segment == WINDOW || self.protected_max == 0 {
            self.enter(segment, slot);
            return;
        }
        self.enter(PROTECTED, slot);
        if self.members[PROTECTED as usize] > self.protected_max
            && let Some(demoted) = self.lists.back(PROTECTED)
        {
            self.leave(demoted);
            self.enter(PROBATION, demoted);
        }
    }

    fn missed(&mut self, group: GroupId) {
        self.count(group);
    }

    fn hold(&mut self, slot: SlotId) {
        let segment = self.segment[slot.index()] as u32;
        self.used_at[slot.index()] = self.token;
        self.leave(slot);
        self.enter(segment, slot);
    }

    fn victim(&mut self, group: GroupId) -> Option<SlotId> {
        let main = self.last(PROBATION).or_else(|| self.last(PROTECTED));
        let Some(resident) = main else {
            let slot = self.last(WINDOW)?;
            self.leave(slot);
            return Some(slot);
        };
        if self.members[WINDOW as usize] >= self.window_max {
            match self.last(WINDOW) {
                Some(candidate) if self.frequency(candidate) <= self.frequency(resident) => {
                    self.leave(candidate);
                    return Some(candidate);
                }
                Some(_) => {}
                // The token itself fills the window: the newcomer is the candidate.
                None if self.count[group.index()] <= self.frequency(resident) => return None,
                None => {}
            }
        }
        self.leave(resident);
        Some(resident)
    }

    fn placed(&mut self, slot: SlotId, group: GroupId) {
        self.group_in[slot.index()] = group;
        self.used_at[slot.index()] = self.token;
        self.enter(WINDOW, slot);
        // Either a contest was won or there was room to spare.
        if self.members[WINDOW as usize] > self.window_max
            && let Some(admitted) = self.lists.back(WINDOW)
        {
            self.leave(admitted);
            self.enter(PROBATION, admitted);
        }
    }

    fn removed(&mut self, slot: SlotId) {
        self.leave(slot);
    }
}
