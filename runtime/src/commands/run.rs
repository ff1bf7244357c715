//! `flashlm run`: text in, text out, and what it cost; or a conversation.

mod conversation;
#[cfg(feature = "editor")]
mod editor;
mod figures;
mod lines;
mod orders;
mod prompt;
mod saved;
mod session;
mod typed;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use flashlm::budget::{counted, human_bytes};
use flashlm::chat::ChatTemplate;
use flashlm::engine::check_ids;
use flashlm::error::{hints, longest};
use flashlm::memory;
use flashlm::text::Tokenizer;
use flashlm::{Conversation, Error, ModelOptions, Percentiles, Report, Sampling, signals, terminal};
use flashlm_formats::bundle::Bundle;
use flashlm_formats::chat::TEMPLATE_BYTES_MAX;
use serde_json::json;

use conversation::converse;
use orders::{Settings, WhenFullArg};
use prompt::{Prompt, prompt};
use saved::SavedIn;

use super::values::{non_negative, positive, share};
use super::{GuessArgs, ModelArgs, parse_ids, say_chosen, with_figures, with_progress};

/// Arguments of `flashlm run`.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    flashlm run model.flashlm --prompt \"Once upon a time\" -n 64\n  \
    flashlm run model.flashlm --memory 50% --prompt-file story.txt --temperature 0.7 --top-p 0.9 --seed 1\n  \
    flashlm run model.flashlm --prompt \"Once upon a time\" --draft small.flashlm\n  \
    echo \"Once upon a time\" | flashlm run model.flashlm --prompt-file - --json\n  \
    flashlm run model.flashlm --session manual.kv --prompt-file manual-and-question.txt\n  \
    flashlm run model.flashlm --chat --system \"Answer in one sentence.\" --prompt \"Why is the sky blue?\"\n  \
    flashlm run model.flashlm            (on a terminal: a conversation; /help lists what there is, Ctrl-D ends it)\n  \
    flashlm run model.flashlm --session chat.kv        (the same, and it goes on tomorrow)")]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) guesses: GuessArgs,
    /// Text to continue
    #[arg(long, value_name = "TEXT", group = "input", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// File with the text to continue (a final newline and a byte order mark are removed); - for standard input
    #[arg(long, value_name = "FILE", group = "input")]
    prompt_file: Option<PathBuf>,
    /// Token ids to continue, such as 2,713,16; nothing is added to them
    #[arg(long, value_name = "IDS", group = "input", value_parser = parse_ids)]
    ids: Option<std::vec::Vec<u32>>,
    /// Write prompts and what is typed as messages, by the model's chat template, and let the model answer [default: in a conversation,
    /// where the bundle has a template]
    #[arg(long, overrides_with = "no_chat", conflicts_with = "ids")]
    chat: bool,
    /// Let the model continue text, whatever template the bundle has
    #[arg(long, overrides_with = "chat")]
    no_chat: bool,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, conflicts_with = "no_chat")]
    system: Option<String>,
    /// A chat template (Jinja, as in chat_template.jinja) instead of the bundle's
    #[arg(long, value_name = "FILE", conflicts_with = "no_chat")]
    chat_template: Option<PathBuf>,
    /// In a conversation: what to do where the context is full
    #[arg(long, value_enum, value_name = "HOW", default_value = "shift")]
    when_full: WhenFullArg,
    /// In a conversation: do not keep what is typed for the arrow keys of later ones ($XDG_STATE_HOME/flashlm/history)
    #[arg(long)]
    no_history: bool,
    /// Generate at most this many tokens [default: 128; in a conversation by a chat template, until the model ends its answer]
    #[arg(short = 'n', long, value_name = "N")]
    tokens: Option<usize>,
    /// Size of the KV cache in tokens [default: prompt + n; in a conversation what the model allows, at most 2048]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Randomness of the choice; 0 always picks the likeliest token [default: what the model's publisher recommends, else 0]
    #[arg(long, value_name = "T", value_parser = non_negative)]
    temperature: Option<f32>,
    /// Choose among the K likeliest tokens only; 0 for all [default: likewise, else 0]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Choose among the likeliest tokens that together have this probability [default: likewise, else 1]
    #[arg(long, value_name = "P", value_parser = share)]
    top_p: Option<f32>,
    /// Make tokens already seen less likely; 1 changes nothing [default: likewise, else 1]
    #[arg(long, value_name = "R", value_parser = positive)]
    repetition_penalty: Option<f32>,
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
    /// Show the memory plan and what was chosen, and in a conversation what each turn cost
    #[arg(short, long)]
    verbose: bool,
}

