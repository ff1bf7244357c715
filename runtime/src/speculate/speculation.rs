//! Who guesses for a text, how many guesses are computed, and what became of them.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use super::ngrams::NGrams;
use super::pace::{Guesses, Record};
use super::step_times::StepTimes;
use super::{Draft, Guess};
use crate::engine::BATCH_MAX;
use crate::error::Result;
use crate::sampler::Sampler;

/// Guesses of a step, at most, where their number is decided while running.
const AUTO_GUESSES: usize = 7;
/// Steps without a guess after which one is computed, to see whether it pays by now.
const RETRY_STEPS: u32 = 128;

/// How many guesses are computed in a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Speculate {
    /// As many as pay by what was measured, which may be none.
    #[default]
    Auto,
    /// None.
    Off,
    /// So many, where there are as many.
    Guesses(usize),
}

impl Speculate {
    /// Rows of a step, at most.
    pub fn rows(self) -> usize {
        1 + match self {
            Speculate::Auto => AUTO_GUESSES,
            Speculate::Off => 0,
            Speculate::Guesses(guesses) => guesses.min(BATCH_MAX - 1),
        }
    }
}

impl fmt::Display for Speculate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Speculate::Auto => f.write_str("auto"),
            Speculate::Off => f.write_str("off"),
            Speculate::Guesses(guesses) => write!(f, "{guesses}"),
        }
    }
}

/// The text is not a number of guesses.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("give auto, off, or how many tokens to guess in a step, from 1 to {}", BATCH_MAX - 1)]
pub struct SpeculateError;

impl FromStr for Speculate {
    type Err = SpeculateError;

    fn from_str(text: &str) -> Result<Self, SpeculateError> {
        match text {
            "auto" => Ok(Speculate::Auto),
            "off" => Ok(Speculate::Off),
            number => match number.parse() {
                Ok(guesses) if (1..BATCH_MAX).contains(&guesses) => Ok(Speculate::Guesses(guesses)),
                _ => Err(SpeculateError),
            },
        }
    }
}

struct Drafter {
    draft: Box<dyn Draft>,
    record: Record,
    /// Its first guess for the step under way.
    first: Option<Guess>,
}

impl Drafter {
    fn new(draft: Box<dyn Draft>) -> Self {
        Self { record: Record::of(&*draft), draft, first: None }
    }
}

/// Guesses for one text.
pub struct Speculation {
    how: Speculate,
    /// The cheapest first.
    drafters: Vec<Drafter>,
    times: StepTimes,
    /// For the step under way: whose guesses, what they are, and their ids.
    by: usize,
    guesses: Vec<Guess>,
    ids: Vec<u32>,
    /// Steps since a guess was computed.
    idle: u32,
}

impl Speculation {
    /// Guesses by what the text has said before, and by `draft`, if there is one.
    pub fn new(how: Speculate, draft: Option<Box<dyn Draft>>) -> Self {
        let ngrams: Box<dyn Draft> = Box::new(NGrams::default());
        Self {
            how,
            drafters: [ngrams].into_iter().chain(draft).map(Drafter::new).collect(),
            times: StepTimes::default(),
            by: 0,
            guesses: Vec::with_capacity(BATCH_MAX),
            ids: Vec::with_capacity(BATCH_MAX),
            idle: 0,
        }
    }

    /// Guesses of what comes after `text`, up to `most`, that are to be computed with its last token. `sampler` will choose.
    ///
    /// # Errors
    /// Those of the drafts.
    pub fn guess(&mut self, text: &[u32], most: usize, sampler: &Sampler) -> Result<&[u32]> {
        self.guesses.clear();
        self.ids.clear();
        self.drafters.iter_mut().for_each(|drafter| drafter.first = None);
        let most = most.min(self.how.rows() - 1);
        if most == 0 {
            return Ok(&[]);
        }
        let mut guesses = Guesses::none();
        for at in 0..self.drafters.len() {
            self.by = at;
            guesses = self.ask(at, text, most, sampler)?;
            let later = self.drafters[at + 1..].iter().map(|later| later.record.share(None)).fold(0.0, f64::max);
            let first = self.guesses.first();
            if first.is_some_and(|first| self.drafters[at].record.share(Some(first.class)) >= later) {
                break;
            }
        }
        let computed = match self.how {
            Speculate::Auto if self.idle >= RETRY_STEPS => guesses.worth(&self.times).max(1).min(self.ids.len()),
            Speculate::Auto => guesses.worth(&self.times),
            _ => self.ids.len(),
        };
        Ok(&self.ids[..computed])
    }

    /// Lets one of them guess, as long as that is expected to pay.
    fn ask(&mut self, at: usize, text: &[u32], most: usize, sampler: &Sampler) -> Result<Guesses> {
        self.guesses.clear();
        self.ids.clear();
        let Drafter { draft, record, first } = &mut self.drafters[at];
        let mut guesses = Guesses::none();
        while self.ids.len() < most {
            // The second guess is one whose time is known to be usual.
            let is_unknown = record.is_untimed() && self.ids.len() < 2;
            let must = self.how != Speculate::Auto || is_unknown || self.idle >= RETRY_STEPS && self.ids.is_empty();
            if !(must || guesses.wants_more(&self.times, record)) {
                break;
            }
            let begin = Instant::now();
            let Some(guess) = draft.guess(text, &self.ids, sampler)? else { break };
            let seconds = begin.elapsed().as_secs_f64();
            if guess.is_usual {
                record.took(seconds);
            }
            first.get_or_insert(guess);
            guesses.push(record.share(Some(guess.class)), seconds);
            self.guesses.push(guess);
            self.ids.push(guess.id);
        }
        Ok(guesses)
    }

