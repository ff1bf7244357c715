//! `flashlm logits`: what the model says at every position, for comparison with other implementations.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use flashlm_formats::bundle::Bundle;
use safetensors::tensor::{Dtype, TensorView};

use super::{ModelArgs, load_with_progress, parse_ids};

/// Arguments of `flashlm logits`.
#[derive(Args)]
#[command(after_help = "Example:\n  flashlm logits model.flashlm --ids 2,713,16 -o out.safetensors --kv f32\n\n\
    The file holds one tensor `logits`, f32 [tokens, vocab].")]
pub(crate) struct LogitsArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Token ids of the sequence, like 2,713,16; taken as they are
    #[arg(long, value_name = "IDS", value_parser = parse_ids)]
    ids: std::vec::Vec<u32>,
    /// Where to write the safetensors file
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

pub(crate) fn run(args: LogitsArgs) -> Result<ExitCode> {
    let bundle = Bundle::open(&args.model.bundle)?;
    let mut loaded = load_with_progress(&bundle, &args.model, args.ids.len(), false)?;
    let vocab = bundle.spec().vocab_size;
    let mut bytes = Vec::with_capacity(args.ids.len() * vocab * 4);
    loaded.forward.feed_all(&args.ids, &mut |_, logits| {
        bytes.extend(logits.iter().flat_map(|l| l.to_le_bytes()));
        Ok(())
    })?;
    let view = TensorView::new(Dtype::F32, vec![args.ids.len(), vocab], &bytes)?;
    let file = safetensors::serialize([("logits", view)], None)?;
    let unfinished = args.output.with_extension("partial");
    let publish = || -> std::io::Result<()> {
        let mut out = std::fs::File::create(&unfinished)?;
        out.write_all(&file)?;
        out.sync_all()?;
        std::fs::rename(&unfinished, &args.output)
    };
    publish()
        .inspect_err(|_| _ = std::fs::remove_file(&unfinished))
        .with_context(|| format!("cannot write {}", args.output.display()))?;
    Ok(ExitCode::SUCCESS)
}
