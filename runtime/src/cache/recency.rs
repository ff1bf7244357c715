//! Least recently used, and the paper's sliding window, which is the same with an end.

use flashlm_formats::ids::GroupId;

use super::lists::Lists;
use super::policy::Policy;
use super::slot::SlotId;
use crate::buffers::Buffers;

const RECENT: u32 = 0;

/// Slots in the order of their last use.
#[derive(Debug)]
pub(super) struct Recency {
    lists: Lists,
    /// Token that last used each slot.
    used_at: Box<[u64]>,
    token: u64,
    /// Tokens after which an unused slot is given up.
    window: Option<u32>,
}

impl Recency {
    pub(super) fn new(buffers: &mut Buffers, slots: u32, window: Option<u32>) -> Self {
        let (lists, used_at) = (Lists::new(buffers, slots, 1), buffers.zeros(slots as usize).into());
        Recency { lists, used_at, token: 0, window }
    }
}

impl Policy for Recency {
    fn begin(&mut self, token: u64) {
        self.token = token;
    }

    fn expire(&mut self) -> Option<SlotId> {
        let window = self.window? as u64;
        let oldest = self.lists.back(RECENT)?;
        if self.used_at[oldest.index()] + window < self.token {
            return self.lists.pop_back(RECENT);
        }
        None
    }

    fn used(&mut self, slot: SlotId, _group: GroupId) {
        self.hold(slot);
    }

    fn missed(&mut self, _group: GroupId) {}

    /// A prefetch counts as recent: recency knows no degrees.
    fn hold(&mut self, slot: SlotId) {
        self.lists.unlink(slot);
        self.lists.push_front(RECENT, slot);
        self.used_at[slot.index()] = self.token;
    }

    fn victim(&mut self, _group: GroupId) -> Option<SlotId> {
        let oldest = self.lists.back(RECENT)?;
        if self.used_at[oldest.index()] == self.token {
            return None;
        }
        self.lists.pop_back(RECENT)
    }

    fn placed(&mut self, slot: SlotId, _group: GroupId) {
        self.hold(slot);
    }

    fn removed(&mut self, slot: SlotId) {
        self.lists.unlink(slot);
    }
}
