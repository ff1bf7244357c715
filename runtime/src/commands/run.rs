//! `flashlm run`: text in, text out, and what it cost.

mod conversation;
mod prompt;
mod saved;
mod session;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use flashlm::budget::{counted, human_bytes};
use flashlm::engine::check_ids;
use flashlm::error::{hints, longest};
use flashlm::memory;
use flashlm::text::Tokenizer;
use flashlm::{ModelOptions, Percentiles, Report, Sampling, signals, terminal};
use serde_json::json;

use conversation::converse;
use prompt::prompt_ids;
use saved::SavedIn;

use super::values::{non_negative, positive, share};
use super::{GuessArgs, ModelArgs, open_bundle, parse_ids, say_chosen, with_figures, with_progress};

/// Arguments of `flashlm run`.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    flashlm run model.flashlm --prompt \"Once upon a time\" -n 64\n  \
    flashlm run model.flashlm --memory 50% --prompt-file story.txt --temperature 0.7 --top-p 0.9 --seed 1\n  \
    flashlm run model.flashlm --prompt \"Once upon a time\" --draft small.flashlm\n  \
    echo \"Once upon a time\" | flashlm run model.flashlm --prompt-file - --json\n  \
    flashlm run model.flashlm --session manual.kv --prompt-file manual-and-question.txt\n  \
    flashlm run model.flashlm            (on a terminal: a conversation; Ctrl-D ends it)")]
pub(crate) struct RunArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    guesses: GuessArgs,
    /// Text to continue
    #[arg(long, value_name = "TEXT", group = "input", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// File with the text to continue (a final newline and a byte order mark are removed); - for standard input
    #[arg(long, value_name = "FILE", group = "input")]
    prompt_file: Option<PathBuf>,
    /// Token ids to continue, such as 2,713,16; nothing is added to them
    #[arg(long, value_name = "IDS", group = "input", value_parser = parse_ids)]
    ids: Option<std::vec::Vec<u32>>,
    /// Generate at most this many tokens
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128)]
    tokens: usize,
    /// Size of the KV cache in tokens [default: prompt + n; in a conversation what the model allows, at most 2048]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Randomness of the choice; 0 always picks the likeliest token
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
    /// Seed of the random choice [default: a new one every time, which is shown]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Stop before this text appears, or at this special token; may be given several times
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, value_parser = clap::builder::NonEmptyStringValueParser::new())]
    stop: Vec<String>,
    /// Continue after the model ends its text (on EOS)
    #[arg(long)]
    ignore_eos: bool,
    /// Begin with what FILE has of the prompt instead of computing it again, and save the text there in the end, with its keys and
    /// values: as many bytes as it takes of the KV cache. Without a prompt, go on with the conversation that FILE has
    #[arg(long, value_name = "FILE")]
    session: Option<PathBuf>,
    /// Print one JSON object per token, and a last one with the figures
    #[arg(long)]
    json: bool,
    /// Show the memory plan and what was chosen
    #[arg(short, long)]
    verbose: bool,
}

pub(crate) fn run(mut args: RunArgs) -> Result<ExitCode> {
    super::watch_signals()?;
    // Until there is text, nothing is lost.
    signals::end_at_once(true);
    choose_seed(&mut args);
    let mut options = ModelOptions::of(open_bundle(&args.model.bundle)?)?;
    let max = options.bundle().spec().max_positions;
    let prompt = prompt_ids(&args, options.tokenizer(), prompt_room(&args, max)?, max)?;
    if let Some(prompt) = &prompt {
        check_ids(options.bundle().spec(), prompt)?;
    }
    let context = context(&args, max, prompt.as_deref())?;
    say_hidden_specials(&args, options.tokenizer());
    *options.options_mut() = args.model.options(options.bundle(), context)?;
    options = options.speculate(args.guesses.speculate);
    if let Some(draft) = &args.guesses.draft {
        options = options.draft(draft)?;
    }
    let saved = args.session.as_deref().map(|path| SavedIn::take(path, &args, &options)).transpose()?;
    let model = with_progress(|progress| options.load_with(progress))?;
    say_chosen(model.plan(), model.notices(), args.verbose);
    let mut session = model.session()?.sampling(sampling(&args)).speculate(args.guesses.speculate);
    session = session.max_tokens(args.tokens);
    if args.ignore_eos {
        session = session.ignore_eos();
    }
    session = args.stop.iter().fold(session, |session, stop| session.stop(stop));
    match prompt {
        Some(prompt) => {
            let had = saved.as_ref().map_or(Ok(0), |saved| saved.resume(&mut session, &prompt))?;
            let (figures, rest) = session::turn(&mut session, &prompt[had..], &args)?;
            report(&args, &figures, &rest, had)?;
        }
        None => {
            saved.as_ref().map_or(Ok(()), |saved| saved.restore(&mut session))?;
            converse(&mut session, &args)?;
        }
    }
    saved.map_or(Ok(()), |saved| saved.save(&mut session))?;
    Ok(signals::asked().map_or(ExitCode::SUCCESS, ExitCode::from))
}

/// Draws a seed where one is needed and none was given, and says which.
fn choose_seed(args: &mut RunArgs) {
    if args.temperature > 0.0 && args.seed.is_none() {
        // Short enough to be typed.
        let drawn = RandomState::new().build_hasher().finish() % 1_000_000_000;
        args.seed = Some(drawn);
        if !args.json {
            eprintln!("seed {drawn}: --seed {drawn} gives the same text again");
        }
    }
}

