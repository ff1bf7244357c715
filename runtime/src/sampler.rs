//! From logits to a token id: greedy, temperature, top-k, top-p, repetition penalty.

use flashlm_formats::chat::SamplingDefaults;
use rand_xoshiro::SplitMix64;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

use crate::buffers::Buffers;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 means greedy.
    pub temperature: f32,
    /// Keep only the `top_k` likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the likeliest tokens that together reach this probability; 1 keeps all.
    pub top_p: f32,
    /// Divide positive and multiply negative logits of tokens already seen; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Start of the random numbers.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, repetition_penalty: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// As a model's publisher recommends; the seed is 0.
    pub fn recommended(defaults: &SamplingDefaults) -> Self {
        let none = Self::default();
        Self {
            temperature: defaults.temperature.unwrap_or(none.temperature),
            top_k: defaults.top_k.map_or(none.top_k, |top_k| top_k as usize),
            top_p: defaults.top_p.unwrap_or(none.top_p),
            repetition_penalty: defaults.repetition_penalty.unwrap_or(none.repetition_penalty),
            seed: none.seed,
        }
    }
}

/// Chooses tokens. All memory is taken when it is made.
pub struct Sampler {
    sampling: Sampling,
    /// One word of state, the same everywhere: it decides the text of a seed. It is stepped once for each token that is drawn.
    random: SplitMix64,
    seen: Vec<bool>,
    candidates: Vec<(f32, u32)>,
}

/// A token that was chosen, and what takes it back.
#[derive(Debug)]
pub struct Choice {
    /// The token.
    pub id: u32,
    /// How likely it was among those that could be chosen.
    pub likelihood: f32,
    random: SplitMix64,
    was_seen: bool,
}

impl Sampler {
    /// A sampler for a vocabulary.
    pub fn new(sampling: Sampling, vocab_size: usize) -> Self {
        Self::with(&mut Buffers::default(), sampling, vocab_size)
    }

    fn with(buffers: &mut Buffers, sampling: Sampling, vocab_size: usize) -> Self {
        Self {
            sampling,
            random: SplitMix64::seed_from_u64(sampling.seed),
            seen: buffers.zeros(vocab_size),
            candidates: buffers.room(if sampling.temperature > 0.0 { vocab_size } else { 0 }),
        }
    }

    /// Bytes it holds for a vocabulary, at most.
    pub fn bytes(vocab_size: usize) -> u64 {
        let drawing = Sampling { temperature: 1.0, ..Sampling::default() };
        Buffers::bytes_of(|buffers| Self::with(buffers, drawing, vocab_size))
    }

    /// Counts a token as seen, for the repetition penalty.
    pub fn observe(&mut self, id: u32) {
        if let Some(seen) = self.seen.get_mut(id as usize) {
            *seen = true;
        }
    }

    /// Counts these tokens as seen, and no others.
    pub fn see_only(&mut self, ids: &[u32]) {
        self.seen.fill(false);
        ids.iter().for_each(|id| self.observe(*id));
    }

    /// Chooses the next token; `logits` are changed. They must be finite, as [`Forward`](crate::engine::Forward) gives them.
    pub fn choose(&mut self, logits: &mut [f32]) -> u32 {
        self.choose_for_now(logits).id
    }

    /// As [`Sampler::choose`]; the choice can be taken back.
    pub fn choose_for_now(&mut self, logits: &mut [f32]) -> Choice {
        let random = self.random.clone();
        let (id, likelihood) = self.chosen(logits);
        let was_seen = self.seen.get(id as usize).is_none_or(|seen| *seen);
        self.observe(id);
        Choice { id, likelihood, random, was_seen }
    }

    /// Undoes the last choice that was not taken back: the next one is made as if it had not been.
    pub fn take_back(&mut self, choice: Choice) {
        self.random = choice.random;
        if let Some(seen) = self.seen.get_mut(choice.id as usize) {
            *seen = choice.was_seen;
        }
    }

    /// Chooses from now on with the random numbers that `other` will choose with, and what it has seen.
    pub fn follow(&mut self, other: &Self) {
        self.random = other.random.clone();
        if self.sampling.repetition_penalty != 1.0 {
            self.seen.iter_mut().zip(&other.seen).for_each(|(to, from)| *to = *from);
        }
    }

    /// How it chooses.
    pub fn sampling(&self) -> Sampling {
        self.sampling
    }

    /// The next token, and its likelihood.
    fn chosen(&mut self, logits: &mut [f32]) -> (u32, f32) {
        let Sampling { temperature, top_k, top_p, repetition_penalty, .. } = self.sampling;
        if repetition_penalty != 1.0 {
            for (logit, _) in logits.iter_mut().zip(&self.seen).filter(|(_, seen)| **seen) {
                let changed = if *logit > 0.0 { *logit / repetition_penalty } else { *logit * repetition_penalty };
                // A penalty may be so large or small that no number is left, and a draw among such would be none.
                *logit = changed.clamp(f32::MIN, f32::MAX);
            }
        }
        if temperature > 0.0 {
            return self.draw(logits, temperature, top_k, top_p);
        }
        (greedy(logits), 1.0)
    }

