//! `flashlm-prep thresholds`: what can be left out of a model whose neurons are never exactly zero, and at what loss.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use flashlm::budget::human_bytes;
use flashlm::text::Tokenizer;
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::destination::{Destination, FileKind};
use flashlm_formats::thresholds::{Measured, ThresholdFile};
use flashlm_prep::gain;
use flashlm_prep::record::Calibration;
use flashlm_prep::record::text::Sampling;
use flashlm_prep::thresholds::{VERIFIED, default_tokens, find_thresholds};

use super::source::{self, CHECKPOINT_HELP};
use super::{Stage, inputs, numbers, say_notes};

/// Arguments of `flashlm-prep thresholds`.
#[derive(Args)]
#[command(
    after_help = "Example:\n  flashlm-prep thresholds /models/mistral-7b --text calibration.txt --quality-loss 2% -o thresholds.json\n\n\
    Thresholds are chosen on half of the documents and verified on the others, which are held out. `prepare` does this by itself; \
    `record` and `pack` take the file. See docs/thresholds.md."
)]
pub(crate) struct ThresholdsArgs {
    #[arg(value_name = "CHECKPOINT", help = CHECKPOINT_HELP)]
    checkpoint: PathBuf,
    /// Calibration text: files (.txt with documents between lines <|endoftext|>, .jsonl) or directories of them
    #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
    text: Vec<PathBuf>,
    /// Perplexity that may be lost by leaving out weak neurons
    #[arg(long, value_name = "PERCENT", default_value = "1%", value_parser = numbers::percent)]
    quality_loss: f64,
    /// The file to write; without it the table is only shown
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Measure on at most this many tokens [default: 4096; for hidden sizes of 2048 and above 2048]
    #[arg(long, value_name = "N", value_parser = numbers::tokens)]
    tokens: Option<usize>,
    /// Longest sequence
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = numbers::sequence)]
    sequence_tokens: usize,
    /// Order in which documents are taken; 0 keeps the files' order
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Threads that compute [default: all processors]
    #[arg(long, value_name = "N", value_parser = flashlm::command_line::thread_count)]
    threads: Option<NonZeroUsize>,
    /// Directory for scratch files [default: the system's]
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &ThresholdsArgs) -> Result<ExitCode> {
    let inputs = inputs([&args.checkpoint].into_iter().chain(&args.text));
    let output = args.output.as_ref().map(|path| Destination::take(path, FileKind::Thresholds, &inputs)).transpose()?;
    let checkpoint = source::open(&args.checkpoint)?;
    let spec = checkpoint.spec();
    let tokenizer = Tokenizer::from_json(&super::tokenizer(&checkpoint)?)?;
    let tokens = args.tokens.unwrap_or(default_tokens(spec));
    eprintln!(
        "{}",
        gain::dense_by_nature(spec).unwrap_or_else(|| {
            "most neurons of this model can be exactly zero by themselves (`record` counts them): thresholds leave out weak ones as well"
                .into()
        })
    );
    let sampling = Sampling { tokens, sequence_tokens: args.sequence_tokens, seed: args.seed, held_out: VERIFIED };
    let calibration = Calibration::new(&super::documents(&args.text)?, &tokenizer, spec, sampling)?;
    say_notes(&calibration.notes);
    let scratch = args.scratch.clone().unwrap_or_else(std::env::temp_dir);
    let (threads, stage) = (super::threads(args.threads)?, Stage::share("measuring thresholds"));
    let progress = &mut |done, total| stage.set(done, total);
    let measured = find_thresholds(&checkpoint, &calibration, args.quality_loss, &threads, &scratch, progress)?;
    drop(stage);
    let file = ThresholdFile::new(&checkpoint, measured);
    if let Some(output) = output {
        output.publish_bytes(&file.to_json())?;
    }
    if args.json {
        println!("{}", String::from_utf8_lossy(&file.to_json()).trim_end());
    } else {
        for line in table(&file.measured, &checkpoint) {
            println!("{line}");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Quality against sparsity, and what the choice means.
pub(crate) fn table(measured: &Measured, checkpoint: &Checkpoint) -> Vec<String> {
    let Measured { positions, perplexity, levels, loss_allowed, active, .. } = measured;
    let spec = checkpoint.spec();
    let mut lines = vec![
        format!("{positions} positions, perplexity {perplexity:.3}; with the weakest neurons of every layer left out:"),
        "  energy cut   neurons left   perplexity     loss   same likeliest token".into(),
    ];
    for level in levels {
        lines.push(format!(
            "  {:>9.2}%  {:>12.1}%  {:>11.3}  {:>+6.2}%  {:>20.1}%",
            100.0 * level.cut,
            100.0 * level.active,
            level.perplexity,
            100.0 * (level.perplexity / perplexity - 1.0),
            100.0 * level.top1_agreement
        ));
    }
    let ffn =
        spec.ffn().vectors() * spec.ffn().size * spec.hidden_size * spec.layers.len() * checkpoint.ffn_dtype().bytes();
    let mean = measured.mean_active();
    let share = |of: Option<f64>| 100.0 * of.unwrap_or(0.0);
    lines.push(format!(
        "At a loss of {:.1} % a token needs {:.1} % of the neurons ({:.1} to {:.1} % by layer): {} of {} before caching, if \
         predictors find just them.",
        100.0 * loss_allowed,
        100.0 * mean,
        share(active.iter().copied().reduce(f64::min)),
        share(active.iter().copied().reduce(f64::max)),
        human_bytes((mean * ffn as f64) as u64),
        human_bytes(ffn as u64)
    ));
    if let Some(verified) = &measured.verified {
        lines.push(format!(
            "On held-out documents it costs {:+.2} % of perplexity, with a standard error of {:.2} % ({} positions, {:.3} to {:.3}).",
            100.0 * verified.loss,
            100.0 * verified.error,
            verified.positions,
            verified.perplexity,
            verified.with_thresholds
        ));
    }
    lines
}
