//! Improves a path by 2-opt and Or-opt moves: reverse a stretch, or move one elsewhere.
//!
//! The path is of numbers, those of neurons or of whole groups: called neurons here.
//!
//! Moves are tried from every neuron towards its strongest partners only, and only around neurons near which something
//! changed, so a pass takes time in the number of neurons. What a cut between two neighbours is worth is an
//! [`Objective`]'s affair.

/// What is saved by laying neurons side by side.
pub(super) trait Objective {
    /// How many neurons on each side of a cut matter.
    fn reach(&self) -> usize;

    /// What is saved across a cut between `left` and `right`, both nearest first, of up to `reach` neurons each.
    fn across(&mut self, left: &[u32], right: &[u32]) -> i64;

    /// Steps taken by [`across`](Self::across) so far: a clock that runs alike everywhere.
    fn work(&self) -> u64;
}

/// Longest stretch that is put elsewhere as a whole.
const SEGMENT_MAX: usize = 3;

pub(super) struct LocalSearch<'a, O> {
    objective: O,
    /// For every neuron those that it should be tried beside.
    candidates: &'a [Vec<u32>],
    path: Vec<u32>,
    position: Vec<u32>,
    /// Neurons to look at, each once.
    queue: std::collections::VecDeque<u32>,
    queued: Vec<bool>,
    scratch: Scratch,
}

/// Neurons on either side of a joint, nearest first.
#[derive(Default)]
struct Scratch {
    left: Vec<u32>,
    right: Vec<u32>,
}

/// A stretch of the path, both ends included, perhaps read backwards.
#[derive(Clone, Copy)]
struct Stretch {
    from: usize,
    to: usize,
    backwards: bool,
}

impl<'a, O: Objective> LocalSearch<'a, O> {
    pub(super) fn new(path: Vec<u32>, candidates: &'a [Vec<u32>], objective: O) -> Self {
        let position = super::places(path.iter().copied());
        let queue = path.iter().copied().collect();
        let queued = vec![true; path.len()];
        LocalSearch { objective, candidates, path, position, queue, queued, scratch: Scratch::default() }
    }

    /// Makes moves that gain until there are none, or the objective has worked for `work_max`. Returns the path and the total gain.
    pub(super) fn run(mut self, work_max: u64) -> (Vec<u32>, i64) {
        let mut gained = 0;
        while let Some(neuron) = self.queue.pop_front() {
            self.queued[neuron as usize] = false;
            while self.objective.work() < work_max {
                match self.improve_at(neuron) {
                    0 => break,
                    gain => gained += gain,
                }
            }
        }
        (self.path, gained)
    }

    /// Makes the first move that gains by bringing a candidate next to `neuron`; returns the gain.
    fn improve_at(&mut self, neuron: u32) -> i64 {
        let candidates = self.candidates;
        for &other in &candidates[neuron as usize] {
            let (a, c) = (self.position[neuron as usize] as usize, self.position[other as usize] as usize);
            if a.abs_diff(c) <= 1 {
                continue;
            }
            let (low, high) = (a.min(c), a.max(c));
            // Turn low + 1 ..= high round: low and high become neighbours. Or low ..= high - 1.
            for (from, to) in [(low + 1, high), (low, high - 1)] {
                let gain = self.turn_gain(from, to);
                if gain > 0 {
                    self.turn(from, to);
                    return gain;
                }
            }
            // Put a short stretch that ends in `neuron` beside `other`, on either side and either way round.
            for length in 1..=SEGMENT_MAX {
                for from in
                    [a.checked_sub(length - 1), Some(a)].into_iter().flatten().take(if length == 1 { 1 } else { 2 })
                {
                    let to = from + length - 1;
                    if to >= self.path.len() || (from..=to).contains(&c) {
                        continue;
                    }
                    // Before position `gap` of the path as it is.
                    for gap in [c, c + 1] {
                        if gap >= from && gap <= to + 1 {
                            continue;
                        }
                        // `neuron` must come to stand beside `other`.
                        let backwards = if gap == c + 1 { a != from } else { a != to };
                        let gain = self.move_gain(Stretch { from, to, backwards }, gap);
                        if gain > 0 {
                            self.shift(Stretch { from, to, backwards }, gap);
                            return gain;
                        }
                    }
                }
            }
        }
        0
    }

    fn turn_gain(&mut self, from: usize, to: usize) -> i64 {
        let end = self.path.len();
        let inside = Stretch { from, to, backwards: false };
        let turned = Stretch { backwards: true, ..inside };
        let before = Stretch { from: 0, to: from.wrapping_sub(1), backwards: false };
        let after = Stretch { from: to + 1, to: end - 1, backwards: false };
        let (before, after) = ((from > 0).then_some(before), (to + 1 < end).then_some(after));
        self.joined(&[before, Some(turned), after]) - self.joined(&[before, Some(inside), after])
    }

