//! `flashlm-prep convert`: a bundle without predictors, in the checkpoint's order.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use flashlm::budget::human_bytes;
use flashlm_formats::bundle::{DEFAULT_ALIGNMENT, DEFAULT_GROUP_BYTES, LayoutOptions};
use flashlm_prep::pack::{PackOptions, Packed, pack};
use serde_json::json;

use super::formats::FormatArgs;
use super::rounding::CalibrateArgs;
use super::source::{self, CHECKPOINT_HELP};
use super::{Stage, inputs, reserve_bundle};

/// Arguments of `flashlm-prep convert`.
#[derive(Args)]
#[command(after_help = "Examples:\n  flashlm-prep convert /models/opt-1.3b -o opt-1.3b.flashlm\n  \
    flashlm-prep convert facebook/opt-1.3b -o opt-1.3b.flashlm\n\n\
    The source is only read. The bundle appears under its name when it is complete; an interrupted run leaves nothing that opens.")]
pub(crate) struct ConvertArgs {
    #[arg(value_name = "CHECKPOINT", help = CHECKPOINT_HELP)]
    checkpoint: PathBuf,
    /// The bundle to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Replace an existing bundle
    #[arg(long)]
    force: bool,
    /// Alignment of groups in bytes: what direct reads of the disk need
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_ALIGNMENT)]
    alignment: usize,
    /// A group holds as many records as fit into this
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_GROUP_BYTES)]
    group_bytes: usize,
    #[command(flatten)]
    formats: FormatArgs,
    #[command(flatten)]
    calibrate: CalibrateArgs,
    /// Print what was written as a JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &ConvertArgs) -> Result<ExitCode> {
    super::start_pool(None)?;
    let inputs = inputs([&args.checkpoint].into_iter().chain(&args.calibrate.calibrate));
    let reserved = reserve_bundle(&args.output, &inputs, args.force)?;
    let checkpoint = source::open(&args.checkpoint)?;
    for note in checkpoint.notes() {
        eprintln!("note: {note}");
    }
    let tokenizer = super::tokenizer(&checkpoint)?;
    let rounded = args.calibrate.rounded(&checkpoint, &tokenizer, args.formats, &args.output)?;
    let options = PackOptions {
        layout: LayoutOptions { alignment: args.alignment, group_bytes: args.group_bytes },
        tokenizer,
        ffn: args.formats.dtype,
        resident: args.formats.resident(),
        rounded,
        overwrite: args.force,
        ..PackOptions::default()
    };
    let stage = Stage::bytes("converting");
    drop(reserved);
    let Packed { manifest, parts } =
        pack(&checkpoint, &args.output, options, &mut |done, total| stage.set(done, total))?;
    drop(stage);
    super::note_wide_kv(&manifest);
    let bytes = std::fs::metadata(&args.output)?.len();
    if args.json {
        println!("{}", json!({ "output": args.output, "bytes": bytes, "manifest": manifest, "parts": parts }));
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!(
        "wrote {}: {} ({}, {} of weights)",
        args.output.display(),
        human_bytes(bytes),
        manifest.model.family,
        human_bytes(manifest.model_bytes)
    );
    super::say_parts(&parts);
    Ok(ExitCode::SUCCESS)
}
