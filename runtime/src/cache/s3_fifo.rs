//! S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023).
//!
//! New groups enter a small queue, a tenth of the slots. At its end those that were used twice or more move to the main
//! queue, the others leave and are remembered for a while without their bytes; a remembered group that returns enters the
//! main queue directly. Slots that the token holds are set aside when they would be given up, and return when it ends.

use flashlm_formats::ids::GroupId;

use super::lists::Lists;
use super::policy::Policy;
use super::slot::SlotId;
use crate::buffers::Buffers;

const SMALL: u32 = 0;
const MAIN: u32 = 1;
/// Set aside from either queue.
const ASIDE: u32 = 2;
const USES_MAX: u8 = 3;

#[derive(Debug)]
pub(super) struct S3Fifo {
    lists: Lists,
    group_in: Box<[GroupId]>,
    uses: Box<[u8]>,
    /// `SMALL` or `MAIN`; for slots set aside the queue that they return to.
    home: Box<[u8]>,
    held_by: Box<[u64]>,
    small: u32,
    small_max: u32,
    main: u32,
    /// For each group the number of departures when it left the small queue, from 1; 0: never.
    left_at: Box<[u64]>,
    departures: u64,
    /// Departures for which a group is remembered.
    memory: u64,
    token: u64,
}

impl S3Fifo {
    pub(super) fn new(buffers: &mut Buffers, groups: u32, slots: u32) -> Self {
        let small_max = (slots / 10).max(1);
        S3Fifo {
            lists: Lists::new(buffers, slots, 3),
            group_in: buffers.filled(slots as usize, GroupId(0)).into(),
            uses: buffers.zeros(slots as usize).into(),
            home: buffers.zeros(slots as usize).into(),
            held_by: buffers.zeros(slots as usize).into(),
            small: 0,
            small_max,
            main: 0,
            left_at: buffers.zeros(groups as usize).into(),
            departures: 0,
            memory: slots.saturating_sub(small_max) as u64,
            token: 0,
        }
    }

    fn enter(&mut self, queue: u32, slot: SlotId) {
        self.home[slot.index()] = queue as u8;
        *(if queue == SMALL { &mut self.small } else { &mut self.main }) += 1;
        self.lists.push_front(queue, slot);
    }

    fn take(&mut self, queue: u32) -> Option<SlotId> {
        let slot = self.lists.pop_back(queue)?;
        *(if queue == SMALL { &mut self.small } else { &mut self.main }) -= 1;
        Some(slot)
    }

    fn remembered(&self, group: GroupId) -> bool {
        let left = self.left_at[group.index()];
        left != 0 && self.departures - left < self.memory
    }
}

impl Policy for S3Fifo {
    fn begin(&mut self, token: u64) {
        self.token = token;
        while let Some(slot) = self.lists.pop_back(ASIDE) {
            self.enter(self.home[slot.index()] as u32, slot);
        }
    }

    fn used(&mut self, slot: SlotId, _group: GroupId) {
        self.uses[slot.index()] = (self.uses[slot.index()] + 1).min(USES_MAX);
        self.held_by[slot.index()] = self.token;
    }

    fn missed(&mut self, _group: GroupId) {}

    fn hold(&mut self, slot: SlotId) {
        self.held_by[slot.index()] = self.token;
    }

    fn victim(&mut self, _group: GroupId) -> Option<SlotId> {
        loop {
            let queue = if self.small >= self.small_max || self.main == 0 { SMALL } else { MAIN };
            let slot = match self.take(queue) {
                Some(slot) => slot,
                None => self.take(if queue == SMALL { MAIN } else { SMALL })?,
            };
            let s = slot.index();
            let promoted = self.home[s] as u32 == SMALL && self.uses[s] > 1;
            if self.held_by[s] == self.token {
                // Each slot comes by here once in a token at most.
                self.home[s] = if promoted { MAIN } else { self.home[s] as u32 } as u8;
                self.lists.push_front(ASIDE, slot);
            } else if promoted {
                self.uses[s] = 0;
                self.enter(MAIN, slot);
            } else if self.home[s] as u32 == MAIN && self.uses[s] > 0 {
                self.uses[s] -= 1;
                self.enter(MAIN, slot);
            } else {
                if self.home[s] as u32 == SMALL {
                    self.departures += 1;
                    self.left_at[self.group_in[s].index()] = self.departures;
                }
                return Some(slot);
            }
        }
    }

    fn placed(&mut self, slot: SlotId, group: GroupId) {
        let queue = if self.remembered(group) { MAIN } else { SMALL };
        self.group_in[slot.index()] = group;
        self.uses[slot.index()] = 0;
        self.held_by[slot.index()] = self.token;
        self.enter(queue, slot);
    }

    fn removed(&mut self, slot: SlotId) {
        // Rare, so found by looking: only a failed read asks.
        if !self.lists.contains(ASIDE, slot) {
            *(if self.home[slot.index()] as u32 == SMALL { &mut self.small } else { &mut self.main }) -= 1;
        }
        self.lists.unlink(slot);
    }
}
