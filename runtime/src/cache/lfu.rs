//! Least frequently used, with decaying counts (the LRFU of Lee et al., 2001) and without a heap.
//!
//! A score that fades by itself never changes while a group is idle, so slots can wait in buckets of equal score.
//! The buckets are a ring: as time passes the lowest ones are poured into the next and their place serves new scores.
//! A use only raises a score, so a slot waits where it was filed until it is looked at as a victim; then it is filed anew.

use flashlm_formats::ids::GroupId;

use super::frequency::Frequency;
use super::lists::Lists;
use super::policy::Policy;
use super::slot::SlotId;
use crate::buffers::Buffers;

/// Lowest scores that are told apart, below that of a single use now: eight octaves.
const DEPTH: u64 = 64;

#[derive(Debug)]
pub(super) struct Lfu {
    frequency: Frequency,
    /// One list per bucket, and after them the list of slots that would have been victims, had the token not held them.
    lists: Lists,
    group_in: Box<[GroupId]>,
    /// The token that last placed, used or held each slot.
    held_by: Box<[u64]>,
    /// A bit for each bucket that may have members.
    filled: Box<[u64]>,
    buckets: u64,
    /// The score of the lowest bucket; the bucket of score `s` is `s % buckets`.
    base: u64,
    token: u64,
}

impl Lfu {
    pub(super) fn new(buffers: &mut Buffers, groups: u32, slots: u32, half_life: u32) -> Self {
        let frequency = Frequency::new(buffers, groups, half_life);
        let buckets = (DEPTH + frequency.headroom() + 1).next_multiple_of(64);
        Lfu {
            frequency,
            lists: Lists::new(buffers, slots, buckets as u32 + 1),
            group_in: buffers.filled(slots as usize, GroupId(0)).into(),
            held_by: buffers.zeros(slots as usize).into(),
            filled: buffers.zeros(buckets as usize / 64).into(),
            buckets,
            base: 0,
            token: 0,
        }
    }

    fn held(&self) -> u32 {
        self.buckets as u32
    }

    /// The score of a slot's group, as far as it is told apart.
    fn score(&self, slot: SlotId) -> u64 {
        self.frequency.score(self.group_in[slot.index()]).clamp(self.base, self.base + self.buckets - 1)
    }

    fn file(&mut self, slot: SlotId) {
        let bucket = self.score(slot) % self.buckets;
        self.lists.push_front(bucket as u32, slot);
        self.filled[bucket as usize / 64] |= 1 << (bucket % 64);
    }

    /// Makes `base` the lowest score that is told apart.
    fn raise(&mut self, base: u64) {
        // After a full turn every bucket has been poured; a jump further than that has nothing more to do.
        for score in self.base..base.min(self.base + self.buckets) {
            let (from, to) = (score % self.buckets, (score + 1) % self.buckets);
            if self.filled[from as usize / 64] >> (from % 64) & 1 == 1 {
                self.lists.append(from as u32, to as u32);
                self.filled[from as usize / 64] &= !(1 << (from % 64));
                self.filled[to as usize / 64] |= 1 << (to % 64);
            }
        }
        if base > self.base + self.buckets {
            // All are in one bucket, that of score `self.base + self.buckets`; it becomes the bucket of `base`.
            let (from, to) = (self.base % self.buckets, base % self.buckets);
            if from != to {
                self.lists.append(from as u32, to as u32);
                self.filled[from as usize / 64] &= !(1 << (from % 64));
                self.filled[to as usize / 64] |= 1 << (to % 64);
            }
        }
        self.base = self.base.max(base);
    }

    /// The lowest bucket with members, and its score.
    fn lowest(&mut self) -> Option<(u32, u64)> {
        let start = self.base % self.buckets;
        let words = self.filled.len();
        // The first word twice: its upper bits are the lowest scores, its lower bits the highest.
        for step in 0..=words {
            let word = (start as usize / 64 + step) % words;
            let mut bits = self.filled[word];
            if step == 0 {
                bits &= !0 << (start % 64);
            }
            while bits != 0 {
                let bucket = word as u64 * 64 + bits.trailing_zeros() as u64;
                if !self.lists.is_empty(bucket as u32) {
                    let above = (bucket + self.buckets - start) % self.buckets;
                    return Some((bucket as u32, self.base + above));
                }
                // Its members left one by one without telling.
                self.filled[word] &= !(1 << (bucket % 64));
                bits &= bits - 1;
            }
        }
        None
    }
}

impl Policy for Lfu {
    fn begin(&mut self, token: u64) {
        self.token = token;
        let one = self.frequency.score_of_one(token);
        self.raise(one.saturating_sub(DEPTH));
        while let Some(slot) = self.lists.pop_back(self.held()) {
            self.file(slot);
        }
    }

    fn used(&mut self, slot: SlotId, group: GroupId) {
        self.frequency.count(group, self.token);
        self.hold(slot);
    }

    fn missed(&mut self, group: GroupId) {
        self.frequency.count(group, self.token);
    }

    fn hold(&mut self, slot: SlotId) {
        self.held_by[slot.index()] = self.token;
    }

    fn victim(&mut self, group: GroupId) -> Option<SlotId> {
        let newcomer = self.frequency.score_when_used(group, self.token);
        loop {
            let (bucket, score) = self.lowest()?;
            if newcomer < score {
                return None;
            }
            let slot = self.lists.pop_back(bucket)?;
            if self.held_by[slot.index()] == self.token {
                let held = self.held();
                self.lists.push_front(held, slot);
            } else if self.score(slot) > score {
                self.file(slot);
            } else {
                return Some(slot);
            }
        }
    }

    fn placed(&mut self, slot: SlotId, group: GroupId) {
        self.group_in[slot.index()] = group;
        self.hold(slot);
        self.file(slot);
    }

    fn removed(&mut self, slot: SlotId) {
        self.lists.unlink(slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_frequent_goes_and_a_rare_newcomer_stays_out() {
        let mut lfu = Lfu::new(&mut Buffers::default(), 10, 3, 100);
        for token in 1..=10 {
            lfu.begin(token);
            for slot in (0..3).map(SlotId) {
                let group = GroupId(slot.0);
                // Group 0 at every token, 1 at every second, 2 at every fifth.
                if token % [1, 2, 5][slot.index()] == 0 || token == 1 {
                    if token == 1 {
                        lfu.missed(group);
                        lfu.placed(slot, group);
                    } else {
                        lfu.used(slot, group);
                    }
                }
            }
        }
        lfu.begin(11);
        lfu.missed(GroupId(7));
        assert_eq!(lfu.victim(GroupId(7)), None, "used once");
        for token in 12..20 {
            lfu.begin(token);
            lfu.missed(GroupId(7));
        }
        assert_eq!(lfu.victim(GroupId(7)), Some(SlotId(2)));
    }

    #[test]
    fn idle_times_of_any_length_lose_no_slot() {
        for pause in [1, 10, 63, 64, 65, 1000, 1_000_000] {
            let mut lfu = Lfu::new(&mut Buffers::default(), 8, 8, 1);
            let mut token = 0;
            for number in 0..8 {
                token += pause;
                lfu.begin(token);
                lfu.missed(GroupId(number));
                lfu.placed(SlotId(number), GroupId(number));
            }
            lfu.begin(token + pause);
            let mut victims: Vec<_> = std::iter::from_fn(|| {
                lfu.frequency.count(GroupId(0), token + pause);
                lfu.victim(GroupId(0))
            })
            .collect();
            victims.sort_unstable();
            assert_eq!(victims, (0..8).map(SlotId).collect::<Vec<_>>(), "pause {pause}");
        }
    }
}
