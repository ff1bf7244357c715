//! Prompt in, tokens out, with the time each took.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::error::Result;
use crate::model::ffn::ReadCounters;
use crate::model::forward::Forward;
use crate::sampler::Sampler;

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// As many tokens as asked for.
    Length,
    /// The model ended its text.
    Eos,
    /// The caller asked to stop.
    Stopped,
}

/// What to generate.
pub struct Request<'a> {
    /// Token ids to start from; already cached ones come before them.
    pub prompt: &'a [u32],
    /// At most so many new tokens.
    pub tokens: usize,
    /// Ids that end the text; they are not handed on.
    pub eos: &'a [u32],
}

/// What a generation cost.
#[derive(Clone, Debug)]
pub struct Generation {
    /// Why it ended.
    pub finish: Finish,
    /// The id that ended it, where one did.
    pub ended_by: Option<u32>,
    /// Tokens fed before the first new one.
    pub prompt_tokens: usize,
    /// New tokens handed on.
    pub tokens: usize,
    /// From the first prompt id in to the first sampled id out.
    pub prefill: Duration,
    /// From an id in to the next sampled id out, for every further token.
    pub decode: Vec<Duration>,
    /// What decoding read from flash.
    pub decode_reads: ReadCounters,
}

/// A new token, and what it took to get it from the one before, or from the prompt.
#[derive(Clone, Copy, Debug)]
pub struct NewToken {
    /// Its id.
    pub id: u32,
    /// From id in to sampled id out.
    pub time: Duration,
    /// What was read from flash meanwhile.
    pub reads: ReadCounters,
}

/// Feeds the prompt, then one token after another; `each` gets every new one and may stop.
///
/// The id that `each` stops at, or the last of the asked-for ones, is not fed: the cache then holds everything before it.
pub fn generate(
    forward: &mut Forward,
    sampler: &mut Sampler,
    request: &Request<'_>,
    each: &mut dyn FnMut(NewToken) -> ControlFlow<()>,
) -> Result<Generation> {
    let mut report = Generation {
        finish: Finish::Length,
        ended_by: None,
        prompt_tokens: request.prompt.len(),
        tokens: 0,
        prefill: Duration::ZERO,
        decode: Vec::with_capacity(request.tokens),
        decode_reads: ReadCounters::default(),
    };
    request.prompt.iter().for_each(|id| sampler.saw(*id));
    let mut before = forward.read_counters();
    let begin = Instant::now();
    let logits = forward.feed(request.prompt)?;
    if request.tokens == 0 {
        report.prefill = begin.elapsed();
        return Ok(report);
    }
    let mut id = sampler.choose(logits);
    report.prefill = begin.elapsed();
    let prefilled = forward.read_counters();
    let mut time = report.prefill;
    loop {
        if request.eos.contains(&id) {
            report.finish = Finish::Eos;
            report.ended_by = Some(id);
            break;
        }
        report.tokens += 1;
        let now = forward.read_counters();
        if each(NewToken { id, time, reads: now.since(before) }).is_break() {
            report.finish = Finish::Stopped;
            break;
        }
        if report.tokens == request.tokens {
            break;
        }
        before = now;
        let begin = Instant::now();
        id = sampler.choose(forward.feed(&[id])?);
        time = begin.elapsed();
        report.decode.push(time);
    }
    report.decode_reads = forward.read_counters().since(prefilled);
    Ok(report)
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
