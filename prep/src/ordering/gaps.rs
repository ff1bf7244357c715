//! The objective with gaps read through: exact on a sample of tokens.
//!
//! Two groups missing at a token, with `d` others between them that are not, cost one request less and `d` groups more when
//! they are read together. So a cut between two groups is worth, over all tokens, the number of times that the nearest missing
//! groups left and right of it are `d` apart, times what that saves; pair counts cannot say it, as it matters what lies between.

use flashlm::planner::PlanLimits;
use flashlm::replay::WantedSets;
use flashlm_formats::ids::GroupId;

use super::local_search::Objective;
use crate::coactivation::Postings;

/// Longest gap that is looked at, in groups: beyond it little is saved.
const GAP_MAX: usize = 8;

pub(super) struct GapSavings {
    /// For each group the tokens of the sample at which it is missing.
    missing: Postings,
    /// Bytes saved by reading through a gap of 0, 1, .. groups.
    savings: Vec<i64>,
    /// For each token the cut last looked at and how far left of it the nearest missing group is.
    nearest: Vec<(u32, u32)>,
    cut: u32,
    work: u64,
}

impl GapSavings {
    /// `missing` says what each token is missing; at most `tokens_max` of them are taken, evenly spread.
    pub(super) fn new(missing: &WantedSets<GroupId>, limits: &PlanLimits, tokens_max: usize) -> Self {
        let step = missing.tokens().div_ceil(tokens_max.max(1)).max(1);
        // Where requests cost nothing, neighbours are still better.
        let request = limits.gap_bytes_max.max(1) as i64;
        let savings = (0..=GAP_MAX as i64).map(|gap| request - gap * limits.group_bytes as i64).take_while(|&s| s > 0);
        GapSavings {
            missing: Postings::new(missing, step),
            savings: savings.collect(),
            nearest: vec![(0, 0); missing.tokens()],
            cut: 0,
            work: 0,
        }
    }
}

impl Objective for GapSavings {
    fn reach(&self) -> usize {
        self.savings.len()
    }

    fn work(&self) -> u64 {
        self.work
    }

    fn across(&mut self, left: &[u32], right: &[u32]) -> i64 {
        if self.cut == u32::MAX {
            self.nearest.fill((0, 0));
            self.cut = 0;
        }
        self.cut += 1;
        for (at, &group) in left.iter().enumerate() {
            let tokens = self.missing.of(group as usize);
            self.work += tokens.len() as u64;
            for &token in tokens {
                let nearest = &mut self.nearest[token as usize];
                if nearest.0 != self.cut {
                    *nearest = (self.cut, at as u32);
                }
            }
        }
        let mut saved = 0;
        for (at, &group) in right.iter().enumerate() {
            let tokens = self.missing.of(group as usize);
            self.work += tokens.len() as u64;
            for &token in tokens {
                let nearest = &mut self.nearest[token as usize];
                if nearest.0 == self.cut {
                    saved += self.savings.get(at + nearest.1 as usize).copied().unwrap_or(0);
                    // The token's nearest pair is found.
                    nearest.0 = 0;
                }
            }
        }
        saved
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flashlm::cache::PolicyKind;
    use flashlm::replay::{ReplayOptions, replay};
    use flashlm_formats::ids::NeuronId;
    use proptest::prelude::*;

    use crate::ordering::local_search::LocalSearch;

    proptest! {
        /// What the search gains is what the planner then saves, byte for byte.
        #[test]
        fn gains_are_those_of_the_planner(
            tokens in proptest::collection::vec(proptest::collection::btree_set(0u32..16, 0..8), 1..100), gap in 0u64..50,
        ) {
            let mut sets = WantedSets::new(16);
            tokens.into_iter().for_each(|t| sets.push(t.into_iter().map(NeuronId)));
            let limits = PlanLimits { group_bytes: 10, gap_bytes_max: gap, request_bytes_max: u64::MAX };
            let cost = |sets: &WantedSets<GroupId>| {
                let options = ReplayOptions { policy: PolicyKind::Lru, slots: 0, limits, warm_up: 0 };
                let counts = replay(sets, &options);
                (counts.reads * gap.max(1) + counts.bytes) as i64
            };
            let savings = GapSavings::new(&sets.alone(), &limits, 1000);
            let candidates: Vec<Vec<u32>> = (0..16).map(|n| (0..16).filter(|&m| m != n).collect()).collect();
            let (path, gain) = LocalSearch::new((0..16).collect(), &candidates, savings).run(u64::MAX);
            let order: Vec<NeuronId> = path.into_iter().map(NeuronId).collect();
            prop_assert_eq!(cost(&sets.alone()) - cost(&sets.stored(&crate::ordering::positions(&order), 1)), gain);
        }
    }
}