/// Says which stop strings hold special tokens, which have no text to be found in. One that is a special token ends at that.
fn say_hidden_specials(args: &RunArgs, tokenizer: &Tokenizer) {
    for stop in args.stop.iter().filter(|stop| tokenizer.special_id(stop).is_none()) {
        for token in tokenizer.specials_in(stop) {
            eprintln!(
                "note: --stop {stop:?} holds the special token {token}, which has no text, so it is only found where the model \
                spells it out; --stop {token:?} ends at the token itself"
            );
        }
    }
}

/// Tokens that a prompt may have; an error if the context cannot be, before anything is read.
fn prompt_room(args: &RunArgs, max: usize) -> Result<usize> {
    match args.context {
        Some(0) => bail!("--context 0 holds nothing; leave it out for prompt + n"),
        Some(context) if context > max => {
            bail!("--context {context} is more than {}; give {max} or less", longest(max))
        }
        // The last new token is shown, not fed.
        Some(context) => Ok(context.saturating_sub(args.tokens.saturating_sub(1))),
        None => Ok(max.saturating_sub(args.tokens)),
    }
}

/// Tokens the KV cache has to hold; an error if they cannot, before anything is loaded.
fn context(args: &RunArgs, max: usize, prompt: Option<&[u32]>) -> Result<usize> {
    let Some(prompt) = prompt else { return Ok(args.context.unwrap_or(max.min(2048))) };
    let parts = format!("a prompt of {} and {} new", counted(prompt.len(), "token"), args.tokens);
    match args.context {
        Some(context) if prompt.len().saturating_add(args.tokens.saturating_sub(1)) > context => {
            let hints = hints(["a shorter prompt", "a smaller -n"], context, max);
            bail!("{parts} do not fit --context {context}; give {hints}")
        }
        Some(context) => Ok(context),
        None => match prompt.len().saturating_add(args.tokens) {
            context if context > max => {
                bail!(
                    "{parts} are more than a context may hold, {}; use a shorter prompt or a smaller -n",
                    longest(max)
                )
            }
            context => Ok(context),
        },
    }
}

fn sampling(args: &RunArgs) -> Sampling {
    Sampling {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        repetition_penalty: args.repetition_penalty,
        seed: args.seed.unwrap_or_default(),
    }
}

/// `had`: tokens of the prompt that a saved session had.
fn report(args: &RunArgs, figures: &Report, rest: &str, had: usize) -> Result<()> {
    let decoded = figures.decode.len();
    let ms = (decoded > 0).then(|| Percentiles::of(&figures.decode));
    let reads = figures.decode_reads.per_token(decoded);
    let guesses = figures.speculation.figures(figures.decode_reads);
    let prefill_ms = figures.prefill.as_secs_f64() * 1e3;
    let peak = memory::peak();
    if args.json {
        let mut object = json!({
            "text": rest,
            "prompt_tokens": figures.prompt_tokens,
            "resumed_tokens": had,
            "tokens": figures.tokens,
            "finish": figures.finish,
            "prefill_ms": prefill_ms,
            "decode_ms_per_token": ms,
            "decode_ms": figures.decode_time().as_secs_f64() * 1e3,
            "speculation": guesses,
            "read_cost": figures.read_cost,
            "peak_memory_bytes": peak.bytes,
            "peak_memory_program_bytes": peak.program_bytes,
            "cgroup_peak_bytes": peak.cgroup_bytes,
        });
        if args.temperature > 0.0 {
            object["seed"] = args.seed.into();
        }
        writeln!(terminal::Printable(std::io::stdout()), "{}", with_figures(reads, object))?;
        return Ok(());
    }
    let prefill = format!(
        "prefill {} in {:.2} s ({:.1} tokens/s)",
        counted(figures.prompt_tokens, "token"),
        figures.prefill.as_secs_f64(),
        figures.prompt_tokens as f64 / figures.prefill.as_secs_f64().max(1e-9),
    );
    match ms {
        Some(ms) => eprintln!(
            "{prefill}; decode {} at {:.2} ms a token (p95 {:.2}, p99 {:.2}; {:.1} tokens/s); read {} a token",
            counted(decoded, "token"),
            ms.median,
            ms.p95,
            ms.p99,
            if ms.median > 0.0 { 1e3 / ms.median } else { 0.0 },
            human_bytes(reads.bytes_read_per_token as u64),
        ),
        None => eprintln!("{prefill}"),
    }
    if guesses.drafted > 0 {
        eprintln!(
            "{} of {} came true: {:.2} tokens and {:.2} rows a step, {:.2} ms a token on average",
            guesses.accepted,
            counted(guesses.drafted as usize, "guessed token"),
            guesses.tokens_per_step,
            guesses.rows_per_step,
            figures.decode_time().as_secs_f64() * 1e3 / decoded.max(1) as f64,
        );
    }
    if reads.read_retries > 0 {
        eprintln!(
            "{} made again: the disk failed, or the system let no thread be started for a read \
            (`ulimit -u`, a container's pids limit)",
            counted(reads.read_retries as usize, "read")
        );
    }
    let cgroup = match peak.cgroup_bytes {
        Some(bytes) => format!("; that of its memory cgroup, with all that is in it, {}", human_bytes(bytes)),
        None => String::new(),
    };
    eprintln!(
        "peak memory {}, of which {} are pages of the program's file{cgroup}",
        human_bytes(peak.bytes),
        human_bytes(peak.program_bytes)
    );
    Ok(())
}
