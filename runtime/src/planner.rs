//! From the groups that are missing to the reads that fetch them.
//!
//! A request costs a fixed time and each byte costs more, so neighbours are read together, and a small gap between two
//! missing groups is read through when its bytes cost less than another request would. [`ReadCost`] is that linear
//! cost, fitted to a disk's measured profile; [`Planner`] finds, for sorted missing groups, the requests of least total
//! cost under a cap on the size of one request.
//!
//! Knows group numbers and bytes only: nothing of files, offsets or buffers. Allocates nothing after construction.

use std::collections::VecDeque;
use std::ops::Range;

use flashlm_formats::ids::GroupId;

use crate::disk_cost::ReadCost;

/// How reads are planned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ReadPlan {
    /// So that they take the least time on a disk of this cost.
    Cost(ReadCost),
    /// The same, starting from this cost and following what reads are seen to take.
    Observed(ReadCost),
    /// The published baseline: one read for each group, about what the checkpoint's own order of neurons would give.
    Groups,
    /// The published baseline: two reads for each group, up and down apart, as without bundling.
    Halves,
}

/// What a plan must respect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanLimits {
    /// Bytes of one group in the flash section.
    pub group_bytes: u64,
    /// The longest gap worth reading through ([`ReadCost::gap_bytes_max`]); it is also what a request costs, in bytes.
    pub gap_bytes_max: u64,
    /// The largest request. A group is never split: where the cap is less than one group, each is read alone.
    pub request_bytes_max: u64,
}

impl PlanLimits {
    /// The limits for a disk of this cost.
    pub fn for_cost(cost: &ReadCost, group_bytes: u64, request_bytes_max: u64) -> Self {
        PlanLimits { group_bytes, gap_bytes_max: cost.gap_bytes_max(), request_bytes_max }
    }

    /// Each group is read alone.
    pub fn alone(group_bytes: u64) -> Self {
        PlanLimits { group_bytes, gap_bytes_max: 0, request_bytes_max: 1 }
    }

    /// Adjacent groups are merged without bound, gaps are never read.
    pub fn adjacent_only(group_bytes: u64) -> Self {
        PlanLimits { group_bytes, gap_bytes_max: 0, request_bytes_max: u64::MAX }
    }
}

/// One read: `groups` groups from `first` on. It begins and ends with a group that is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadRequest {
    /// First group.
    pub first: GroupId,
    /// Number of groups, those of gaps included; at least 1.
    pub groups: u32,
}

impl ReadRequest {
    /// The groups that the request reads.
    pub fn range(&self) -> Range<GroupId> {
        self.first..self.first.after(self.groups)
    }
}

/// Makes plans, with the scratch space for it.
#[derive(Clone, Debug)]
pub struct Planner {
    limits: PlanLimits,
    /// Most groups in one request, and in one gap.
    request_groups_max: u64,
    gap_groups_max: u64,
    /// Scratch for a run longer than a request may be.
    best: Vec<Cost>,
    cut: Vec<u32>,
    window: VecDeque<u32>,
}

/// Bytes (with requests counted as bytes) first, number of requests second. Signed, as differences stand in between.
type Cost = (i128, u32);

impl Planner {
    /// A planner for layers of at most `groups` groups.
    pub fn new(limits: PlanLimits, groups: u32) -> Self {
        let group_bytes = limits.group_bytes.max(1);
        Planner {
            limits: PlanLimits { group_bytes, ..limits },
            request_groups_max: (limits.request_bytes_max / group_bytes).max(1),
            gap_groups_max: limits.gap_bytes_max / group_bytes,
            best: Vec::with_capacity(groups as usize + 1),
            cut: Vec::with_capacity(groups as usize + 1),
            window: VecDeque::with_capacity(groups as usize + 1),
        }
    }

    /// Sets the longest gap worth reading through.
    pub fn set_gap_bytes_max(&mut self, bytes: u64) {
        self.limits.gap_bytes_max = bytes;
        self.gap_groups_max = bytes / self.limits.group_bytes;
    }

    /// The limits that plans respect.
    pub fn limits(&self) -> PlanLimits {
        self.limits
    }