    fn draw(&mut self, logits: &[f32], temperature: f32, top_k: usize, top_p: f32) -> (u32, f32) {
        let candidates = &mut self.candidates;
        candidates.clear();
        candidates.extend(logits.iter().enumerate().map(|(id, l)| (*l, id as u32)));
        let likeliest_first = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, likeliest_first);
            candidates.truncate(top_k);
        }
        candidates.sort_unstable_by(likeliest_first);
        let Some(&(max, _)) = candidates.first() else { return (0, 1.0) };
        let mut total = 0.0;
        for (value, _) in candidates.iter_mut() {
            *value = ((*value - max) / temperature).exp();
            total += *value;
        }
        if top_p < 1.0 {
            let mut kept = 0.0;
            let last = candidates.iter().position(|(p, _)| {
                kept += p;
                kept >= top_p * total
            });
            if let Some(last) = last {
                candidates.truncate(last + 1);
                total = kept;
            }
        }
        let mut point = unit(&mut self.random) * total;
        let mut chosen = (0, 1.0);
        // Should rounding leave something of the point behind all of them, it is the last that has a probability.
        for &(p, id) in candidates.iter().filter(|(p, _)| *p > 0.0) {
            chosen = (id, p / total);
            point -= p;
            if point < 0.0 {
                break;
            }
        }
        chosen
    }
}

/// How likely the likeliest token is.
pub fn confidence(logits: &[f32]) -> f32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    1.0 / logits.iter().map(|logit| (logit - max).exp()).sum::<f32>()
}

/// The likeliest token; the lowest id among equals.
pub fn greedy(logits: &[f32]) -> u32 {
    let mut best = (f32::NEG_INFINITY, 0);
    for (id, &logit) in logits.iter().enumerate() {
        if logit > best.0 {
            best = (logit, id as u32);
        }
    }
    best.1
}

/// A number in `[0, 1)`.
fn unit(random: &mut SplitMix64) -> f32 {
    (random.next_u64() >> 40) as f32 / (1u64 << 24) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(sampling: Sampling, logits: &[f32], times: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(sampling, logits.len());
        let mut counts = vec![0; logits.len()];
        for _ in 0..times {
            counts[sampler.choose(&mut logits.to_vec()) as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_first_of_equals_and_ignores_nan() {
        assert_eq!(greedy(&[0.0, f32::NAN, 2.0, 2.0]), 2);
    }

    #[test]
    fn draws_follow_the_distribution() {
        let counts =
            drawn(Sampling { temperature: 1.0, ..Sampling::default() }, &[0.0, 3f32.ln(), f32::NEG_INFINITY], 40_000);
        assert!((counts[1] as f64 / 40_000.0 - 0.75).abs() < 0.01, "{counts:?}");
        assert_eq!(counts[2], 0);
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let logits = [5.0, 4.0, 3.0, 2.0, 1.0];
        let k = drawn(Sampling { temperature: 10.0, top_k: 2, ..Sampling::default() }, &logits, 2000);
        assert!(k[0] > 0 && k[1] > 0 && k[2..].iter().all(|c| *c == 0), "{k:?}");
        let p = drawn(Sampling { temperature: 1.0, top_p: 0.6, ..Sampling::default() }, &logits, 2000);
        assert!(p[0] == 2000, "{p:?}");
    }

    #[test]
    fn a_repeated_token_is_penalised() {
        let mut sampler = Sampler::new(Sampling { repetition_penalty: 2.0, ..Sampling::default() }, 2);
        assert_eq!(sampler.choose(&mut [1.0, 0.9]), 0);
        assert_eq!(sampler.choose(&mut [1.0, 0.9]), 1);
    }

    #[test]
    fn a_penalty_beyond_all_numbers_leaves_a_draw() {
        for repetition_penalty in [f32::MIN_POSITIVE, 1e-40, f32::MAX] {
            let sampling = Sampling { temperature: 1.0, repetition_penalty, ..Sampling::default() };
            let counts = drawn(sampling, &[3.0, 2.0, -f32::MAX], 500);
            assert_eq!(counts[2], 0, "{repetition_penalty}: {counts:?}");
        }
    }

    #[test]
    fn a_seed_repeats_its_draws() {
        let sampling = Sampling { temperature: 1.0, seed: 7, ..Sampling::default() };
        assert_eq!(drawn(sampling, &[0.1, 0.2, 0.3], 100), drawn(sampling, &[0.1, 0.2, 0.3], 100));
    }

    #[test]
    fn what_is_taken_back_leaves_no_trace() {
        let sampling = Sampling { temperature: 1.0, repetition_penalty: 1.5, seed: 3, ..Sampling::default() };
        let logits = |at: usize| [0.1 * at as f32, 1.0, 0.9, -0.5, 0.3];
        let mut plain = Sampler::new(sampling, 5);
        let expected: Vec<u32> = (0..20).map(|at| plain.choose(&mut logits(at))).collect();
        for ahead in 1..5 {
            let mut sampler = Sampler::new(sampling, 5);
            let mut follower = Sampler::new(sampling, 5);
            for (at, expected) in expected.iter().enumerate() {
                let mut chosen: Vec<Choice> =
                    (at..at + ahead).map(|at| sampler.choose_for_now(&mut logits(at))).collect();
                while let Some(choice) = chosen.pop() {
                    sampler.take_back(choice);
                }
                follower.follow(&sampler);
                assert_eq!(follower.choose(&mut logits(at)), *expected);
                assert_eq!(sampler.choose(&mut logits(at)), *expected);
            }
        }
    }

    /// The first outputs of splitmix64 as its author published it: the text of a seed must stay what it was.
    #[test]
    fn the_numbers_of_a_seed_are_those_of_splitmix64() {
        let mut random = SplitMix64::seed_from_u64(1_234_567);
        let numbers = [(); 3].map(|()| random.next_u64());
        assert_eq!(numbers, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }
}
