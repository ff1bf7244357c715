//! `flashlm-prep synthesize`: a random-weight checkpoint of a published geometry.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use clap::builder::PossibleValuesParser;
use flashlm::budget::human_bytes;
use flashlm_prep::synthesize::{GEOMETRIES, Geometry, SynthesizeOptions, synthesize};

use super::Stage;

/// Arguments of `flashlm-prep synthesize`.
#[derive(Args)]
#[command(after_help = "Example:\n  flashlm-prep synthesize --geometry opt-1.3b -o opt-1.3b-random\n\n\
    The text of such a model is meaningless, but as many neurons fire as was published for OPT-6.7B, so its speed is realistic.\n    \
    The same seed gives the same bytes; `record --random-ids` needs no text.")]
pub(crate) struct SynthesizeArgs {
    /// The published model whose shape to take
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(GEOMETRIES.iter().map(|g| g.name)))]
    geometry: String,
    /// Make fewer layers than published
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Seed that determines the weights
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// Directory for the checkpoint
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Threads that generate weights [default: all processors]
    #[arg(long, value_name = "N", value_parser = flashlm::command_line::thread_count)]
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