impl RunArgs {
    /// Tokens of a turn, at most, where there is a prompt.
    fn tokens(&self) -> usize {
        self.tokens.unwrap_or(TOKENS)
    }
}

/// Tokens that are generated where nobody says how many.
const TOKENS: usize = 128;

pub(crate) fn run(args: RunArgs) -> Result<ExitCode> {
    super::watch_signals()?;
    // Until there is text, nothing is lost.
    signals::end_at_once(true);
    let mut options = ModelOptions::of(Bundle::open(&args.model.bundle)?)?;
    let sampling = sampling(&args, &options);
    let max = options.bundle().spec().max_positions;
    let is_conversation = prompt::is_conversation(&args);
    let template = template(&args, &options, is_conversation)?;
    let prompt = prompt(&args, options.tokenizer(), template.as_ref(), prompt_room(&args, max)?, max)?;
    if let Some(prompt) = &prompt {
        check_ids(options.bundle().spec(), &prompt.ids)?;
    }
    let context = context(&args, max, prompt.as_ref().map(|prompt| &*prompt.ids))?;
    say_hidden_specials(&args, options.tokenizer());
    *options.options_mut() = args.model.options(options.bundle(), context)?;
    options = options.speculate(args.guesses.speculate);
    if let Some(draft) = &args.guesses.draft {
        options = options.draft(draft)?;
    }
    let saved = args.session.as_deref().map(|path| SavedIn::take(path, &args, &options)).transpose()?;
    let model = with_progress(|progress| options.load_with(progress))?;
    say_chosen(model.plan(), model.notices(), args.verbose);
    let mut session = model.session()?.sampling(sampling).speculate(args.guesses.speculate);
    if args.ignore_eos {
        session = session.ignore_eos();
    }
    session = args.stop.iter().fold(session, |session, stop| session.stop(stop));
    let conversation = match prompt {
        Some(Prompt { ids, text, said }) => {
            session = session.max_tokens(args.tokens());
            let had = saved.as_ref().map_or(Ok(0), |saved| saved.resume(&mut session, &ids))?;
            let (figures, printer) = session::turn(&mut session, template.as_ref(), &ids, text, &args)?;
            report(&args, sampling, &figures, &printer.rest, had)?;
            let mut conversation = Conversation::new(session, template);
            if let Some(said) = said {
                conversation.set_system(args.system.clone())?;
                conversation = conversation.after(&said, &printer.text);
            }
            conversation
        }
        None => {
            // Text that nobody ends goes on for ever.
            let tokens = if template.is_some() { args.tokens } else { Some(args.tokens()) };
            session.set_max_tokens(tokens);
            let mut conversation = Conversation::new(session, template).when_full(args.when_full.into());
            saved.as_ref().map_or(Ok(()), |saved| saved.restore(&mut conversation))?;
            if args.system.is_some() {
                conversation.set_system(args.system.clone())?;
            }
            let has_seed = args.seed.is_some() || sampling.temperature > 0.0;
            converse(&mut conversation, &args, Settings { sampling, has_seed, tokens, when_full: args.when_full })?;
            conversation
        }
    };
    saved.map_or(Ok(()), |saved| saved.save(conversation))?;
    Ok(signals::asked().map_or(ExitCode::SUCCESS, ExitCode::from))
}

