//! Replays recorded token sequences through cache and planner: what the flash path would have read.
//!
//! [`WantedSets`] holds which neurons or groups each token wants in one layer. [`replay`] runs those of groups through a
//! [`LayerCache`] and a [`Planner`] exactly as decoding does and counts; [`replay_optimal`] does the same with Belady's
//! optimum, which knows the future, to say how far a policy is from the best there can be. [`benefit_curve`] samples hits
//! against slots for [`divide_slots`](crate::cache::divide_slots).
//!
//! Knows nothing of disks: time comes from a [`ReadCost`].

mod optimal;
mod wanted;

pub use wanted::WantedSets;

use flashlm_formats::ids::GroupId;

use crate::cache::{BenefitCurve, LayerCache, PolicyKind};
use crate::disk_cost::ReadCost;
use crate::planner::{PlanLimits, Planner, ReadRequest};

/// How to replay.
#[derive(Clone, Copy, Debug)]
pub struct ReplayOptions {
    /// Which policy keeps the cache.
    pub policy: PolicyKind,
    /// Slots of the layer's cache.
    pub slots: u32,
    /// What plans respect.
    pub limits: PlanLimits,
    /// Tokens at the beginning that fill the cache and are not counted.
    pub warm_up: usize,
}

/// What was read, summed over the counted tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReplayCounts {
    /// Counted tokens.
    pub tokens: u64,
    /// Wanted groups.
    pub wanted: u64,
    /// Wanted groups that were not cached.
    pub missed: u64,
    /// Requests.
    pub reads: u64,
    /// Groups read, those of gaps included.
    pub groups_read: u64,
    /// Maximal runs of adjacent missed groups: the requests there would be without gaps read through and without a cap.
    pub runs: u64,
    /// Bytes read, those of gaps included.
    pub bytes: u64,
}

impl ReplayCounts {
    /// Share of the wanted groups that were cached; 1 where nothing was wanted.
    pub fn hit_rate(&self) -> f64 {
        if self.wanted == 0 { 1.0 } else { ratio(self.wanted - self.missed, self.wanted) }
    }

    /// Missed groups in a maximal run of adjacent ones, on average; 0 where nothing was missed.
    pub fn mean_run_groups(&self) -> f64 {
        ratio(self.missed, self.runs)
    }

    /// Groups in a request, those of gaps included, on average.
    pub fn mean_read_groups(&self) -> f64 {
        ratio(self.groups_read, self.reads)
    }

    /// Requests per token.
    pub fn reads_per_token(&self) -> f64 {
        ratio(self.reads, self.tokens)
    }

    /// Bytes read per token.
    pub fn bytes_per_token(&self) -> f64 {
        ratio(self.bytes, self.tokens)
    }

    /// Predicted time spent reading, in milliseconds per token.
    pub fn ms_per_token(&self, cost: &ReadCost) -> f64 {
        cost.nanoseconds(self.reads, self.bytes) / 1e6 / self.tokens.max(1) as f64
    }

    fn count(&mut self, wanted: usize, missing: &[GroupId], requests: &[ReadRequest], group_bytes: u64) {
        let groups: u64 = requests.iter().map(|r| r.groups as u64).sum();
        self.tokens += 1;
        self.wanted += wanted as u64;
        self.missed += missing.len() as u64;
        self.reads += requests.len() as u64;
        self.groups_read += groups;
        self.runs += missing.chunk_by(|a, b| a.after(1) == *b).count() as u64;
        self.bytes += groups * group_bytes;
    }
}

impl std::ops::AddAssign for ReplayCounts {
    /// Sums layers: `tokens` stays, as each layer sees the same tokens.
    fn add_assign(&mut self, other: Self) {
        self.tokens = self.tokens.max(other.tokens);
        self.wanted += other.wanted;
        self.missed += other.missed;
        self.reads += other.reads;
        self.groups_read += other.groups_read;
        self.runs += other.runs;
        self.bytes += other.bytes;
    }
}

fn ratio(a: u64, b: u64) -> f64 {
    if b == 0 { 0.0 } else { a as f64 / b as f64 }
}

/// Replays one layer.
pub fn replay(sets: &WantedSets<GroupId>, options: &ReplayOptions) -> ReplayCounts {
    replay_with(sets, options, |_, _| {})
}

/// Replays one layer and shows the missed groups of every token, warm-up included: `each(token, missed)`.
pub fn replay_with(
    sets: &WantedSets<GroupId>,
    options: &ReplayOptions,
    mut each: impl FnMut(usize, &[GroupId]),
) -> ReplayCounts {
    let mut cache = LayerCache::new(sets.layer_size(), options.slots, options.policy);
    let mut planner = Planner::new(options.limits, sets.layer_size());
    let (mut hits, mut missing, mut requests) = (Vec::new(), Vec::new(), Vec::new());
    let mut counts = ReplayCounts::default();
    for (token, wanted) in sets.iter().enumerate() {
        cache.begin();
        cache.lookup_all(wanted, &mut hits, &mut missing);
        for &group in &missing {
            cache.admit(group);
        }
        each(token, &missing);
        if token >= options.warm_up {
            planner.plan(&missing, &mut requests);
            counts.count(wanted.len(), &missing, &requests, planner.limits().group_bytes);
        }
    }
    counts
}

