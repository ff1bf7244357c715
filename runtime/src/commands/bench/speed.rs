//! The speed of a run, as people read it: tokens a second, what bounds them, and what more memory would give.

use std::io::{self, Write};

use flashlm::budget::human_bytes;
use flashlm::options::LoadOptions;
use flashlm::plan::{Expectation, plan};
use flashlm_formats::bundle::Bundle;
use serde_json::Value;

/// A share of a token's time that is worth doing something about.
const MUCH: f64 = 0.15;
/// So much memory more is tried: an eighth of the model, in steps of 0.1 GB.
const MORE_OF_MODEL: u64 = 8;
const MORE_STEP: u64 = 100_000_000;

/// What one run showed, of the step's summary, and where its neurons came from.
pub(super) struct Speed<'a> {
    pub(super) step: &'a Value,
    pub(super) source: &'a str,
    pub(super) prompt_tokens: u64,
}

impl Speed<'_> {
    /// Writes it, at most 80 columns wide.
    pub(super) fn write(&self, out: &mut impl Write, model: &str, verdict: &[String]) -> io::Result<()> {
        let number = |value: &Value| value.as_f64().unwrap_or(0.0);
        let (step, prompt_ms) = (self.step, number(&self.step["prefill_ms"]));
        let ms = number(&step["decode_ms_per_token"]["median"]);
        let rate = |tokens: f64, ms: f64| short(tokens / ms.max(1e-9) * 1e3);
        writeln!(out, "{model}")?;
        writeln!(
            out,
            "prompt      {:>9} tokens/s   {} tokens in {} s",
            rate(self.prompt_tokens as f64, prompt_ms),
            self.prompt_tokens,
            short(prompt_ms / 1e3)
        )?;
        writeln!(
            out,
            "generation  {:>9} tokens/s   {} ms a token, 99 of 100 within {} ms",
            rate(1.0, ms),
            short(ms),
            short(number(&step["decode_ms_per_token"]["p99"]))
        )?;
        verdict.iter().try_for_each(|line| writeln!(out, "{line}"))
    }

    /// What bounds it, and what more memory would give, each on a line.
    pub(super) fn verdict(&self, bundle: &Bundle, options: &LoadOptions, budget: u64, dram: f64) -> Vec<String> {
        let number = |key: &str| self.step[key].as_f64().unwrap_or(0.0);
        let ms = self.step["decode_ms_per_token"]["median"].as_f64().unwrap_or(0.0).max(1e-9);
        let (waits, limit) = (number("io_wait_ms") / ms, number("dram_limit_ms") / ms);
        let read = human_bytes(number("bytes_read_per_token") as u64);
        let mut lines = Vec::new();
        if self.source == "resident" {
            lines.push(format!(
                "All in memory ({:.0} % of what reading it allows): more memory gives nothing.",
                limit * 100.0
            ));
            return lines;
        }
        lines.push(if waits > MUCH {
            format!("Disk-bound: waits {:.0} % of the time for {read} a token.", waits.min(1.0) * 100.0)
        } else if limit > 0.5 {
            format!("Memory-bound: {:.0} % of what reading memory allows; {read} a token from disk.", limit * 100.0)
        } else {
            format!("Compute-bound: reads ({read} a token) keep up with it.")
        });
        lines.extend(with_more(bundle, options, budget, dram));
        lines
    }
}

/// What more memory is expected to give.
fn with_more(bundle: &Bundle, options: &LoadOptions, budget: u64, dram: f64) -> Option<String> {
    let more = (bundle.manifest().model_bytes / MORE_OF_MODEL).next_multiple_of(MORE_STEP);
    let ms = |budget| {
        let planned = plan(bundle, &LoadOptions { budget: Some(budget), ..options.clone() }).ok()?;
        let (least, most) = Expectation::new(bundle, &planned, options.context)?.ms_per_token(dram);
        Some((least + most) / 2.0)
    };
    let times = ms(budget)? / ms(budget + more)?;
    let more = human_bytes(more);
    Some(match times {
        times if times < 1.0 + MUCH => format!("With {more} more memory it is expected to be hardly faster."),
        times => format!("With {more} more memory it is expected to be {times:.1} times as fast."),
    })
}

/// A number to three digits.
fn short(value: f64) -> String {
    match value {
        v if v >= 99.95 => format!("{v:.0}"),
        v if v >= 9.995 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits() {
        let all = [(0.0, "0.00"), (9.99, "9.99"), (9.996, "10.0"), (99.94, "99.9"), (99.96, "100"), (1234.5, "1234")];
        for (value, said) in all {
            assert_eq!(short(value), said);
        }
    }
}
