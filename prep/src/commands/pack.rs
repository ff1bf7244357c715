//! `flashlm-prep pack`: a bundle with predictors and storage orders.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::model::ModelSpec;
use flashlm_prep::ordering::OrderFile;
use flashlm_prep::pack::{PackOptions, pack};
use flashlm_prep::predictors::assemble;
use flashlm_prep::tokenizer::tokenizer_json;
use flashlm_runtime::budget::human_bytes;

use super::{Stage, interrupt};

/// Arguments of `flashlm-prep pack`.
#[derive(Args)]
#[command(
    after_help = "Example:\n  flashlm-prep pack /models/opt-1.3b --predictors predictors --orders orders -o opt-1.3b.flashlm"
)]
pub(crate) struct PackArgs {
    /// Directory with a Hugging Face checkpoint
    #[arg(value_name = "CHECKPOINT")]
    checkpoint: PathBuf,
    /// Directory that `train` wrote
    #[arg(long, value_name = "DIR")]
    predictors: PathBuf,
    /// Directory that `order` wrote; the checkpoint's order without it
    #[arg(long, value_name = "DIR")]
    orders: Option<PathBuf>,
    /// The bundle to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Replace a bundle that is there
    #[arg(long)]
    force: bool,
}

/// The storage orders in a directory, and the strategy's name.
pub(crate) fn read_orders(dir: &Path, spec: &ModelSpec) -> Result<(String, Vec<Vec<u32>>)> {
    let files = (0..spec.layers).map(|layer| {
        OrderFile::read(dir, layer, spec.ffn.size).with_context(|| format!("storage order of layer {layer}"))
    });
    let files = files.collect::<Result<Vec<_>>>()?;
    let mut names: Vec<&str> = files.iter().map(|f| f.strategy.as_str()).collect();
    names.dedup();
    let name = names.join("+");
    Ok((name, files.into_iter().map(|f| f.order).collect()))
}

pub(crate) fn run(args: &PackArgs) -> Result<ExitCode> {
    let checkpoint = Checkpoint::open(&args.checkpoint)?;
    let spec = checkpoint.spec();
    let orders = args.orders.as_ref().map(|dir| read_orders(dir, spec)).transpose()?;
    let identity = || vec![(0..spec.ffn.size as u32).collect(); spec.layers];
    let predictors =
        assemble(&args.predictors, spec, orders.as_ref().map_or_else(identity, |o| o.1.clone()).as_slice())?;
    let options = PackOptions {
        tokenizer: tokenizer_json(&checkpoint)?,
        orders,
        predictors: Some(predictors),
        overwrite: args.force,
        stop: Some(interrupt::watch()?),
        ..PackOptions::default()
    };
    let stage = Stage::bytes("packing");
    let manifest = pack(&checkpoint, &args.output, options, &mut |done, total| stage.set(done, total))?;
    drop(stage);
    let bytes = std::fs::metadata(&args.output)?.len();
    eprintln!("wrote {}: {}, neurons in {} order", args.output.display(), human_bytes(bytes), manifest.ffn.order);
    Ok(ExitCode::SUCCESS)
}
