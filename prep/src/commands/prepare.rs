//! `flashlm-prep prepare`: everything from a checkpoint to a bundle, in one command.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use flashlm::budget::human_bytes;
use flashlm::kept::kept_bundle;
use flashlm::terminal::printable_line;
use flashlm_formats::publish::create_directory;
use flashlm_prep::gain::{self, verdict};
use flashlm_prep::pipeline::{Event, Outcome, Preparation, PrepareOptions, Prepared, Task};
use flashlm_prep::report::Made;

use super::formats::FormatArgs;
use super::source::{self, CHECKPOINT_HELP};
use super::{Stage, numbers, thresholds};

/// Arguments of `flashlm-prep prepare`.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    flashlm-prep prepare /models/opt-1.3b --text calibration.txt -o opt-1.3b.flashlm\n  \
    flashlm-prep prepare /models/opt-1.3b           (writes opt-1.3b.flashlm here; the model generates its own calibration text)\n  \
    flashlm-prep prepare facebook/opt-1.3b          (downloaded from the Hugging Face Hub, and kept for `flashlm run facebook/opt-1.3b`)\n\n\
    After an interruption the same command resumes. HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_ENDPOINT and HF_HUB_OFFLINE are honoured.\n\
     Text of the kind that the model will be used for makes the best predictors.")]
pub(crate) struct PrepareArgs {
    #[arg(value_name = "CHECKPOINT", help = CHECKPOINT_HELP)]
    checkpoint: PathBuf,
    /// The bundle to write [default: the checkpoint's name with .flashlm, here; of a model on the Hub in the user's cache, where `flashlm
    /// run org/name` finds it]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Do not write a page with charts of what was found; it goes beside the bundle, under its name with .report.html
    #[arg(long)]
    no_report: bool,
    /// Calibration text: files or directories of .txt (documents between lines <|endoftext|>) or .jsonl (field "text") [default: text
    /// that the model generates itself]
    #[arg(long, value_name = "FILE", num_args = 1..)]
    text: Vec<PathBuf>,
    /// Tokens to calibrate on [default: 40000; for hidden sizes of 2048 and above 20000]
    #[arg(long, value_name = "N", value_parser = numbers::tokens)]
    tokens: Option<usize>,
    /// Longest sequence
    #[arg(long, value_name = "N", default_value_t = PrepareOptions::SEQUENCE_TOKENS, value_parser = numbers::sequence)]
    sequence_tokens: usize,
    /// Largest size of all predictors, as a share of the FFN's bytes
    #[arg(long, value_name = "PERCENT", default_value = "9%", value_parser = numbers::percent)]
    size_budget: f64,
    /// Memory that the bundle is to run in, as a share of the model's 16-bit size, as `flashlm run --memory` takes it: how much of it
    /// predictors are worth, and what orders are made for
    #[arg(long = "for", value_name = "PERCENT", default_value = "50%", value_parser = numbers::percent)]
    memory: f64,
    /// The disk that it is to run from: a profile, as `flashlm disk` keeps it; without one a disk of 14 us a read and 2 GB/s is assumed
    #[arg(long, value_name = "FILE")]
    disk: Option<PathBuf>,
    /// Share of the active neurons that predictors must find
    #[arg(long, value_name = "SHARE", default_value_t = PrepareOptions::RECALL, value_parser = numbers::share)]
    recall: f64,
    /// Perplexity that may be lost by leaving out weak neurons [default: 1% where no neuron is ever exactly zero (gelu, silu), none
    /// where most are]
    #[arg(long, value_name = "PERCENT", value_parser = numbers::percent)]
    quality_loss: Option<f64>,
    /// Continue even if there is nothing to gain: most neurons are needed, or the predictors tried admit more than 80 % of them
    #[arg(long)]
    anyway: bool,
    /// Also train predictors of the next layer's neurons, of this rank
    #[arg(long, value_name = "N", value_parser = numbers::count)]
    look_ahead: Option<usize>,
    /// Minutes that the model may take to generate its own calibration text
    #[arg(long, value_name = "N", default_value_t = PrepareOptions::MINUTES, value_parser = numbers::minutes)]
    minutes: u64,
    #[command(flatten)]
    formats: FormatArgs,
    /// Replace an existing bundle even if it was not packed from this work directory
    #[arg(long)]
    force: bool,
    /// Directory for intermediate files [default: the output's name with .work]
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
    /// Keep the recorded activations, in the work directory's `recording`, which analyze and report read
    #[arg(long)]
    keep_recordings: bool,
    /// Decides the sampling of documents, the training order, and self-generated calibration text
    #[arg(long, default_value_t = PrepareOptions::SEED)]
    seed: u64,
    /// Threads that compute [default: all processors]
    #[arg(long, value_name = "N", value_parser = flashlm::command_line::thread_count)]
    threads: Option<NonZeroUsize>,
}

impl PrepareArgs {
    fn options(&self) -> Result<PrepareOptions> {
        let made = || Made { model: source::name(&self.checkpoint), command: command_line(), date: today() };
        Ok(PrepareOptions {
            report: (!self.no_report).then(made),
            text: self.text.clone(),
            tokens: self.tokens,
            sequence_tokens: self.sequence_tokens,
            size_budget: self.size_budget,
            memory: self.memory,
            cost: super::read_cost(self.disk.as_deref())?,
            recall: self.recall,
            quality_loss: self.quality_loss,
            anyway: self.anyway,
            look_ahead: self.look_ahead,
            minutes: self.minutes,
            ffn: self.formats.dtype,
            resident: self.formats.resident_dtype,
            embedding: self.formats.embedding_dtype,
            force: self.force,
            work: self.work.clone(),
            keep_recordings: self.keep_recordings,
            seed: self.seed,
            threads: self.threads,
            ..PrepareOptions::new(&self.checkpoint, self.output()?)
        })
    }

