//! `flashlm run`: text in, text out, and what it cost.

use std::io::{IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use flashlm_formats::bundle::Bundle;
use flashlm_runtime::budget::human_bytes;
use flashlm_runtime::generate::{Finish, Generation, NewToken, Percentiles, Request, generate};
use flashlm_runtime::memory::{self, PeakMemory};
use flashlm_runtime::model::forward::{Forward, check_ids};
use flashlm_runtime::sampler::{Sampler, Sampling};
use flashlm_runtime::text::{StopStrings, TextStream, Tokenizer};
use flashlm_runtime::{signals, terminal};
use serde_json::json;

use super::{ModelArgs, load_with_progress, parse_ids, with_figures};

/// Arguments of `flashlm run`.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    flashlm run model.flashlm --prompt \"Once upon a time\" -n 64\n  \
    flashlm run model.flashlm --memory 50% --prompt-file story.txt --temperature 0.7 --top-p 0.9 --seed 1\n  \
    echo \"Once upon a time\" | flashlm run model.flashlm --prompt-file - --json\n  \
    flashlm run model.flashlm            (on a terminal: a conversation; Ctrl-D ends it)")]
pub(crate) struct RunArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to continue
    #[arg(long, value_name = "TEXT", group = "input")]
    prompt: Option<String>,
    /// File with the text to continue; - for standard input
    #[arg(long, value_name = "FILE", group = "input")]
    prompt_file: Option<PathBuf>,
    /// Token ids to continue, like 2,713,16; taken as they are
    #[arg(long, value_name = "IDS", group = "input", value_parser = parse_ids)]
    ids: Option<std::vec::Vec<u32>>,
    /// Tokens to generate at most
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128)]
    tokens: usize,
    /// Tokens the KV cache holds [default: prompt + n; in a conversation what the model allows, at most 2048]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Randomness of the choice; 0 takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = non_negative)]
    temperature: f32,
    /// Choose among the K likeliest tokens only; 0 for all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Choose among the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = share)]
    top_p: f32,
    /// Make tokens already seen less likely; 1 changes nothing
    #[arg(long, value_name = "R", default_value_t = 1.0, value_parser = positive)]
    repetition_penalty: f32,
    /// Seed of the random choice
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// End before this text appears; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on when the model ends its text
    #[arg(long)]
    ignore_eos: bool,
    /// One JSON object per token and a last one with the figures
    #[arg(long)]
    json: bool,
    /// Show the memory plan and what was chosen
    #[arg(short, long)]
    verbose: bool,
}

fn number(text: &str) -> Result<f32, String> {
    text.parse().ok().filter(|v: &f32| v.is_finite()).ok_or_else(|| format!("`{text}` is not a number"))
}

fn non_negative(text: &str) -> Result<f32, String> {
    number(text).and_then(|v| if v >= 0.0 { Ok(v) } else { Err("must not be negative".into()) })
}

fn positive(text: &str) -> Result<f32, String> {
    number(text).and_then(|v| if v > 0.0 { Ok(v) } else { Err("must be above 0".into()) })
}

fn share(text: &str) -> Result<f32, String> {
    number(text).and_then(|v| if v > 0.0 && v <= 1.0 { Ok(v) } else { Err("must be above 0 and at most 1".into()) })
}

pub(crate) fn run(args: RunArgs) -> Result<ExitCode> {
    super::watch_signals()?;
    // Until there is text, nothing is lost.
    signals::end_at_once(true);
    let bundle = Bundle::open(&args.model.bundle)?;
    let tokenizer = Tokenizer::of(&bundle)?;
    let prompt = prompt_ids(&args, &tokenizer)?;
    if let Some(prompt) = &prompt {
        check_ids(bundle.spec(), prompt)?;
    }
    let context = context(&args, bundle.spec().max_positions, prompt.as_deref())?;
    let loaded = load_with_progress(&bundle, &args.model, context, args.verbose)?;
    let mut session = Session {
        forward: loaded.forward,
        sampler: Sampler::new(sampling(&args), bundle.spec().vocab_size),
        tokenizer: &tokenizer,
        stream: tokenizer.stream(&[]),
        eos: if args.ignore_eos { &[] } else { &bundle.spec().eos },
        args: &args,
        unfed: None,
    };
    match prompt {
        Some(prompt) => {
            let (figures, rest) = session.turn(&prompt, args.tokens)?;
            report(&args, &figures, &rest)?;
        }
        None => converse(&mut session)?,
    }
    Ok(signals::asked().map_or(ExitCode::SUCCESS, ExitCode::from))
}

