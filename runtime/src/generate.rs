//! Prompt in, tokens out, with the time each took.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::engine::{Executor, Forward, Row, SequenceId, Work};
use crate::error::Result;
use crate::neurons::counters::ReadCounters;
use crate::sampler::Sampler;

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
    /// From an id in to the next sampled id out, for every further token.
    pub decode: Vec<Duration>,
    /// What decoding read from flash.
    pub decode_reads: ReadCounters,
}

/// A new token, and what it cost to get from the previous one, or from the prompt.
#[derive(Clone, Copy, Debug)]
pub struct NewToken {
    /// Its id.
    pub id: u32,
    /// From id in to sampled id out.
    pub time: Duration,
    /// What was read from flash meanwhile.
    pub reads: ReadCounters,
}

/// A generation in progress: yields one token after another.
///
/// The id that a caller stops at, or the last of the asked-for ones, is not fed: the sequence then holds everything before it.
pub struct Generator {
    sequence: SequenceId,
    eos: Vec<u32>,
    stop_ids: Vec<u32>,
    tokens: usize,
    next: Next,
    unfed: Option<u32>,
    report: Generation,
    /// Read before the token that comes next, and before the first that is decoded.
    before: ReadCounters,
    prefilled: ReadCounters,
}

/// What is done for the next token.
enum Next {
    /// The prompt is fed.
    Prompt(Vec<Row>),
    /// A token is fed.
    Token(u32),
    /// Nothing: it has ended.
    Ended,
}

impl Generator {
    /// Begins with a prompt for a sequence of `executor`. Nothing is computed yet.
    pub fn new(executor: &Executor, sequence: SequenceId, request: &Request<'_>) -> Self {
        let last = request.prompt.len().saturating_sub(1);
        let rows = request.prompt.iter().enumerate();
        let rows = rows.map(|(at, &token)| Row { sequence, token, work: Work::Prompt, wants_logits: at == last });
        let before = executor.read_counters();
        Self {
            sequence,
            eos: request.eos.to_vec(),
            stop_ids: request.stop_ids.to_vec(),
            unfed: None,
            tokens: request.tokens,
            next: Next::Prompt(rows.collect()),
            report: Generation {
                finish: Finish::Length,
                prompt_tokens: request.prompt.len(),
                tokens: 0,
                prefill: Duration::ZERO,
                decode: Vec::with_capacity(request.tokens.min(executor.context())),
                decode_reads: ReadCounters::default(),
            },
            before,
            prefilled: before,
        }
    }

    /// The next token; `None` once it has ended, or after an error.
    pub fn next(&mut self, executor: &mut Executor, sampler: &mut Sampler) -> Result<Option<NewToken>> {
        let begin = Instant::now();
        let nothing = &mut |_: usize, _: &mut [f32]| Ok(());
        let is_decoded = match std::mem::replace(&mut self.next, Next::Ended) {
            Next::Ended => return Ok(None),
            Next::Prompt(rows) => {
                executor.step(&rows, nothing)?;
                rows.iter().for_each(|row| sampler.observe(row.token));
                if self.tokens == 0 {
                    self.report.prefill = begin.elapsed();
                    return Ok(None);
                }
                false
            }
            Next::Token(id) => {
                executor.step(&[Row::decode(self.sequence, id)], nothing)?;
                true
            }
        };
        let id = sampler.choose(executor.last_logits());
        let elapsed = begin.elapsed();
        let now = executor.read_counters();
        if is_decoded {
            self.report.decode.push(elapsed);
        } else {
            (self.report.prefill, self.prefilled) = (elapsed, now);
        }
        self.report.decode_reads = now.since(self.prefilled);
        self.unfed = None;
        if self.eos.contains(&id) || self.stop_ids.contains(&id) {
            self.report.finish = if self.eos.contains(&id) { Finish::Eos } else { Finish::Stopped };
            return Ok(None);
        }
        self.unfed = Some(id);
        self.report.tokens += 1;
        if self.report.tokens < self.tokens {
            self.next = Next::Token(id);
        }
        let reads = now.since(std::mem::replace(&mut self.before, now));
        Ok(Some(NewToken { id, time: elapsed, reads }))
    }

    /// Ends it here, unless the model has ended it.
    pub fn stop(&mut self) {
        self.next = Next::Ended;
        if self.report.finish == Finish::Length {
            self.report.finish = Finish::Stopped;
        }
    }

    /// The last token that was yielded and not fed.
    pub fn unfed(&self) -> Option<u32> {
        self.unfed
    }

    /// What it has cost so far, and why it ended.
    pub fn report(&self) -> &Generation {
        &self.report
    }
}

/// A [`Generator`] on the only sequence of `forward`, run to its end; `each` gets every token and may stop.
pub fn generate(
    forward: &mut Forward,
    sampler: &mut Sampler,
    request: &Request<'_>,
    each: &mut dyn FnMut(NewToken) -> ControlFlow<()>,
) -> Result<Generation> {
    let (executor, sequence) = forward.parts();
    let mut generator = Generator::new(executor, sequence, request);
    while let Some(token) = generator.next(executor, sampler)? {
        if each(token).is_break() {
            generator.stop();
        }
    }
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
