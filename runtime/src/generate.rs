//! Prompt in, tokens out, with the time each took.

mod transcript;

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::disk_cost::ReadCost;
use crate::engine::{Executor, Forward};
use crate::error::Result;
use crate::neurons::counters::ReadCounters;
use crate::sampler::Sampler;
use crate::speculate::{Speculation, SpeculationCounters};

pub use transcript::Transcript;

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// As many tokens as asked for.
    Length,
    /// The model ended its text.
    Eos,
    /// The caller asked to stop, or one of its stop tokens came.
    Stopped,
}

/// What to generate.
pub struct Request<'a> {
    /// Token ids to start from; those already cached come before them.
    pub prompt: &'a [u32],
    /// At most this many new tokens.
    pub tokens: usize,
    /// Ids with which the model ends its text (EOS); they are not passed on.
    pub eos: &'a [u32],
    /// Ids that the caller wants to stop at, not passed on either.
    pub stop_ids: &'a [u32],
}

/// What a generation cost.
#[derive(Clone, Debug)]
pub struct Generation {
    /// Why it ended.
    pub finish: Finish,
    /// Tokens fed before the first new one.
    pub prompt_tokens: usize,
    /// New tokens passed on.
    pub tokens: usize,
    /// From the first prompt id in to the first sampled id out.
    pub prefill: Duration,
    /// From an id in to the next sampled id out, for every further token; tokens that one step gave share its time.
    pub decode: Vec<Duration>,
    /// What decoding read from flash.
    pub decode_reads: ReadCounters,
    /// What reads were seen to cost at the end, where plans follow that.
    pub read_cost: Option<ReadCost>,
    /// Steps, rows and guesses.
    pub speculation: SpeculationCounters,
}

impl Generation {
    /// This and what came after it, as one.
    pub fn and(mut self, later: Self) -> Self {
        self.decode.extend(later.decode);
        Self {
            finish: later.finish,
            prompt_tokens: self.prompt_tokens + later.prompt_tokens,
            tokens: self.tokens + later.tokens,
            prefill: self.prefill + later.prefill,
            decode: self.decode,
            decode_reads: self.decode_reads.and(later.decode_reads),
            read_cost: later.read_cost,
            speculation: self.speculation.and(later.speculation),
        }
    }

    /// From the first sampled id to the last.
    pub fn decode_time(&self) -> Duration {
        self.decode.iter().sum()
    }
}

/// A new token, and what it cost to get from the previous one, or from the prompt.
#[derive(Clone, Copy, Debug)]
pub struct NewToken {
    /// Its id.
    pub id: u32,
    /// From id in to sampled id out; tokens that one step gave share its time.
    pub time: Duration,
    /// What was read from flash meanwhile: by the first token of a step for all.
    pub reads: ReadCounters,
}

/// A generation in progress: yields one token after another.
///
/// The id that a caller stops at, or the last of the asked-for ones, is not fed: the sequence then holds everything before it.
pub struct Generator {
    eos: Vec<u32>,
    stop_ids: Vec<u32>,
    tokens: usize,
    next: Next,
    report: Generation,
    /// Read before the token that comes next, and before the first that is decoded.
    before: ReadCounters,
    prefilled: ReadCounters,
    /// What speculation had done before.
    guessed_before: SpeculationCounters,
}

/// What is done for the next token.
enum Next {
    /// The prompt is fed.
    Prompt(Vec<u32>),
    /// What was said goes on.
    Token,
    /// Nothing: it has ended.
    Ended,
}

impl Generator {
    /// Begins with a prompt after what `transcript` has. Nothing is computed yet.
    pub fn new(
        executor: &mut Executor,
        transcript: &mut Transcript,
        sampler: &mut Sampler,
        request: &Request<'_>,
    ) -> Self {
        transcript.settle(executor, sampler);
        let before = executor.read_counters();
        Self {
            eos: request.eos.to_vec(),
            stop_ids: request.stop_ids.to_vec(),
            tokens: request.tokens,
            next: Next::Prompt(request.prompt.to_vec()),
            report: Generation {
                finish: Finish::Length,
                prompt_tokens: request.prompt.len() + usize::from(transcript.unfed().is_some()),
                tokens: 0,
                prefill: Duration::ZERO,
                decode: Vec::with_capacity(request.tokens.min(executor.context())),
                decode_reads: ReadCounters::default(),
                read_cost: None,
                speculation: SpeculationCounters::default(),
            },
            before,
            prefilled: before,
            guessed_before: transcript.counters(),
        }
    }