/// Tokens the KV cache has to hold; an error if they cannot, before anything is loaded.
fn context(args: &RunArgs, max: usize, prompt: Option<&[u32]>) -> Result<usize> {
    let context = match (args.context, prompt) {
        (Some(0), _) => bail!("--context 0 holds nothing; leave it out for prompt + n"),
        // The last new token is shown, not fed.
        (Some(context), Some(prompt)) if prompt.len().saturating_add(args.tokens.saturating_sub(1)) > context => bail!(
            "a prompt of {} tokens and {} new ones do not fit --context {context}; give a larger one, a shorter prompt or a smaller -n",
            prompt.len(),
            args.tokens
        ),
        (Some(context), _) => context,
        (None, Some(prompt)) => prompt.len().saturating_add(args.tokens),
        (None, None) => max.min(2048),
    };
    if context > max {
        bail!(
            "a context of {context} tokens is more than the {max} that this model was made for; use a shorter prompt or a smaller -n"
        );
    }
    Ok(context)
}

fn sampling(args: &RunArgs) -> Sampling {
    Sampling {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        repetition_penalty: args.repetition_penalty,
        seed: args.seed,
    }
}

/// The ids to start from; `None` on a terminal without a prompt.
fn prompt_ids(args: &RunArgs, tokenizer: &Tokenizer) -> Result<Option<Vec<u32>>> {
    if let Some(ids) = &args.ids {
        return Ok(Some(ids.clone()));
    }
    let text = match (&args.prompt, &args.prompt_file) {
        (Some(text), _) => text.clone(),
        (None, Some(path)) => read_prompt(path)?,
        (None, None) if std::io::stdin().is_terminal() && !args.json => return Ok(None),
        (None, None) => {
            bail!("no prompt: give --prompt TEXT, --prompt-file FILE (- for standard input) or --ids 2,713,16")
        }
    };
    let ids = tokenizer.encode(&text)?;
    say(tokenizer, &ids);
    Ok(Some(ids))
}

/// Says what the writer of a prompt may not have meant.
fn say(tokenizer: &Tokenizer, ids: &[u32]) {
    for notice in tokenizer.notices(ids) {
        eprintln!("note: {notice}");
    }
}

fn read_prompt(path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    if path == Path::new("-") {
        std::io::stdin().read_to_end(&mut bytes).context("cannot read the prompt from standard input")?;
    } else {
        bytes = std::fs::read(path).with_context(|| format!("cannot read the prompt from {}", path.display()))?;
    }
    String::from_utf8(bytes).with_context(|| format!("the prompt in {} is not UTF-8 text", path.display()))
}

struct Session<'a> {
    forward: Forward,
    sampler: Sampler,
    tokenizer: &'a Tokenizer,
    stream: TextStream<'a>,
    eos: &'a [u32],
    args: &'a RunArgs,
    /// The last token that was shown and not fed: the next turn begins with it.
    unfed: Option<u32>,
}