    /// Replaces `requests` with the reads that fetch the groups of `missing` (ascending, each once) at the least cost.
    ///
    /// Cost is `gap_bytes_max` for each request plus the bytes; of plans that cost the same, one with the fewest requests
    /// is taken. Groups that are cached or unwanted simply are not in `missing`; they may be read as part of a gap.
    pub fn plan(&mut self, missing: &[GroupId], requests: &mut Vec<ReadRequest>) {
        debug_assert!(missing.is_sorted_by(|a, b| a < b), "missing groups must ascend");
        requests.clear();
        let mut start = 0;
        for at in 1..=missing.len() {
            // A gap (the span without its two ends) longer than the limit separates whatever the cap does, no shorter one does.
            if at < missing.len() && span(&missing[at - 1..=at]) - 2 <= self.gap_groups_max {
                continue;
            }
            let run = &missing[start..at];
            if span(run) <= self.request_groups_max {
                requests.push(ReadRequest { first: run[0], groups: span(run) as u32 });
            } else {
                self.split(run, requests);
            }
            start = at;
        }
    }

    /// Cuts a run that is too long for one request where that is cheapest: the shortest path over cut points, with a
    /// sliding minimum, so in time linear in the run.
    fn split(&mut self, run: &[GroupId], requests: &mut Vec<ReadRequest>) {
        let bytes = |group: GroupId| i128::from(group.0) * self.limits.group_bytes as i128;
        let request = self.limits.gap_bytes_max as i128;
        // best[j]: least cost of the first j groups. A request from i to j - 1 adds request + bytes(run[j - 1] + 1) -
        // bytes(run[i]), so the best i is the one of least best[i] - bytes(run[i]) that the cap still allows.
        self.best.clear();
        self.cut.clear();
        self.window.clear();
        self.best.push((0, 0));
        self.cut.push(0);
        let open = |best: &[Cost], i: u32| (best[i as usize].0 - bytes(run[i as usize]), best[i as usize].1);
        for j in 1..=run.len() {
            let new = open(&self.best, j as u32 - 1);
            while self.window.back().is_some_and(|&i| open(&self.best, i) > new) {
                self.window.pop_back();
            }
            self.window.push_back(j as u32 - 1);
            while span(&run[self.window[0] as usize..j]) > self.request_groups_max {
                self.window.pop_front();
            }
            let i = self.window[0];
            let from = open(&self.best, i);
            self.best.push((from.0 + request + bytes(run[j - 1]) + self.limits.group_bytes as i128, from.1 + 1));
            self.cut.push(i);
        }
        let mark = requests.len();
        let mut end = run.len();
        while end > 0 {
            let start = self.cut[end] as usize;
            requests.push(ReadRequest { first: run[start], groups: span(&run[start..end]) as u32 });
            end = start;
        }
        requests[mark..].reverse();
    }
}

