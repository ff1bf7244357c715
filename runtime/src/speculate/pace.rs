//! How many guesses pay: what a step takes by its rows, against how often guesses come true. Both are measured while running.

use super::step_times::StepTimes;
use super::{CLASSES, Draft};
use crate::engine::BATCH_MAX;

/// Tries that what is expected of a class counts for.
const EXPECTED_WEIGHT: f64 = 4.0;
/// Tries that are remembered of a class.
const REMEMBERED: f64 = 64.0;
/// How much better a step with guesses must look than one without.
const MARGIN: f64 = 1.02;

/// How often the guesses of one draft come true, and what one takes.
#[derive(Clone, Debug)]
pub(super) struct Record {
    /// By class: the share that came true, and for how many tries it stands.
    classes: [(f64, f64); CLASSES],
    /// Of all classes.
    all: f64,
    /// Mean seconds of a guess.
    seconds: Option<f64>,
}

impl Record {
    pub(super) fn of(draft: &dyn Draft) -> Self {
        let classes = std::array::from_fn(|class| (draft.expected(class), EXPECTED_WEIGHT));
        let all = classes.iter().map(|(share, _)| share).sum::<f64>() / CLASSES as f64;
        Self { classes, all, seconds: None }
    }

    /// A guess came true, or did not.
    pub(super) fn add(&mut self, class: usize, came_true: bool) {
        let (share, weight) = &mut self.classes[class];
        *weight = (*weight + 1.0).min(REMEMBERED);
        let came_true = f64::from(u8::from(came_true));
        *share += (came_true - *share) / *weight;
        self.all += (came_true - self.all) / REMEMBERED;
    }

    /// A guess took so long.
    pub(super) fn took(&mut self, seconds: f64) {
        let mean = self.seconds.get_or_insert(seconds);
        *mean += (seconds - *mean) / 16.0;
    }

    /// Whether it is not known yet what a guess takes.
    pub(super) fn is_untimed(&self) -> bool {
        self.seconds.is_none()
    }

    /// The share of guesses that come true, of a class, or of whatever class.
    pub(super) fn share(&self, class: Option<usize>) -> f64 {
        class.map_or(self.all, |class| self.classes[class].0)
    }
}

/// The guesses for a step: how likely each is to be reached and to come true.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guesses {
    count: usize,
    /// That all so far come true.
    all_true: f64,
    /// Tokens that a step is expected to give with the first so many.
    tokens: [f64; BATCH_MAX],
    /// Seconds that guessing took.
    spent: f64,
}

impl Guesses {
    pub(super) fn none() -> Self {
        Self { count: 0, all_true: 1.0, tokens: [1.0; BATCH_MAX], spent: 0.0 }
    }

    /// One more, that comes true so often if all before it do.
    pub(super) fn push(&mut self, share: f64, seconds: f64) {
        self.all_true *= share;
        self.count += 1;
        self.tokens[self.count] = self.tokens[self.count - 1] + self.all_true;
        self.spent += seconds;
    }

    /// Whether guessing once more is expected to pay.
    pub(super) fn wants_more(&self, times: &StepTimes, record: &Record) -> bool {
        let rows = self.count + 1;
        let (Some(now), Some(then), Some(without)) = (times.of(rows), times.of(rows + 1), times.of(1)) else {
            return true;
        };
        let gain = self.all_true * record.share(None);
        let cost = then - now + record.seconds.unwrap_or(0.0);
        let best = (self.tokens[self.count] / (now + self.spent)).max(1.0 / (without + self.spent));
        gain > cost * best * MARGIN
    }

    /// How many of them to compute: as many as give most tokens in a second, none where that is the step without.
    pub(super) fn worth(&self, times: &StepTimes) -> usize {
        let rate = |guesses: usize| Some(self.tokens[guesses] / (times.of(guesses + 1)? + self.spent));
        let Some(without) = rate(0) else { return self.count };
        let best = (1..=self.count).filter_map(|guesses| Some((guesses, rate(guesses)?)));
        let best = best.max_by(|a, b| a.1.total_cmp(&b.1));
        best.map_or(0, |(guesses, rate)| if rate > without * MARGIN { guesses } else { 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::super::ngrams::NGrams;
    use super::*;

    fn times(one: f64, row: f64) -> StepTimes {
        let mut times = StepTimes::default();
        for rows in 1..=BATCH_MAX {
            (0..60).for_each(|_| times.add(rows, one + row * (rows - 1) as f64));
        }
        times
    }

    fn guesses(share: f64, count: usize) -> Guesses {
        let mut guesses = Guesses::none();
        (0..count).for_each(|_| guesses.push(share, 0.0));
        guesses
    }

    #[test]
    fn as_many_guesses_as_pay_are_computed() {
        // Rows that cost nothing: all of them. Rows that cost as much as a step: none but the certain ones.
        assert_eq!(guesses(0.5, 7).worth(&times(1.0, 0.0)), 7);
        assert_eq!(guesses(0.5, 7).worth(&times(1.0, 1.0)), 0);
        assert_eq!(guesses(0.9, 7).worth(&times(1.0, 0.95)), 0);
        // 1 + 0.5 + 0.25 .. tokens in 1 + 0.3 k: one guess gives 1.5 / 1.3, two 1.75 / 1.6, three 1.875 / 1.9.
        assert_eq!(guesses(0.5, 7).worth(&times(1.0, 0.3)), 1);
        assert_eq!(guesses(0.95, 7).worth(&times(1.0, 0.3)), 7);
    }

    #[test]
    fn a_guess_that_costs_more_than_it_gives_is_not_made() {
        let mut record = Record::of(&NGrams::default());
        (0..200).for_each(|at| record.add(0, at % 2 == 0));
        assert!((record.share(None) - 0.5).abs() < 0.05);
        record.took(0.1);
        assert!(guesses(0.5, 0).wants_more(&times(1.0, 0.3), &record));
        assert!(!guesses(0.5, 0).wants_more(&times(1.0, 0.5), &record));
        assert!(!guesses(0.5, 2).wants_more(&times(1.0, 0.3), &record), "both before it must come true");
    }

    #[test]
    fn what_comes_true_is_learned_and_forgotten() {
        let mut record = Record::of(&NGrams::default());
        let before = record.share(Some(3));
        (0..30).for_each(|_| record.add(3, false));
        assert!(record.share(Some(3)) < before / 4.0);
        (0..300).for_each(|_| record.add(3, true));
        assert!(record.share(Some(3)) > 0.95);
        assert_eq!(record.share(Some(2)), NGrams::default().expected(2));
    }
}
