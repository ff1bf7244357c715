//! Doubly linked lists over slot numbers, in arrays made once.
//!
//! The lists are rings through a sentinel each, so that a slot leaves its list without anybody knowing which it is.

use super::slot::SlotId;
use crate::buffers::Buffers;

/// A fixed number of lists over a fixed number of slots. Every slot is in at most one list.
///
/// In the arrays a sentinel has the number of its list after those of the slots.
#[derive(Debug)]
pub(super) struct Lists {
    next: Box<[u32]>,
    prev: Box<[u32]>,
    slots: u32,
}

impl Lists {
    /// `lists` empty lists over `slots` slots.
    pub(super) fn new(buffers: &mut Buffers, slots: u32, lists: u32) -> Self {
        let mut alone = || buffers.listed((slots + lists) as usize, 0..slots + lists).into();
        Lists { next: alone(), prev: alone(), slots }
    }

    /// Whether the list has no members.
    pub(super) fn is_empty(&self, list: u32) -> bool {
        let sentinel = self.slots + list;
        self.next[sentinel as usize] == sentinel
    }

    /// The member at the back.
    pub(super) fn back(&self, list: u32) -> Option<SlotId> {
        let last = self.prev[(self.slots + list) as usize];
        (last < self.slots).then_some(SlotId(last))
    }

    /// Whether the slot is a member; takes time in the length of the list.
    pub(super) fn contains(&self, list: u32, slot: SlotId) -> bool {
        let sentinel = self.slots + list;
        let mut at = self.next[sentinel as usize];
        while at != sentinel && at != slot.0 {
            at = self.next[at as usize];
        }
        at == slot.0
    }

    /// Puts a slot that is in no list at the front.
    pub(super) fn push_front(&mut self, list: u32, slot: SlotId) {
        let sentinel = self.slots + list;
        let first = self.next[sentinel as usize];
        self.next[slot.index()] = first;
        self.prev[slot.index()] = sentinel;
        self.prev[first as usize] = slot.0;
        self.next[sentinel as usize] = slot.0;
    }

    /// Takes a slot out of whatever list it is in.
    pub(super) fn unlink(&mut self, slot: SlotId) {
        let (next, prev) = (self.next[slot.index()], self.prev[slot.index()]);
        self.next[prev as usize] = next;
        self.prev[next as usize] = prev;
        self.next[slot.index()] = slot.0;
        self.prev[slot.index()] = slot.0;
    }

    /// Takes the member at the back out of the list.
    pub(super) fn pop_back(&mut self, list: u32) -> Option<SlotId> {
        let slot = self.back(list)?;
        self.unlink(slot);
        Some(slot)
    }

    /// Moves all members of `from` after those of `to`, keeping their order.
    pub(super) fn append(&mut self, from: u32, to: u32) {
        if self.is_empty(from) {
            return;
        }
        let (source, target) = (self.slots + from, self.slots + to);
        let (first, last) = (self.next[source as usize], self.prev[source as usize]);
        let end = self.prev[target as usize];
        self.next[end as usize] = first;
        self.prev[first as usize] = end;
        self.next[last as usize] = target;
        self.prev[target as usize] = last;
        self.next[source as usize] = source;
        self.prev[source as usize] = source;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    proptest! {
        #[test]
        fn lists_behave_like_deques(steps in proptest::collection::vec((0u8..4, 0u32..3, 0u32..3, 0u32..10), 0..200)) {
            let mut lists = Lists::new(&mut Buffers::default(), 10, 3);
            let mut model = vec![VecDeque::<SlotId>::new(); 3];
            for (what, a, b, slot) in steps {
                let slot = SlotId(slot);
                match what {
                    0 if !model.iter().any(|l| l.contains(&slot)) => {
                        lists.push_front(a, slot);
                        model[a as usize].push_front(slot);
                    }
                    1 => {
                        lists.unlink(slot);
                        model.iter_mut().for_each(|l| l.retain(|&s| s != slot));
                    }
                    2 => prop_assert_eq!(lists.pop_back(a), model[a as usize].pop_back()),
                    3 if a != b => {
                        lists.append(a, b);
                        let moved = std::mem::take(&mut model[a as usize]);
                        model[b as usize].extend(moved);
                    }
                    _ => {}
                }
                for list in 0..3 {
                    prop_assert_eq!(lists.is_empty(list), model[list as usize].is_empty());
                    prop_assert_eq!(lists.back(list), model[list as usize].back().copied());
                }
            }
        }
    }
}
