//! What a step takes by its rows, learned while running.

use crate::engine::BATCH_MAX;

/// What a further row adds to a step, as part of what one row takes, until it was measured.
const ROW_SHARE: f64 = 0.3;
/// How much a step changes what is known of its kind, once that was seen often.
const GAIN: f64 = 1.0 / 16.0;
/// Steps after which what is known of others counts for no more than one of them.
const STALE_STEPS: u64 = 64;

/// Mean seconds of steps, by their rows.
#[derive(Clone, Debug)]
pub(super) struct StepTimes {
    /// By rows - 1: the mean, and how often it was seen.
    known: [(f64, u32); BATCH_MAX],
    /// By rows - 1: the step that was the last of its kind.
    last: [u64; BATCH_MAX],
    steps: u64,
}

impl Default for StepTimes {
    fn default() -> Self {
        Self { known: [(0.0, 0); BATCH_MAX], last: [0; BATCH_MAX], steps: 0 }
    }
}

impl StepTimes {
    /// A step of so many rows took this long.
    pub(super) fn add(&mut self, rows: usize, seconds: f64) {
        self.steps += 1;
        let last = std::mem::replace(&mut self.last[rows - 1], self.steps);
        // The first of a kind is held against what was to be expected: one bad moment shall not rule it out.
        let (mean, seen) = match self.known[rows - 1] {
            (_, 0) => (self.of(rows).unwrap_or(seconds), 1),
            (mean, _) if self.steps - last > STALE_STEPS => (mean, 1),
            known => known,
        };
        let gain = (1.0 / f64::from(seen + 1)).max(GAIN);
        self.known[rows - 1] = (mean + gain * (seconds - mean), seen + 1);
    }

    /// Seconds that a step of so many rows takes: measured, or on the line through those that were. Nothing is known at first.
    pub(super) fn of(&self, rows: usize) -> Option<f64> {
        let (mean, seen) = self.known[rows - 1];
        if seen > 0 {
            return Some(mean);
        }
        let seen = |rows: usize| (self.known[rows - 1].1 > 0).then(|| (rows, self.known[rows - 1].0));
        let below = (1..rows).rev().find_map(seen);
        let above = (rows + 1..=BATCH_MAX).find_map(seen);
        let line = |(a, at_a): (usize, f64), (b, at_b): (usize, f64)| {
            at_a + (at_b - at_a) * (rows as f64 - a as f64) / (b as f64 - a as f64)
        };
        match (below, above) {
            (Some(below), Some(above)) => Some(line(below, above)),
            (Some(one @ (1, at_one)), None) => Some(line(one, (2, at_one * (1.0 + ROW_SHARE)))),
            (Some(below), None) => {
                let first = (1..below.0).find_map(seen);
                Some(first.map_or(below.1, |first| line(first, below).max(below.1)))
            }
            (None, Some((above, at_above))) => {
                Some(at_above * (1.0 + ROW_SHARE * (rows - 1) as f64) / (1.0 + ROW_SHARE * (above - 1) as f64))
            }
            (None, None) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_measured_lies_on_the_line() {
        let mut times = StepTimes::default();
        assert_eq!(times.of(1), None);
        times.add(1, 10.0);
        assert_eq!(times.of(1), Some(10.0));
        assert_eq!(times.of(3), Some(16.0));
        (0..100).for_each(|_| times.add(5, 30.0));
        assert!((times.of(3).unwrap() - 20.0).abs() < 0.1, "{times:?}");
        assert!((times.of(9).unwrap() - 50.0).abs() < 0.2, "{times:?}");
        // What one row takes, from steps that all had more.
        let mut times = StepTimes::default();
        times.add(5, 22.0);
        assert_eq!(times.of(1), Some(10.0));
    }

    #[test]
    fn means_follow_and_one_bad_moment_does_not_rule() {
        let mut times = StepTimes::default();
        times.add(1, 1.0);
        times.add(2, 13.0);
        assert!(times.of(2).unwrap() < 8.0, "half of it is what was expected");
        (0..200).for_each(|_| times.add(1, 2.0));
        assert!((times.of(1).unwrap() - 2.0).abs() < 1e-3);
        // Of what was not seen for long, a new one counts as much as all before.
        (0..100).for_each(|_| times.add(2, 20.0));
        (0..100).for_each(|_| times.add(1, 2.0));
        times.add(2, 3.0);
        assert!(times.of(2).unwrap() < 12.0);
    }
}