impl Session<'_> {
    /// Feeds `prompt` and shows what follows, as it comes; returns what it cost and the text that only its end let out.
    fn turn(&mut self, ids: &[u32], tokens: usize) -> Result<(Generation, String)> {
        let prompt: Vec<u32> = self.unfed.take().into_iter().chain(ids.iter().copied()).collect();
        let mut out = std::io::stdout().lock();
        self.stream.prompt(ids);
        let stream = &mut self.stream;
        let mut stops = StopStrings::new(self.args.stop.clone());
        let mut failure = None;
        let json = self.args.json;
        let mut show = |token: &NewToken, text: &str| -> std::io::Result<()> {
            if json {
                let ms = token.time.as_secs_f64() * 1e3;
                let more = json!({ "id": token.id, "text": text, "ms": ms });
                writeln!(terminal::Printable(&mut out), "{}", with_figures(token.reads.per_token(1), more))?;
            } else {
                out.write_all(terminal::text_for(&out, text).as_bytes())?;
            }
            out.flush()
        };
        let request = Request { prompt: &prompt, tokens, eos: self.eos };
        let mut last = None;
        let generation = generate(&mut self.forward, &mut self.sampler, &request, &mut |token| {
            last = Some(token.id);
            signals::end_at_once(false);
            let (text, stopped) = stops.push(&stream.push(token.id));
            if let Err(error) = show(&token, &text) {
                failure = Some(error);
                return ControlFlow::Break(());
            }
            if stopped || signals::asked().is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        if let Some(error) = failure {
            return Err(error).context("cannot write the text to standard output");
        }
        // What ended at the model's own will was fed whole.
        self.unfed = last.filter(|_| generation.finish != Finish::Eos);
        // What was held back: the beginning of a stop string, or of a character.
        let mut rest = String::new();
        if generation.finish != Finish::Stopped || signals::asked().is_some() {
            let (text, stopped) = stops.push(&stream.rest());
            rest = if stopped { text } else { text + &stops.finish() };
        }
        if !json {
            writeln!(out, "{}", terminal::text_for(&out, &rest))?;
            out.flush()?;
        }
        Ok((generation, rest))
    }
}

/// Turn by turn on a terminal; the KV cache is kept.
fn converse(session: &mut Session<'_>) -> Result<()> {
    eprintln!("Type text for the model to continue. Ctrl-C ends a turn, Ctrl-D the conversation.");
    let mut line = String::new();
    loop {
        eprint!("> ");
        line.clear();
        signals::end_at_once(true);
        let read = std::io::stdin().read_line(&mut line).context("cannot read from the terminal")?;
        signals::end_at_once(false);
        if read == 0 {
            eprintln!();
            return Ok(());
        }
        let text = line.trim_end_matches(['\n', '\r']);
        let mut ids = session.tokenizer.encode_bare(text)?;
        if ids.is_empty() {
            continue;
        }
        if session.forward.is_empty() {
            // The beginning of a text; later turns go on with it.
            ids = session.tokenizer.encode(text)?;
            say(session.tokenizer, &ids);
        }
        let left = session.forward.context() - session.forward.len() - usize::from(session.unfed.is_some());
        if ids.len() >= left {
            eprintln!(
                "{} tokens do not fit the {left} left of the context; start again, or with a larger --context",
                ids.len()
            );
            continue;
        }
        let tokens = session.args.tokens.min(left - ids.len());
        let (figures, rest) = session.turn(&ids, tokens)?;
        report(session.args, &figures, &rest)?;
        signals::forget_interrupt();
        if signals::asked().is_some() {
            return Ok(());
        }
    }
}

fn report(args: &RunArgs, figures: &Generation, rest: &str) -> Result<()> {
    let ms = Percentiles::of(&figures.decode);
    let reads = figures.decode_reads.per_token(figures.decode.len());
    let prefill_ms = figures.prefill.as_secs_f64() * 1e3;
    let PeakMemory { bytes: peak, source } = memory::peak();
    if args.json {
        let object = json!({
            "text": rest,
            "prompt_tokens": figures.prompt_tokens,
            "tokens": figures.tokens,
            "finish": figures.finish,
            "prefill_ms": prefill_ms,
            "decode_ms_per_token": ms,
            "peak_memory_bytes": peak,
            "memory_source": source,
        });
        writeln!(terminal::Printable(std::io::stdout()), "{}", with_figures(reads, object))?;
        return Ok(());
    }
    eprintln!(
        "prefill {} tokens in {:.2} s ({:.1} tokens/s); decode {} tokens at {:.2} ms a token (p95 {:.2}, p99 {:.2}; {:.1} tokens/s)",
        figures.prompt_tokens,
        figures.prefill.as_secs_f64(),
        figures.prompt_tokens as f64 / figures.prefill.as_secs_f64().max(1e-9),
        figures.decode.len(),
        ms.median,
        ms.p95,
        ms.p99,
        if ms.median > 0.0 { 1e3 / ms.median } else { 0.0 },
    );
    eprintln!(
        "read {} a token; peak memory {} ({source})",
        human_bytes(reads.bytes_read_per_token as u64),
        human_bytes(peak)
    );
    Ok(())
}