/// Replays one layer with Belady's optimum in place of the policy: of what is cached and what was just read, those
/// stay that are wanted again soonest. No policy misses less; the reads are those of the planner.
pub fn replay_optimal(sets: &WantedSets<GroupId>, options: &ReplayOptions) -> ReplayCounts {
    let mut planner = Planner::new(options.limits, sets.layer_size());
    let mut requests = Vec::new();
    let mut counts = ReplayCounts::default();
    optimal::for_each_miss(sets, options.slots, |token, missing| {
        if token >= options.warm_up {
            planner.plan(missing, &mut requests);
            counts.count(sets.token(token).len(), missing, &requests, planner.limits().group_bytes);
        }
    });
    counts
}

/// Samples how many groups per token a cache of the given sizes saves from being read.
///
/// `options.slots` is ignored; the sizes that count are `sizes`, and the number of groups is always among them.
pub fn benefit_curve(sets: &WantedSets<GroupId>, options: &ReplayOptions, sizes: &[u32]) -> BenefitCurve {
    let sizes = sizes.iter().copied().filter(|&s| s < sets.layer_size()).chain([sets.layer_size()]);
    BenefitCurve::new(sizes.map(|slots| {
        let counts = replay(sets, &ReplayOptions { slots, ..*options });
        (slots, ratio(counts.wanted - counts.missed, counts.tokens))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::divide_slots;
    use proptest::prelude::*;

    fn sets(tokens: &[&[u32]]) -> WantedSets<GroupId> {
        let mut sets = WantedSets::new(100);
        tokens.iter().for_each(|t| sets.push(t.iter().copied().map(GroupId)));
        sets
    }

    fn options(policy: PolicyKind, slots: u32) -> ReplayOptions {
        ReplayOptions { policy, slots, limits: PlanLimits::adjacent_only(10), warm_up: 0 }
    }

    #[test]
    fn counts_are_those_of_a_small_example() {
        let sets = sets(&[&[1, 2, 5], &[1, 2, 3, 4, 9], &[], &[3, 5]]);
        let counts = replay(&sets, &options(PolicyKind::Window(1), 100));
        let expected = ReplayCounts { tokens: 4, wanted: 10, missed: 8, reads: 6, groups_read: 8, runs: 6, bytes: 80 };
        assert_eq!(counts, expected);
        assert_eq!(counts.hit_rate(), 0.2);
        let gaps = PlanLimits { group_bytes: 10, gap_bytes_max: 40, request_bytes_max: 1000 };
        let counts = replay(&sets, &ReplayOptions { limits: gaps, warm_up: 1, ..options(PolicyKind::Window(1), 100) });
        // {3, 4, 9} and {3, 5}: one read each.
        let expected = ReplayCounts { tokens: 3, wanted: 7, missed: 5, reads: 2, groups_read: 10, runs: 4, bytes: 100 };
        assert_eq!(counts, expected);
    }

    proptest! {
        #[test]
        fn no_policy_beats_the_optimum(
            tokens in proptest::collection::vec(proptest::collection::btree_set(prop_oneof![0u32..8, 0u32..40], 0..12), 1..60),
            slots in 0u32..45,
        ) {
            let mut sets = WantedSets::new(40);
            tokens.into_iter().for_each(|t| sets.push(t.into_iter().map(GroupId)));
            let best = replay_optimal(&sets, &options(PolicyKind::Lru, slots));
            for policy in PolicyKind::ALL {
                let counts = replay(&sets, &options(policy, slots));
                prop_assert!(best.missed <= counts.missed, "{policy}: {} missed, {} at best", counts.missed, best.missed);
                prop_assert_eq!(best.wanted, counts.wanted);
            }
        }
    }

    #[test]
    fn slots_go_where_they_save_most() {
        // One layer uses the same ten groups in turn, the other wanders over all hundred.
        let mut narrow = WantedSets::new(100);
        let mut wide = WantedSets::new(100);
        for token in 0..500u32 {
            narrow.push([GroupId(token % 10)]);
            wide.push([GroupId(token * 37 % 100)]);
        }
        let o = options(PolicyKind::Lru, 0);
        let curves = [&wide, &narrow].map(|s| benefit_curve(s, &o, &[5, 10, 20, 50]));
        assert_eq!(divide_slots(&curves, 30), [20, 10]);
    }
}
