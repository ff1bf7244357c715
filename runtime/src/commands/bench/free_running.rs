//! Beside the ladder: the model's own greedy text, with guesses and without.

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::time::Duration;

use anyhow::Result;
use flashlm::engine::Forward;
use flashlm::generate::{Request, generate_with};
use flashlm::sampler::{Sampler, Sampling};
use flashlm::speculate::{Speculate, Speculation};
use serde_json::{Value, json};

use super::limits;

/// The step that has everything: the one of the ladder that it is measured with.
pub(super) const STEP: &str = "overlap";

/// Tokens after `prompt`, without guesses, with them, and without again.
pub(super) fn measure(forward: &mut Forward, prompt: &[u32], tokens: usize, how: Speculate) -> Result<Value> {
    let vocab = forward.spec().vocab_size;
    let mut run = |speculation| {
        forward.truncate(0);
        let mut sampler = Sampler::new(Sampling::default(), vocab);
        let request = Request { prompt, tokens, eos: &[], stop_ids: &[] };
        generate_with(forward, speculation, &mut sampler, &request, &mut |_| ControlFlow::Continue(()))
    };
    let before = run(None)?;
    let with = run(Some(Speculation::new(how, None)))?;
    let after = run(None)?;
    let ms = |time: Duration, tokens: usize| time.as_secs_f64() * 1e3 / tokens.max(1) as f64;
    let without = before.decode_time() + after.decode_time();
    Ok(json!({
        "ms_per_token": ms(with.decode_time(), with.decode.len()),
        "ms_per_token_without": ms(without, before.decode.len() + after.decode.len()),
        "speculation": with.speculation.figures(with.decode_reads),
    }))
}

/// What the repeats of a step say together; nothing where it was not measured.
pub(super) fn summary(rounds: &[Value]) -> Value {
    if rounds.iter().all(|round| round["free_running"].is_null()) {
        return Value::Null;
    }
    let of = |path: &[&str]| limits::of(rounds, &[&["free_running"], path].concat());
    let guesses = |key: &'static str| of(&["speculation", key]);
    json!({
        "ms_per_token": of(&["ms_per_token"]),
        "ms_per_token_without": of(&["ms_per_token_without"]),
        "tokens_per_step": guesses("tokens_per_step"),
        "rows_per_step": guesses("rows_per_step"),
        "drafted": guesses("drafted"),
        "accepted": guesses("accepted"),
        "neuron_union": guesses("neuron_union"),
        "bytes_read_per_step": guesses("bytes_read_per_step"),
    })
}

/// The same in a line.
pub(super) fn write_line(out: &mut impl Write, step: &Value) -> io::Result<()> {
    let number = |key: &str| step["free_running"][key].as_f64().unwrap_or(0.0);
    if step["free_running"].is_null() {
        return Ok(());
    }
    writeln!(
        out,
        "Its own greedy text: {:.2} ms a token with guesses, {:.2} without; {:.0} of {:.0} guesses came true, {:.2} tokens a step",
        number("ms_per_token"),
        number("ms_per_token_without"),
        number("accepted"),
        number("drafted"),
        number("tokens_per_step"),
    )
}
