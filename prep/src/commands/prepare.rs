//! `flashlm-prep prepare`: everything from a checkpoint to a bundle, in one command.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use flashlm::budget::human_bytes;
use flashlm_prep::gain::{self, verdict};
use flashlm_prep::pipeline::{Event, Outcome, Preparation, PrepareOptions, Prepared, Task};

use super::formats::FormatArgs;
use super::source::{self, CHECKPOINT_HELP};
use super::{Stage, numbers, thresholds};

/// Arguments of `flashlm-prep prepare`.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    flashlm-prep prepare /models/opt-1.3b --text calibration.txt -o opt-1.3b.flashlm\n  \
    flashlm-prep prepare /models/opt-1.3b -o opt-1.3b.flashlm          (the model generates its own calibration text)\n  \
    flashlm-prep prepare facebook/opt-1.3b@main -o opt-1.3b.flashlm    (downloaded from the Hugging Face Hub)\n\n\
    After an interruption the same command resumes. HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_ENDPOINT and HF_HUB_OFFLINE are honoured.\n\
     Text of the kind that the model will be used for makes the best predictors.")]
pub(crate) struct PrepareArgs {
    #[arg(value_name = "CHECKPOINT", help = CHECKPOINT_HELP)]
    checkpoint: PathBuf,
    /// The bundle to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
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
        Ok(PrepareOptions {
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
            ..PrepareOptions::new(&self.checkpoint, &self.output)
        })
    }
}

pub(crate) fn run(args: &PrepareArgs) -> Result<ExitCode> {
    let begin = Instant::now();
    let (options, shown) = (args.options()?, Shown::default());
    let observer = |event: Event<'_>| shown.see(event);
    // All that can be refused is, before a checkpoint is fetched.
    let preparation = Preparation::begin(&options, &observer)?;
    let prepared = preparation.run(source::open(&args.checkpoint)?)?;
    print_result(args, &prepared, begin);
    Ok(ExitCode::SUCCESS)
}

fn print_result(args: &PrepareArgs, prepared: &Prepared, begin: Instant) {
    let output = args.output.display();
    if prepared.outcome == Outcome::UpToDate {
        eprintln!("{output} is up to date");
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
    if admitted > gain::POINTLESS {
        let pointless = gain::pointless(admitted, &args.checkpoint, &args.output);
        eprintln!("note: {:.1} % of the neurons are active on average, but {pointless}", 100.0 * active);
    }
}

/// Shows what happens: a bar for each task, and lines above it.
#[derive(Default)]
struct Shown(Mutex<Option<Stage>>);

impl Shown {
    fn see(&self, event: Event<'_>) {
        let mut stage = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Began(task) => *stage = Some(bar(task)),
            Event::Ended => *stage = None,
            Event::Progress { done, total } => {
                if let Some(stage) = &*stage {
                    stage.set(done, total);
                }
            }
            event => {
                for line in lines(event) {
                    match &*stage {
                        Some(stage) => stage.say(&line),
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
        Task::MeasuringThresholds | Task::Rounding => Stage::share(name),
        Task::WritingText => Stage::new(name, "tokens", 0),
        Task::ChoosingRanks | Task::PreparingLayers => Stage::new(name, "tokens x layers x 2", 0),
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
