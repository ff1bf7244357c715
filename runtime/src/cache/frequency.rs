//! How often each group was used, with older uses decaying.
//!
//! A layer has few groups, so every group has a counter of its own, cached or not: there is no need for a sketch.

use flashlm_formats::ids::GroupId;

use crate::buffers::Buffers;

/// Sub-steps of a factor of two in a [`Frequency::score`].
const STEPS: u32 = 8;
/// Uses older than this many half-lives do not count.
const HALF_LIVES: u32 = 16;

/// Exponentially fading use counts of the groups of a layer.
#[derive(Debug)]
pub(super) struct Frequency {
    /// Faded count at the last use.
    count: Box<[f32]>,
    /// Token of the last use.
    last: Box<[u32]>,
    /// What is left of a count after this many tokens.
    fading: Box<[f32]>,
    half_life: u32,
}

impl Frequency {
    pub(super) fn new(buffers: &mut Buffers, groups: u32, half_life: u32) -> Self {
        let half_life = half_life.clamp(1, 1 << 16);
        let step = (-std::f64::consts::LN_2 / half_life as f64).exp();
        let fading = std::iter::successors(Some(1.0f64), |left| Some(left * step));
        Frequency {
            count: buffers.zeros(groups as usize).into(),
            last: buffers.zeros(groups as usize).into(),
            fading: buffers.listed((half_life * HALF_LIVES) as usize, fading.map(|left| left as f32)).into(),
            half_life,
        }
    }

    /// Counts a use.
    pub(super) fn count(&mut self, group: GroupId, token: u64) {
        self.count[group.index()] = self.faded(group, token) + 1.0;
        self.last[group.index()] = token as u32;
    }

    fn faded(&self, group: GroupId, token: u64) -> f32 {
        let age = (token as u32).wrapping_sub(self.last[group.index()]) as usize;
        self.count[group.index()] * self.fading.get(age).copied().unwrap_or(0.0)
    }

    /// The logarithm of the count, in eighths of a factor of two, on a scale that fades by itself: a group that is not used
    /// keeps its score, and a use is worth the more the later it comes. So scores of different ages compare directly.
    pub(super) fn score(&self, group: GroupId) -> u64 {
        let (count, last) = (self.count[group.index()], self.last[group.index()]);
        if count == 0.0 { 0 } else { self.score_of_one(last as u64) + log_steps(count) }
    }

    /// The score that the group has once it is used at this token, or has already.
    pub(super) fn score_when_used(&self, group: GroupId, token: u64) -> u64 {
        if self.last[group.index()] == token as u32 {
            return self.score(group);
        }
        self.score_of_one(token) + log_steps(self.faded(group, token) + 1.0)
    }

    /// Greatest amount by which a score can exceed that of a group used once at this moment.
    pub(super) fn headroom(&self) -> u64 {
        // Used at every token, a count tends to half_life / ln 2 + 1/2 or so.
        STEPS as u64 * (self.half_life.ilog2() as u64 + 3)
    }

    /// The score of a group used once, at this token.
    pub(super) fn score_of_one(&self, token: u64) -> u64 {
        token * STEPS as u64 / self.half_life as u64
    }
}

/// Exponent and top bits of the fraction: a logarithm that is linear within each octave, exact at powers of two.
fn log_steps(count: f32) -> u64 {
    ((count.to_bits() >> (23 - STEPS.ilog2())) - 127 * STEPS) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequent_beats_recent_until_it_fades() {
        let mut f = Frequency::new(&mut Buffers::default(), 2, 10);
        for token in 1..=8 {
            f.count(GroupId(0), token);
        }
        f.count(GroupId(1), 9);
        assert!(f.score(GroupId(0)) > f.score(GroupId(1)));
        f.count(GroupId(1), 60);
        assert!(
            f.score(GroupId(0)) < f.score(GroupId(1)),
            "five half-lives later one use is worth more than eight old ones"
        );
    }

    #[test]
    fn a_score_stays_within_its_headroom() {
        for half_life in [1, 2, 7, 64, 1000] {
            let mut f = Frequency::new(&mut Buffers::default(), 1, half_life);
            for token in 1..=20 * half_life as u64 {
                f.count(GroupId(0), token);
                let one = f.score_of_one(token);
                assert!(
                    f.score(GroupId(0)) >= one && f.score(GroupId(0)) <= one + f.headroom(),
                    "half-life {half_life}, token {token}"
                );
            }
        }
    }
}