/// How messages are written, where they are to be.
fn template(args: &RunArgs, options: &ModelOptions, is_conversation: bool) -> Result<Option<ChatTemplate>> {
    let tokenizer = options.tokenizer();
    let chat = options.bundle().manifest().chat.as_ref();
    let is_asked = args.chat || args.system.is_some() || args.chat_template.is_some();
    let is_wanted = is_asked || is_conversation && !args.no_chat;
    if !is_wanted || args.ids.is_some() {
        return Ok(None);
    }
    let template = match &args.chat_template {
        Some(path) => {
            let text = flashlm_formats::regular::read_regular(path, TEMPLATE_BYTES_MAX as u64)
                .with_context(|| format!("cannot read the chat template {}", path.display()))?;
            let text = String::from_utf8(text).with_context(|| format!("{} is no text", path.display()))?;
            let specials = chat.iter().flat_map(|chat| chat.special_tokens.clone()).collect();
            Some(ChatTemplate::new(&text, specials, tokenizer)?)
        }
        None => chat.map(|chat| ChatTemplate::of(chat, false, tokenizer)).transpose()?.flatten(),
    };
    match template {
        None if is_asked => Err(Error::NoChatTemplate.into()),
        Some(template) => {
            if args.system.is_some() && !template.knows_system() {
                eprintln!(
                    "note: the chat template knows no system messages: what --system says goes in front of what the user says first"
                );
            }
            Ok(Some(template))
        }
        None => Ok(None),
    }
}

/// A seed that nobody gave, short enough to be typed.
fn drawn_seed() -> u64 {
    RandomState::new().build_hasher().finish() % 1_000_000_000
}

/// How tokens are chosen: as asked, else as the model's publisher recommends, which is said. A seed is drawn where one is needed and
/// none was given.
fn sampling(args: &RunArgs, options: &ModelOptions) -> Sampling {
    let defaults = options.bundle().manifest().sampling;
    let recommended = Sampling::recommended(&defaults);
    let mut sampling = Sampling {
        temperature: args.temperature.unwrap_or(recommended.temperature),
        top_k: args.top_k.unwrap_or(recommended.top_k),
        top_p: args.top_p.unwrap_or(recommended.top_p),
        repetition_penalty: args.repetition_penalty.unwrap_or(recommended.repetition_penalty),
        seed: args.seed.unwrap_or_default(),
    };
    let followed = [
        defaults.temperature.filter(|_| args.temperature.is_none()).map(|t| format!("temperature {t}")),
        defaults.top_k.filter(|_| args.top_k.is_none() && sampling.temperature > 0.0).map(|k| format!("top-k {k}")),
        defaults.top_p.filter(|_| args.top_p.is_none() && sampling.temperature > 0.0).map(|p| format!("top-p {p}")),
        defaults
            .repetition_penalty
            .filter(|_| args.repetition_penalty.is_none())
            .map(|r| format!("repetition penalty {r}")),
    ];
    let followed: Vec<String> = followed.into_iter().flatten().collect();
    if !followed.is_empty() && !args.json {
        eprintln!("as the model's publisher recommends: {}; --temperature 0 picks the likeliest", followed.join(", "));
    }
    if sampling.temperature > 0.0 && args.seed.is_none() {
        sampling.seed = drawn_seed();
        if !args.json {
            eprintln!("seed {}: --seed {} gives the same text again", sampling.seed, sampling.seed);
        }
    }
    sampling
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
        Some(context) => Ok(context.saturating_sub(args.tokens().saturating_sub(1))),
        None => Ok(max.saturating_sub(args.tokens())),
    }
}

/// Tokens the KV cache has to hold; an error if they cannot, before anything is loaded.
fn context(args: &RunArgs, max: usize, prompt: Option<&[u32]>) -> Result<usize> {
    let Some(prompt) = prompt else { return Ok(args.context.unwrap_or(max.min(2048))) };
    let parts = format!("a prompt of {} and {} new", counted(prompt.len(), "token"), args.tokens());
    match args.context {
        Some(context) if prompt.len().saturating_add(args.tokens().saturating_sub(1)) > context => {
            let hints = hints(["a shorter prompt", "a smaller -n"], context, max);
            bail!("{parts} do not fit --context {context}; give {hints}")
        }
        Some(context) => Ok(context),
        None => match prompt.len().saturating_add(args.tokens()) {
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

/// `had`: tokens of the prompt that a saved session had.
fn report(args: &RunArgs, sampling: Sampling, figures: &Report, rest: &str, had: usize) -> Result<()> {
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
        if sampling.temperature > 0.0 {
            object["seed"] = sampling.seed.into();
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
        "peak memory {}, of which {} are pages of the program's file, which the system can drop{cgroup}",
        human_bytes(peak.bytes),
        human_bytes(peak.program_bytes)
    );
    Ok(())
}