    /// The next token; `None` once it has ended, or after an error.
    ///
    /// # Errors
    /// Those of [`Executor::step`]: nothing more has been said, and the generation is over.
    pub fn next(
        &mut self,
        executor: &mut Executor,
        transcript: &mut Transcript,
        sampler: &mut Sampler,
    ) -> Result<Option<NewToken>> {
        let next = self.choose(executor, transcript, sampler);
        if next.is_err() {
            transcript.settle(executor, sampler);
        }
        let Some((id, time)) = next? else { return Ok(None) };
        let now = executor.read_counters();
        self.report.decode_reads = now.since(self.prefilled);
        self.report.read_cost = executor.read_cost();
        self.report.speculation = transcript.counters().since(self.guessed_before);
        if self.ends(id) {
            self.report.finish = if self.eos.contains(&id) { Finish::Eos } else { Finish::Stopped };
            return Ok(None);
        }
        transcript.say(id);
        self.report.tokens += 1;
        if self.report.tokens < self.tokens {
            self.next = Next::Token;
        }
        let reads = now.since(std::mem::replace(&mut self.before, now));
        Ok(Some(NewToken { id, time, reads }))
    }

    fn choose(
        &mut self,
        executor: &mut Executor,
        transcript: &mut Transcript,
        sampler: &mut Sampler,
    ) -> Result<Option<(u32, Duration)>> {
        match std::mem::replace(&mut self.next, Next::Ended) {
            Next::Ended => Ok(None),
            Next::Prompt(ids) => {
                let begin = Instant::now();
                let rows = transcript.rows_of(&ids, false);
                let (begun, others) = rows.split_at(transcript.rows_of_begun(rows.len()));
                if !begun.is_empty() {
                    executor.step(begun, &mut |_, _| Ok(()))?;
                }
                if !others.is_empty() || begun.is_empty() {
                    executor.step(others, &mut |_, _| Ok(()))?;
                }
                transcript.said(&ids, sampler);
                let id = (self.tokens > 0).then(|| sampler.choose(executor.last_logits()));
                self.report.prefill = begin.elapsed();
                self.prefilled = executor.read_counters();
                Ok(id.map(|id| (id, self.report.prefill)))
            }
            Next::Token => {
                let left = self.tokens - self.report.tokens;
                let (id, time) = transcript.next(executor, sampler, left, &|id| self.ends(id))?;
                self.report.decode.push(time);
                Ok(Some((id, time)))
            }
        }
    }

    fn ends(&self, id: u32) -> bool {
        self.eos.contains(&id) || self.stop_ids.contains(&id)
    }

    /// Ends it here, unless the model has ended it.
    pub fn stop(&mut self) {
        self.next = Next::Ended;
        if self.report.finish == Finish::Length {
            self.report.finish = Finish::Stopped;
        }
    }

    /// What it has cost so far, and why it ended.
    pub fn report(&self) -> &Generation {
        &self.report
    }
}

/// A [`Generator`] on the only sequence of `forward`, run to its end; `each` gets every token and may stop.
///
/// # Errors
/// Those of [`Generator::next`].
pub fn generate(
    forward: &mut Forward,
    sampler: &mut Sampler,
    request: &Request<'_>,
    each: &mut dyn FnMut(NewToken) -> ControlFlow<()>,
) -> Result<Generation> {
    generate_with(forward, None, sampler, request, each)
}

/// As [`generate`], with guesses.
///
/// # Errors
/// As [`generate`].
pub fn generate_with(
    forward: &mut Forward,
    speculation: Option<Speculation>,
    sampler: &mut Sampler,
    request: &Request<'_>,
    each: &mut dyn FnMut(NewToken) -> ControlFlow<()>,
) -> Result<Generation> {
    let (executor, sequence) = forward.parts();
    let mut transcript = Transcript::new(executor, sequence, speculation);
    let mut generator = Generator::new(executor, &mut transcript, sampler, request);
    while let Some(token) = generator.next(executor, &mut transcript, sampler)? {
        if each(token).is_break() {
            generator.stop();
        }
    }
    transcript.settle(executor, sampler);
    Ok(generator.report)
}

/// Milliseconds as median, 95th and 99th percentile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Percentiles {
    /// Half are at most this.
    pub median: f64,
    /// 95 of 100 are at most this.
    pub p95: f64,
    /// 99 of 100 are at most this.
    pub p99: f64,
}

impl Percentiles {
    /// Of some durations; all zero for none.
    pub fn of(durations: &[Duration]) -> Self {
        let mut ms: Vec<f64> = durations.iter().map(|d| d.as_secs_f64() * 1e3).collect();
        ms.sort_by(f64::total_cmp);
        let at = |share: f64| match ms.len() {
            0 => 0.0,
            n => ms[((n as f64 * share).ceil() as usize).clamp(1, n) - 1],
        };
        Self { median: at(0.5), p95: at(0.95), p99: at(0.99) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let ms: Vec<_> = (1..=100).map(Duration::from_millis).collect();
        let p = Percentiles::of(&ms);
        assert_eq!((p.median, p.p95, p.p99), (50.0, 95.0, 99.0));
        assert_eq!(Percentiles::of(&[]), Percentiles::default());
        assert_eq!(Percentiles::of(&ms[..1]).p99, 1.0);
    }
}