    fn move_gain(&mut self, s: Stretch, gap: usize) -> i64 {
        let end = self.path.len();
        let straight = Stretch { backwards: false, ..s };
        let piece = |from: usize, to: usize| (from < to).then(|| Stretch { from, to: to - 1, backwards: false });
        if gap < s.from {
            let (a, b, c) = (piece(0, gap), piece(gap, s.from), piece(s.to + 1, end));
            self.joined(&[a, Some(s), b, c]) - self.joined(&[a, b, Some(straight), c])
        } else {
            let (a, b, c) = (piece(0, s.from), piece(s.to + 1, gap), piece(gap, end));
            self.joined(&[a, b, Some(s), c]) - self.joined(&[a, Some(straight), b, c])
        }
    }

    /// What is saved across the joints of these stretches, laid one after another.
    ///
    /// For a stretch shorter than the reach, savings over its whole length are counted at its right joint only.
    fn joined(&mut self, stretches: &[Option<Stretch>]) -> i64 {
        let reach = self.objective.reach();
        let mut total = 0;
        for right_at in 1..stretches.len() {
            let Some(right) = stretches[right_at] else { continue };
            let Scratch { left: l, right: r } = &mut self.scratch;
            l.clear();
            for left in stretches[..right_at].iter().rev().flatten() {
                let most = (left.to - left.from + 1).min(reach - l.len());
                let path = &self.path;
                l.extend((0..most).map(|i| if left.backwards { path[left.from + i] } else { path[left.to - i] }));
                if l.len() == reach {
                    break;
                }
            }
            if l.is_empty() {
                continue;
            }
            let most = (right.to - right.from + 1).min(reach);
            r.clear();
            r.extend(
                (0..most).map(|i| if right.backwards { self.path[right.to - i] } else { self.path[right.from + i] }),
            );
            total += self.objective.across(l, r);
        }
        total
    }

    fn turn(&mut self, from: usize, to: usize) {
        self.path[from..=to].reverse();
        self.settle(from, to);
        self.wake(&[from, to + 1]);
    }

    fn shift(&mut self, s: Stretch, gap: usize) {
        let length = s.to - s.from + 1;
        if s.backwards {
            self.path[s.from..=s.to].reverse();
        }
        if gap < s.from {
            self.path[gap..=s.to].rotate_right(length);
            self.settle(gap, s.to);
            self.wake(&[gap, gap + length, s.to + 1]);
        } else {
            self.path[s.from..gap].rotate_left(length);
            self.settle(s.from, gap - 1);
            self.wake(&[s.from, gap - length, gap]);
        }
    }

    fn settle(&mut self, from: usize, to: usize) {
        for at in from..=to {
            self.position[self.path[at] as usize] = at as u32;
        }
    }

    /// Neurons within reach of a changed cut are looked at again.
    fn wake(&mut self, cuts: &[usize]) {
        let reach = self.objective.reach();
        for &cut in cuts {
            for at in cut.saturating_sub(reach)..(cut + reach).min(self.path.len()) {
                let neuron = self.path[at];
                if !std::mem::replace(&mut self.queued[neuron as usize], true) {
                    self.queue.push_back(neuron);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A pair of neurons at distance `d` saves `worth[d]` times a weight of the two, whatever lies between.
    #[derive(Clone)]
    struct Weights {
        neurons: usize,
        weight: Vec<i64>,
        worth: Vec<i64>,
    }

    impl Weights {
        fn new(neurons: usize, seed: u64) -> Self {
            let mut state = seed;
            let mut weight = vec![0; neurons * neurons];
            for a in 0..neurons {
                for b in 0..a {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    weight[a * neurons + b] = (state >> 58) as i64;
                    weight[b * neurons + a] = weight[a * neurons + b];
                }
            }
            Weights { neurons, weight, worth: vec![5, 3, 1] }
        }

        fn total(&self, path: &[u32]) -> i64 {
            let mut total = 0;
            for at in 1..path.len() {
                for d in 0..self.worth.len().min(at) {
                    total += self.worth[d] * self.weight[path[at] as usize * self.neurons + path[at - 1 - d] as usize];
                }
            }
            total
        }
    }

    impl Objective for Weights {
        fn reach(&self) -> usize {
            self.worth.len()
        }

        fn work(&self) -> u64 {
            0
        }

        fn across(&mut self, left: &[u32], right: &[u32]) -> i64 {
            let mut total = 0;
            for (a, &l) in left.iter().enumerate() {
                for (b, &r) in right.iter().enumerate().take_while(|(b, _)| a + b < self.worth.len()) {
                    total += self.worth[a + b] * self.weight[l as usize * self.neurons + r as usize];
                }
            }
            total
        }
    }

    proptest! {
        /// What the moves claim to gain is what the path gained, near cuts and short stretches included.
        #[test]
        fn gains_are_true(neurons in 2usize..25, seed in 0u64..1000) {
            let weights = Weights::new(neurons, seed);
            let candidates: Vec<Vec<u32>> = (0..neurons as u32).map(|n| (0..neurons as u32).filter(|&m| m != n).collect()).collect();
            let start: Vec<u32> = (0..neurons as u32).collect();
            let before = weights.total(&start);
            let (path, gain) = LocalSearch::new(start, &candidates, weights.clone()).run(u64::MAX);
            super::super::places(path.iter().copied());
            prop_assert_eq!(weights.total(&path), before + gain);
            prop_assert!(gain >= 0);
        }
    }
}