/// Groups from the first to the last of an ascending, non-empty run.
fn span(run: &[GroupId]) -> u64 {
    u64::from(run[run.len() - 1].0 - run[0].0) + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk_cost::DRAM_BYTE_NS;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn limits(group_bytes: u64, gap_bytes_max: u64, request_bytes_max: u64) -> PlanLimits {
        PlanLimits { group_bytes, gap_bytes_max, request_bytes_max }
    }

    fn plan(limits: PlanLimits, missing: &[GroupId]) -> Vec<ReadRequest> {
        let mut requests = Vec::new();
        Planner::new(limits, 1 << 16).plan(missing, &mut requests);
        requests
    }

    fn pairs(requests: &[ReadRequest]) -> Vec<(u32, u32)> {
        requests.iter().map(|r| (r.first.0, r.groups)).collect()
    }

    #[test]
    fn neighbours_gaps_and_cap() {
        let table: &[(u64, u64, &[u32], &[(u32, u32)])] = &[
            (0, 100, &[], &[]),
            (0, 100, &[7], &[(7, 1)]),
            (0, 100, &[1, 2, 3, 5], &[(1, 3), (5, 1)]),
            (10, 100, &[1, 2, 3, 5], &[(1, 5)]),
            (10, 100, &[1, 2, 3, 6], &[(1, 3), (6, 1)]),
            (20, 100, &[1, 2, 3, 6], &[(1, 6)]),
            // The cap cuts at the gap rather than where it first binds.
            (10, 40, &[1, 2, 4, 5], &[(1, 2), (4, 2)]),
            (10, 40, &[0, 1, 2, 3, 4, 5, 6, 7], &[(0, 4), (4, 4)]),
            (0, 5, &[3, 4], &[(3, 1), (4, 1)]),
            (0, u64::MAX, &[0, u32::MAX], &[(0, 1), (u32::MAX, 1)]),
        ];
        for (row, &(gap, cap, missing, expected)) in table.iter().enumerate() {
            let missing: Vec<GroupId> = missing.iter().copied().map(GroupId).collect();
            assert_eq!(pairs(&plan(limits(10, gap, cap), &missing)), expected, "row {row}");
        }
    }

    /// Cost of the best of all ways to cut `missing`, in bytes with requests counted as bytes, then requests.
    fn brute_force(limits: PlanLimits, missing: &[GroupId]) -> (u64, u32) {
        let mut best = (u64::MAX, u32::MAX);
        for cuts in 0u32..1 << (missing.len() - 1) {
            let (mut cost, mut start, mut allowed) = ((0, 0), 0, true);
            for end in 1..=missing.len() {
                if end == missing.len() || cuts >> (end - 1) & 1 == 1 {
                    let bytes = span(&missing[start..end]) * limits.group_bytes;
                    allowed &= bytes <= limits.request_bytes_max || end - start == 1;
                    cost = (cost.0 + limits.gap_bytes_max + bytes, cost.1 + 1);
                    start = end;
                }
            }
            if allowed && cost < best {
                best = cost;
            }
        }
        best
    }

    proptest! {
        #[test]
        fn plans_cover_do_not_overlap_and_keep_the_cap(
            set in proptest::collection::btree_set(0u32..400, 0..200), gap in 0u64..60, cap in 1u64..300, group_bytes in 1u64..12,
        ) {
            let set: BTreeSet<GroupId> = set.into_iter().map(GroupId).collect();
            let missing: Vec<GroupId> = set.iter().copied().collect();
            let requests = plan(limits(group_bytes, gap, cap), &missing);
            let mut next = GroupId(0);
            let mut covered = 0;
            for r in &requests {
                prop_assert!(r.groups >= 1 && r.first >= next, "overlap or disorder at {r:?}");
                prop_assert!(r.groups as u64 * group_bytes <= cap || r.groups == 1, "{r:?} above {cap} bytes");
                prop_assert!(set.contains(&r.first) && set.contains(&r.first.after(r.groups - 1)), "{r:?} has loose ends");
                covered += set.range(r.range()).count();
                next = r.range().end;
            }
            prop_assert_eq!(covered, missing.len());
        }

        #[test]
        fn plans_are_optimal(
            set in proptest::collection::btree_set(0u32..40, 1..13), gap in 0u64..60, cap in 1u64..200, group_bytes in 1u64..12,
        ) {
            let missing: Vec<GroupId> = set.into_iter().map(GroupId).collect();
            let l = limits(group_bytes, gap, cap);
            let requests = plan(l, &missing);
            let bytes: u64 = requests.iter().map(|r| r.groups as u64 * group_bytes).sum();
            let cost = (requests.len() as u64 * gap + bytes, requests.len() as u32);
            prop_assert_eq!(cost, brute_force(l, &missing));
        }

        #[test]
        fn the_gap_rule_follows_from_the_linear_cost(request in 0.0f64..1e5, byte in 0.01f64..10.0, gap in 0u64..100_000) {
            let cost = ReadCost::new(request, byte).unwrap();
            let unwanted = DRAM_BYTE_NS * gap as f64;
            let (through, apart) = (cost.nanoseconds(1, 2 + gap) + unwanted, cost.nanoseconds(2, 2));
            // Away from the edge, where rounding decides.
            if (through - apart).abs() > 1e-6 * apart {
                prop_assert_eq!(gap <= cost.gap_bytes_max(), through < apart || (through - apart) < byte + DRAM_BYTE_NS && gap == cost.gap_bytes_max());
            }
        }
    }

    #[test]
    fn planning_again_allocates_nothing() {
        let mut planner = Planner::new(limits(4096, 8192, 16384), 1000);
        let mut requests = Vec::with_capacity(1000);
        let all: Vec<GroupId> = (0..1000).map(GroupId).collect();
        let before = (requests.as_ptr(), planner.best.as_ptr(), planner.cut.as_ptr(), planner.window.capacity());
        for step in 1..5 {
            planner.plan(&all.iter().copied().step_by(step).collect::<Vec<_>>(), &mut requests);
        }
        assert_eq!(before, (requests.as_ptr(), planner.best.as_ptr(), planner.cut.as_ptr(), planner.window.capacity()));
    }
}
