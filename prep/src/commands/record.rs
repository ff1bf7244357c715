//! `flashlm-prep record`: which neurons fire on a text.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use flashlm::text::Tokenizer;
use flashlm_formats::destination::{Directory, DirectoryKind};
use flashlm_formats::recording::HELD_OUT;
use flashlm_formats::thresholds::ThresholdFile;
use flashlm_prep::gain::verdict;
use flashlm_prep::record::text::Sampling;
use flashlm_prep::record::{Calibration, Recorder};

use super::source::{self, CHECKPOINT_HELP};
use super::{Stage, inputs, numbers, say_notes};

/// Arguments of `flashlm-prep record`.
#[derive(Args)]
#[command(after_help = "Example:\n  flashlm-prep record /models/opt-1.3b --text calibration.txt -o recording\n\n\
    Documents in a text file are separated by a line <|endoftext|>; a .jsonl file has one per line, in the field \"text\". A tenth of \
    the tokens is held out: whatever is made from the recording is made from the rest and judged on that tenth.\n\
    After an interruption the same command resumes after the last layer.")]
pub(crate) struct RecordArgs {
    #[arg(value_name = "CHECKPOINT", help = CHECKPOINT_HELP)]
    checkpoint: PathBuf,
    /// Calibration text: files (.txt, .jsonl) or directories of them; a document longer than a tenth of the tokens is cut
    #[arg(long, value_name = "FILE", required_unless_present = "random_ids", num_args = 1..)]
    text: Vec<PathBuf>,
    /// Seeded random token ids instead of text, for synthesized models
    #[arg(long, conflicts_with = "text")]
    random_ids: bool,
    /// Directory for the recording
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// What `thresholds` wrote, for models whose neurons are never exactly zero
    #[arg(long, value_name = "FILE")]
    thresholds: Option<PathBuf>,
    /// Record at most this many tokens
    #[arg(long, value_name = "N", default_value_t = 20_000, value_parser = numbers::tokens)]
    tokens: usize,
    /// Longest sequence
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = numbers::sequence)]
    sequence_tokens: usize,
    /// Order in which documents are taken; 0 keeps the files' order
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Threads that compute [default: all processors]
    #[arg(long, value_name = "N", value_parser = flashlm::command_line::thread_count)]
    threads: Option<NonZeroUsize>,
}

pub(crate) fn run(args: &RecordArgs) -> Result<ExitCode> {
    let inputs = inputs([&args.checkpoint].into_iter().chain(&args.text).chain(&args.thresholds));
    Directory::check(&args.output, DirectoryKind::Recording, &inputs)?;
    let mut checkpoint = source::open(&args.checkpoint)?;
    if let Some(file) = &args.thresholds {
        ThresholdFile::apply(file, &mut checkpoint)?;
    }
    let RecordArgs { tokens, sequence_tokens, seed, .. } = *args;
    let sampling = Sampling { tokens, sequence_tokens, seed, held_out: HELD_OUT };
    let calibration = if args.random_ids {
        Calibration::random(checkpoint.spec(), sampling)
    } else {
        let tokenizer = Tokenizer::from_json(&super::tokenizer(&checkpoint)?)?;
        Calibration::new(&super::documents(&args.text)?, &tokenizer, checkpoint.spec(), sampling)?
    };
    say_notes(&calibration.notes);
    let _taken = Directory::take(&args.output, DirectoryKind::Recording, &inputs)?;
    let mut recorder = Recorder::open(&checkpoint, &calibration, &args.output, super::threads(args.threads)?)?;
    for path in recorder.drop_damaged()? {
        eprintln!("note: {} is not as it was written: it is made again", path.display());
    }
    let layers = checkpoint.spec().layers.len();
    let tokens = calibration.tokens.len();
    let mut active = Vec::new();
    let first = recorder.resume_all();
    let stage = Stage::layers("recording", layers as u64, tokens as u64);
    stage.begin_at((first * tokens) as u64, (layers * tokens) as u64);
    for layer in first..layers {
        let fraction = recorder.record(layer, true, &mut |done| {
            stage.set((layer * tokens + done) as u64, (layers * tokens) as u64);
        })?;
        stage.say(&format!("layer {layer:>3}: {:5.2} % of the neurons active", 100.0 * fraction));
        active.push(fraction);
    }
    drop(stage);
    recorder.finish()?;
    if !active.is_empty() {
        let mean = active.iter().sum::<f64>() / active.len() as f64;
        eprintln!("{}", verdict(mean));
    }
    Ok(ExitCode::SUCCESS)
}
