//! `flashlm logits`: what the model says at every position, for comparison with other implementations.

use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use flashlm::engine::check_ids;
use flashlm::load::load;
use flashlm_formats::bundle::Bundle;
use flashlm_formats::destination::{Destination, FileKind, LOGITS_FORMAT};
use serde_json::json;

use super::{ModelArgs, parse_ids, say_chosen, with_progress};

/// Arguments of `flashlm logits`.
#[derive(Args)]
#[command(after_help = "Example:\n  flashlm logits model.flashlm --ids 2,713,16 -o out.safetensors --kv f32\n\n\
    The file holds one tensor `logits`, f32 [tokens, vocab].")]
pub(crate) struct LogitsArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Token ids of the sequence, such as 2,713,16; nothing is added to them
    #[arg(long, value_name = "IDS", value_parser = parse_ids)]
    ids: std::vec::Vec<u32>,
    /// Where to write the safetensors file
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

pub(crate) fn run(args: LogitsArgs) -> Result<ExitCode> {
    let output = Destination::take(&args.output, FileKind::Logits, std::slice::from_ref(&args.model.bundle))?;
    let bundle = Bundle::open(&args.model.bundle)?;
    check_ids(bundle.spec(), &args.ids)?;
    write_logits(&args, &bundle, &mut BufWriter::new(output.file()))?;
    output.publish()?;
    Ok(ExitCode::SUCCESS)
}

/// Writes the safetensors file position by position: the logits of a long sequence are larger than many a model.
fn write_logits(args: &LogitsArgs, bundle: &Bundle, out: &mut impl Write) -> Result<()> {
    let options = args.model.options(bundle, args.ids.len())?;
    let mut loaded = with_progress(|progress| load(bundle, &options, progress))?;
    say_chosen(&loaded.plan, &loaded.notices, false);
    let shape = [args.ids.len(), bundle.spec().vocab_size];
    let bytes = shape[0] as u64 * shape[1] as u64 * 4;
    let tensor = json!({ "dtype": "F32", "shape": shape, "data_offsets": [0, bytes] });
    // The mark says that the file may be replaced by the next run.
    let header = json!({ "__metadata__": { "format": LOGITS_FORMAT }, "logits": tensor });
    let mut header = header.to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut result = out.write_all(&(header.len() as u64).to_le_bytes()).and_then(|()| out.write_all(&header));
    loaded.forward.feed_all(&args.ids, &mut |_, logits| {
        if result.is_ok() {
            result = logits.iter().try_for_each(|l| out.write_all(&l.to_le_bytes()));
        }
        Ok(())
    })?;
    result.and_then(|()| out.flush()).with_context(|| format!("cannot write {}", args.output.display()))
}