    /// Learns from a step: what it chose, one after the other, and how long it took with so many guesses computed.
    pub fn learn(&mut self, chosen: &mut dyn Iterator<Item = u32>, computed: usize, time: Duration) {
        self.times.add(computed + 1, time.as_secs_f64());
        self.idle = if computed > 0 { 0 } else { self.idle.saturating_add(1) };
        let Some(next) = chosen.next() else { return };
        for (_, other) in self.drafters.iter_mut().enumerate().filter(|(at, _)| *at != self.by) {
            if let Some(first) = other.first {
                other.record.add(first.class, first.id == next);
            }
        }
        // What was guessed and not computed is compared, too.
        let record = &mut self.drafters[self.by].record;
        for (guess, chosen) in self.guesses.iter().zip([next].into_iter().chain(chosen)) {
            record.add(guess.class, guess.id == chosen);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::Sampling;

    fn sampler() -> Sampler {
        Sampler::new(Sampling::default(), 1)
    }

    /// Guesses that were computed over a text of which every token is known, when a step of k rows takes `1 + row (k - 1)` seconds.
    fn computed(speculation: &mut Speculation, text: &[u32], row: f64) -> (usize, usize) {
        let (mut at, mut drafted, mut steps) = (1, 0, 0);
        while at < text.len() {
            let guesses = speculation.guess(&text[..at], text.len() - at - 1, &sampler()).unwrap().to_vec();
            let came_true = guesses.iter().zip(&text[at..]).take_while(|(a, b)| a == b).count();
            let chosen = &text[at..=at + came_true];
            let time = Duration::from_secs_f64(1.0 + row * guesses.len() as f64);
            speculation.learn(&mut chosen.iter().copied(), guesses.len(), time);
            at += chosen.len();
            drafted += guesses.len();
            steps += 1;
        }
        (drafted, steps)
    }

    fn unrelated(len: u32) -> Vec<u32> {
        // Every token occurs again and again, always before another one.
        (0..len).map(|i| i.wrapping_mul(i).wrapping_mul(2_654_435_761) >> 26).collect()
    }

    #[test]
    fn copied_text_is_guessed_and_other_text_is_left_alone() {
        let copied: Vec<u32> = (0..400).map(|i| i % 40).collect();
        let (_, steps) = computed(&mut Speculation::new(Speculate::Auto, None), &copied, 0.1);
        assert!(steps < 120, "{steps} steps");
        let (drafted, steps) = computed(&mut Speculation::new(Speculate::Auto, None), &unrelated(2000), 0.9);
        assert!(steps > 1900 && drafted < 60, "{drafted} in {steps} steps");
        let (drafted, steps) = computed(&mut Speculation::new(Speculate::Off, None), &copied, 0.1);
        assert_eq!((drafted, steps), (0, copied.len() - 1));
    }

    #[test]
    fn rows_that_cost_as_much_as_steps_are_not_computed() {
        let copied: Vec<u32> = (0..2000).map(|i| i % 40).collect();
        let mut speculation = Speculation::new(Speculate::Auto, None);
        let (drafted, steps) = computed(&mut speculation, &copied, 1.5);
        assert!(drafted < 60 && drafted > 0 && steps > 1900, "{drafted} in {steps} steps: it is tried now and then");
        // They become cheap, and that is found out.
        let (_, steps) = computed(&mut speculation, &copied, 0.0);
        assert!(steps < 1000, "{steps} steps");
    }

    #[test]
    fn a_number_of_guesses_is_always_computed() {
        let copied: Vec<u32> = (0..100).map(|i| i % 10).collect();
        let mut speculation = Speculation::new(Speculate::Guesses(3), None);
        let (drafted, _) = computed(&mut speculation, &copied[..11], 9.0);
        assert_eq!(drafted, 0, "nothing occurs twice");
        let guesses = speculation.guess(&copied[..15], 9, &sampler()).unwrap();
        assert_eq!(guesses, [5, 6, 7]);
        assert_eq!(speculation.guess(&copied[..15], 2, &sampler()).unwrap().len(), 2);
    }

    #[test]
    fn words_are_read() {
        for (text, how) in [("auto", Speculate::Auto), ("off", Speculate::Off), ("4", Speculate::Guesses(4))] {
            assert_eq!((text.parse(), how.to_string()), (Ok(how), text.to_owned()));
        }
        for text in ["0", "32", "-1", "", "on", "4x"] {
            assert!(text.parse::<Speculate>().is_err(), "{text}");
        }
        assert_eq!((Speculate::Off.rows(), Speculate::Guesses(31).rows()), (1, BATCH_MAX));
    }
}
