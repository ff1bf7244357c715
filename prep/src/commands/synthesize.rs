//! `flashlm-prep synthesize`: a random-weight checkpoint of a published geometry.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use flashlm_prep::synthesize::{Geometry, SynthesizeOptions, synthesize};
use flashlm_runtime::budget::human_bytes;

use super::Stage;

/// Arguments of `flashlm-prep synthesize`.
#[derive(Args)]
#[command(after_help = "Example:\n  flashlm-prep synthesize --geometry opt-1.3b -o opt-1.3b-random\n\n\
    Geometries: opt-125m, opt-350m, opt-1.3b, opt-2.7b, opt-6.7b, opt-13b, opt-30b, falcon-7b, falcon-40b.\n\
    The text of such a model means nothing; how many neurons fire, and so its speed, is as published for OPT-6.7B.\n    \
    The same seed gives the same bytes; `record --random-ids` needs no text.")]
pub(crate) struct SynthesizeArgs {
    /// The published model whose shape to take
    #[arg(long, value_name = "NAME")]
    geometry: String,
    /// Fewer layers than published
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// What the weights follow from
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// Directory for the checkpoint
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Threads that make weights [default: all processors]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
}

pub(crate) fn run(args: &SynthesizeArgs) -> Result<ExitCode> {
    let geometry = Geometry::find(&args.geometry)?;
    let threads = args.threads.or_else(|| std::thread::available_parallelism().ok()).unwrap_or(NonZeroUsize::MIN);
    let options = SynthesizeOptions { layers: args.layers, seed: args.seed, threads };
    let stage = Stage::bytes("synthesizing");
    let bytes = synthesize(geometry, &args.output, options, &mut |done, total| stage.set(done, total))?;
    drop(stage);
    eprintln!("wrote {}: {} of {} with random weights", args.output.display(), human_bytes(bytes), geometry.name);
    Ok(ExitCode::SUCCESS)
}