    /// The bundle to write.
    fn output(&self) -> Result<PathBuf> {
        if let Some(output) = &self.output {
            return Ok(output.clone());
        }
        if let Some(name) = source::model_name(&self.checkpoint) {
            let kept = kept_bundle(&name)
                .context("no directory to keep the bundle in: give one with -o, or set FLASHLM_CACHE_DIR")?;
            let dir = kept.parent().unwrap_or(Path::new("/"));
            create_directory(dir).with_context(|| format!("cannot create {}", dir.display()))?;
            return Ok(kept);
        }
        Ok(PathBuf::from(format!("{}.flashlm", source::name(&self.checkpoint))))
    }
}

/// What was typed, as far as it can be shown on a page.
fn command_line() -> String {
    let words = std::env::args_os().skip(1).map(|word| quoted(&printable_line(&word.to_string_lossy())));
    ["flashlm-prep".to_owned()].into_iter().chain(words).collect::<Vec<_>>().join(" ")
}

/// A word as a shell reads it.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./@=,:+%".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.into()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

/// The day here.
fn today() -> String {
    jiff::ZonedDateTime::now().date().to_string()
}

pub(crate) fn run(args: &PrepareArgs) -> Result<ExitCode> {
    let begin = Instant::now();
    let (options, shown) = (args.options()?, Shown::default());
    let observer = |event: Event<'_>| shown.see(event);
    // All that can be refused is, before a checkpoint is fetched.
    let preparation = Preparation::begin(&options, &observer)?;
    let prepared = preparation.run(source::open(&args.checkpoint)?)?;
    print_result(args, &options, &prepared, begin);
    Ok(ExitCode::SUCCESS)
}

fn print_result(args: &PrepareArgs, options: &PrepareOptions, prepared: &Prepared, begin: Instant) {
    let output = options.output.display();
    if prepared.outcome == Outcome::UpToDate {
        eprintln!("{output} is up to date");
        say_next(args, &options.output, prepared.bytes);
        return;
    }
    let (active, admitted) = (prepared.active(), prepared.admitted());
    if admitted <= gain::POINTLESS {
        eprintln!("{}", verdict(active));
    }
    eprintln!(
        "wrote {output} ({}) in {:.0} s; intermediate files are in {}",
        human_bytes(prepared.bytes),
        begin.elapsed().as_secs_f64(),
        prepared.work.display()
    );
    super::say_parts(&prepared.parts);
    if let Some(report) = &prepared.report {
        eprintln!("what was found, as charts: {}", report.display());
    }
    if admitted <= gain::POINTLESS {
        say_next(args, &options.output, prepared.bytes);
        return;
    }
    let pointless = gain::pointless(admitted, &args.checkpoint, &options.output);
    eprintln!("note: {:.1} % of the neurons are active on average, but {pointless}", 100.0 * active);
}

/// A bundle of less fits anywhere, and in half of its size there is no room for what runs it.
const SMALL_BYTES: u64 = 1 << 30;

/// What to type next.
fn say_next(args: &PrepareArgs, output: &Path, bytes: u64) {
    let bundle = match source::model_name(&args.checkpoint).filter(|_| args.output.is_none()) {
        Some(name) => name.to_string(),
        None => quoted(&output.display().to_string()),
    };
    match bytes < SMALL_BYTES {
        true => eprintln!("to run it: flashlm run {bundle}"),
        false => eprintln!("to run it in half of its size in memory: flashlm run {bundle} --memory 50%"),
    }
}

/// Shows what happens: a bar for each task, whose first step may be any, and lines above it.
#[derive(Default)]
struct Shown(Mutex<Option<(Stage, bool)>>);

impl Shown {
    fn see(&self, event: Event<'_>) {
        let mut stage = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Began(task) => *stage = Some((bar(task), true)),
            Event::Ended => *stage = None,
            Event::Progress { done, total } => match &mut *stage {
                // Where an earlier run has done some of it.
                Some((stage, first)) if *first => {
                    *first = false;
                    stage.begin_at(done, total);
                }
                Some((stage, _)) => stage.set(done, total),
                None => {}
            },
            event => {
                for line in lines(event) {
                    match &*stage {
                        Some((stage, _)) => stage.say(&line),
                        None => eprintln!("{line}"),
                    }
                }
            }
        }
    }
}

fn bar(task: Task) -> Stage {
    let name = task.to_string();
    match task {
        Task::ReadingCheckpoint | Task::Verifying | Task::Packing => Stage::bytes(name),
        Task::MeasuringThresholds | Task::Rounding | Task::ChoosingRanks => Stage::share(name),
        Task::WritingText => Stage::new(name, "tokens", 0),
        Task::PreparingLayers { layers, tokens } => Stage::layers(name, layers, tokens),
    }
}

/// What is said of an event.
fn lines(event: Event<'_>) -> Vec<String> {
    match event {
        Event::Note(_) | Event::MadeAgain { .. } => vec![format!("note: {event}")],
        Event::Thresholds { measured, checkpoint } => {
            let mut lines = thresholds::table(measured, checkpoint);
            lines.push(verdict(measured.mean_active()));
            lines
        }
        event => event.to_string().lines().map(str::to_owned).collect(),
    }
}
