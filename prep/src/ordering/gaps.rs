//! The objective with gaps read through: exact on a sample of tokens, by sets of bits.
//!
//! Two groups missing at a token, with `d` others between them that are not, cost one request less and `d` groups more when
//! they are read together. So a cut between two groups is worth, over all tokens, the number of times that the nearest missing
//! groups left and right of it are `d` apart, times what that saves; pair counts cannot say it, as it matters what lies between.

use flashlm_runtime::planner::PlanLimits;
use flashlm_runtime::replay::WantedSets;

use super::local_search::Objective;

/// Longest gap that is looked at, in groups: beyond it little is saved.
const GAP_MAX: usize = 8;

pub(super) struct GapSavings {
    words: usize,
    /// For each group a bit for every token of the sample: is it missing?
    missing: Vec<u64>,
    /// Bytes saved by reading through a gap of 0, 1, .. groups.
    savings: Vec<i64>,
}

impl GapSavings {
    /// `missing` says what each token is missing; at most `tokens_max` of them are taken, evenly spread.
    pub(super) fn new(missing: &WantedSets, limits: &PlanLimits, tokens_max: usize) -> Self {
        let step = missing.tokens().div_ceil(tokens_max.max(1)).max(1);
        let words = missing.tokens().div_ceil(step).div_ceil(64).max(1);
        let mut bits = vec![0u64; words * missing.groups() as usize];
        for (at, token) in (0..missing.tokens()).step_by(step).enumerate() {
            for &group in missing.token(token) {
                bits[group as usize * words + at / 64] |= 1 << (at % 64);
            }
        }
        // Where requests cost nothing, neighbours are still better.
        let request = limits.gap_bytes_max.max(1) as i64;
        let savings = (0..=GAP_MAX as i64).map(|gap| request - gap * limits.group_bytes as i64).take_while(|&s| s > 0);
        GapSavings { words, missing: bits, savings: savings.collect() }
    }

    /// About how many words of bits one move of a local search touches.
    pub(super) fn words_per_evaluation(&self) -> u64 {
        // Two or three cuts, before and after.
        5 * self.words as u64 * self.savings.len() as u64
    }

    fn bits(&self, group: u32) -> &[u64] {
        &self.missing[group as usize * self.words..][..self.words]
    }
}

impl Objective for GapSavings {
    fn reach(&self) -> usize {
        self.savings.len()
    }

    fn across(&self, left: &[u32], right: &[u32]) -> i64 {
        let reach = self.savings.len();
        if reach == 1 {
            let both: u64 =
                self.bits(left[0]).iter().zip(self.bits(right[0])).map(|(a, b)| (a & b).count_ones() as u64).sum();
            return both as i64 * self.savings[0];
        }
        let mut counts = [0u64; GAP_MAX + 1];
        let mut nearest = [0u64; GAP_MAX + 1];
        // Rows of bits first, so that the words of one token chunk are found without arithmetic.
        let rows = |groups: &[u32]| -> [&[u64]; GAP_MAX + 1] {
            std::array::from_fn(|at| groups.get(at).map_or(&[][..], |&g| self.bits(g)))
        };
        let (left_rows, right_rows) = (rows(left), rows(right));
        for word in 0..self.words {
            let mut seen = 0;
            for (near, row) in nearest.iter_mut().zip(&left_rows[..left.len()]) {
                *near = row[word] & !seen;
                seen |= row[word];
            }
            // Tokens that still look for their nearest missing group on the right.
            let mut open = seen;
            for (b, row) in right_rows[..right.len()].iter().enumerate() {
                if open == 0 {
                    break;
                }
                let found = row[word] & open;
                open &= !row[word];
                if found != 0 {
                    for (a, &near) in nearest[..left.len().min(reach - b)].iter().enumerate() {
                        counts[a + b] += (near & found).count_ones() as u64;
                    }
                }
            }
        }
        counts.iter().zip(&self.savings).map(|(&c, s)| c as i64 * s).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flashlm_runtime::cache::PolicyKind;
    use flashlm_runtime::replay::{ReplayOptions, replay};
    use proptest::prelude::*;

    use crate::ordering::local_search::LocalSearch;

    proptest! {
        /// What the search gains is what the planner then saves, byte for byte.
        #[test]
        fn gains_are_those_of_the_planner(
            tokens in proptest::collection::vec(proptest::collection::btree_set(0u32..16, 0..8), 1..100), gap in 0u64..50,
        ) {
            let mut sets = WantedSets::new(16);
            tokens.into_iter().for_each(|t| sets.push(t));
            let limits = PlanLimits { group_bytes: 10, gap_bytes_max: gap, request_bytes_max: u64::MAX };
            let cost = |sets: &WantedSets| {
                let options = ReplayOptions { policy: PolicyKind::Lru, slots: 0, limits, warm_up: 0 };
                let counts = replay(sets, &options);
                (counts.reads * gap.max(1) + counts.bytes) as i64
            };
            let savings = GapSavings::new(&sets, &limits, 1000);
            let candidates: Vec<Vec<u32>> = (0..16).map(|n| (0..16).filter(|&m| m != n).collect()).collect();
            let (path, gain) = LocalSearch::new((0..16).collect(), &candidates, &savings).run(u64::MAX);
            prop_assert_eq!(cost(&sets) - cost(&sets.regrouped(&crate::ordering::positions(&path), 1)), gain);
        }
    }
}
