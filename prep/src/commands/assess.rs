//! `flashlm-prep assess`: whether preparing a model pays, on one screen, before hours of it.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use flashlm::budget::{about, human_bytes};
use flashlm::disk_cost::known_cost;
use flashlm::text::Tokenizer;
use flashlm_formats::bundle::LayerSparsity;
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::recording::HELD_OUT;
use flashlm_kernels::read_bandwidth;
use flashlm_prep::assess::{self, Machine, Speed, speeds};
use flashlm_prep::gain::{DENSE, active, dense_by_nature, verdict};
use flashlm_prep::hub::{Settings, fetch_beginning};
use flashlm_prep::pipeline::{Estimate, PrepareOptions, estimate_whole};
use flashlm_prep::record::Calibration;
use flashlm_prep::record::text::Sampling;
use flashlm_prep::tokenizer::packed_tokenizer;
use serde_json::json;

use super::interrupt::Scratch;
use super::source::{self, CHECKPOINT_HELP, Shown};
use super::{Stage, documents, numbers, print_json};

/// Layers that are looked at of a model on the hub, which are fetched for it.
const HUB_LAYERS: usize = 4;
/// Memory that is read to see how fast this machine does it.
const MEASURED_BYTES: usize = 512 << 20;
/// Speeds that are shown.
const SPEEDS: usize = 4;

/// Arguments of `flashlm-prep assess`.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    flashlm-prep assess facebook/opt-6.7b           (fetches its first four layers, no more)\n  \
    flashlm-prep assess /models/opt-6.7b --text mine.txt\n  \
    flashlm-prep assess /models/opt-6.7b --quick    (what preparing takes; nothing is measured)")]
pub(crate) struct AssessArgs {
    #[arg(value_name = "CHECKPOINT", help = CHECKPOINT_HELP)]
    checkpoint: PathBuf,
    /// Text to try it on [default: a page of English of several kinds]
    #[arg(long, value_name = "FILE", num_args = 1..)]
    text: Vec<PathBuf>,
    /// Tokens to try
    #[arg(long, value_name = "N", default_value_t = assess::TOKENS, value_parser = numbers::tokens)]
    tokens: usize,
    /// Layers to look at, from the first on [default: all of a model that is here, 4 of one on the Hub]
    #[arg(long, value_name = "N", value_parser = numbers::count)]
    layers: Option<usize>,
    /// Only say what preparing takes
    #[arg(long)]
    quick: bool,
    /// Threads that compute [default: all processors]
    #[arg(long, value_name = "N", value_parser = flashlm::command_line::thread_count)]
    threads: Option<NonZeroUsize>,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

/// What was found out about a model.
struct Found {
    estimate: Estimate,
    /// Why nothing can be gained, known from the model's kind.
    dense: Option<String>,
    measured: Option<Measured>,
}

struct Measured {
    layers: Vec<LayerSparsity>,
    tokens: usize,
    speeds: Vec<Speed>,
    /// Tokens a second where all is read for each.
    reading_all: f64,
    /// Where the cost of reads is known from, in words.
    disk: String,
}

pub(crate) fn run(args: &AssessArgs) -> Result<ExitCode> {
    let scratch = Scratch::new()?;
    let checkpoint = opened(args, scratch.path())?;
    let spec = checkpoint.spec();
    let tokenizer = packed_tokenizer(&checkpoint)?;
    let options = PrepareOptions { threads: args.threads, ..PrepareOptions::new(&args.checkpoint, "model.flashlm") };
    let estimate = estimate_whole(&options, &checkpoint, tokenizer.json.len() as u64)?;
    let dense = dense_by_nature(spec);
    let measured = match dense.is_some() || args.quick {
        true => None,
        false => Some(measure(args, &checkpoint, &Tokenizer::from_json(&tokenizer.json)?, scratch.path())?),
    };
    let found = Found { estimate, dense, measured };
    // A reader of what is printed may go away, which ends the process.
    drop(scratch);
    if args.json {
        print_json(&as_json(args, &checkpoint, &found))?
    } else {
        print(args, &checkpoint, &found)
    }
    Ok(ExitCode::SUCCESS)
}

/// The checkpoint, or its beginning.
fn opened(args: &AssessArgs, scratch: &Path) -> Result<Checkpoint> {
    let Some(name) = source::model_name(&args.checkpoint) else { return source::open(&args.checkpoint) };
    let dir = scratch.join("model");
    std::fs::create_dir(&dir)?;
    let layers = if args.quick { 0 } else { args.layers.unwrap_or(HUB_LAYERS) };
    let mut shown = Shown::new(format!("the first layers of {name}"));
    let opened = fetch_beginning(&name, &Settings::from_environment()?, layers, &dir, &mut shown);
    opened.with_context(|| format!("cannot look at {name} on the hub"))
}

fn measure(args: &AssessArgs, checkpoint: &Checkpoint, tokenizer: &Tokenizer, scratch: &Path) -> Result<Measured> {
    let spec = checkpoint.spec();
    let text = if args.text.is_empty() { assess::sample_text() } else { documents(&args.text)? };
    let sampling = Sampling { tokens: args.tokens, sequence_tokens: args.tokens, seed: 0, held_out: HELD_OUT };
    let calibration = Calibration::new(&text, tokenizer, spec, sampling)?;
    let all = spec.layers.len();
    let usual = if source::model_name(&args.checkpoint).is_some() { HUB_LAYERS } else { all };
    let count = args.layers.unwrap_or(usual).min(all);
    let threads = super::threads(args.threads)?;
    let stage = Stage::new("measuring sparsity", "layers", count as u64);
    let layers = assess::measure(checkpoint, &calibration, count, threads, &scratch.join("recording"), &mut |done| {
        stage.set(done as u64, count as u64);
    })?;
    drop(stage);
    let (cost, disk) = known_cost(Path::new("."));
    let dram_bytes_per_s = read_bandwidth(&super::threads(args.threads)?, MEASURED_BYTES);
    let machine = Machine { dram_bytes_per_s, cost };
    let speeds = speeds(spec, &assess::layout(checkpoint)?, &layers, &machine, SPEEDS);
    let reading_all = 1e9 / (cost.byte_ns() * checkpoint.model_bytes() as f64);
    Ok(Measured { layers, tokens: calibration.tokens.len(), speeds, reading_all, disk })
}

fn as_json(args: &AssessArgs, checkpoint: &Checkpoint, found: &Found) -> serde_json::Value {
    let Found { estimate, dense, measured } = found;
    let spec = checkpoint.spec();
    json!({
        "model": source::name(&args.checkpoint),
        "family": spec.family,
        "layers": spec.layers.len(),
        "model_bytes": checkpoint.model_bytes(),
        "worth_preparing": match (dense, measured) {
            (Some(_), _) => Some(false),
            (None, Some(measured)) => Some(active(&measured.layers) <= DENSE),
            (None, None) => None,
        },
        "dense": dense,
        "active_share": measured.as_ref().map(|m| active(&m.layers)),
        "active_share_of_layers": measured.as_ref().map(|m| m.layers.iter().map(|l| l.active).collect::<Vec<_>>()),
        "tokens": measured.as_ref().map(|m| m.tokens),
        "admitted_for_an_active_neuron": measured.as_ref().map(|_| assess::ADMITTED),
        "speeds": measured.as_ref().map(|m| &m.speeds),
        "reading_all_tokens_per_s": measured.as_ref().map(|m| m.reading_all),
        "preparing": {
            "seconds": estimate.seconds,
            "writing_minutes": estimate.writing_minutes,
            "bundle_bytes": estimate.bundle_bytes,
            "scratch_bytes": estimate.scratch_bytes,
            "memory_bytes": estimate.memory_bytes,
        },
    })
}

fn print(args: &AssessArgs, checkpoint: &Checkpoint, found: &Found) {
    let Found { estimate, dense, measured } = found;
    let spec = checkpoint.spec();
    let name = source::name(&args.checkpoint);
    println!(
        "{name}: {}, {} layers of {} neurons, {}",
        spec.family,
        spec.layers.len(),
        spec.ffn().size,
        human_bytes(checkpoint.model_bytes())
    );
    if let Some(measured) = measured {
        print_measured(spec.layers.len(), spec.max_positions, measured);
    }
    let dense_here = measured.as_ref().is_some_and(|m| active(&m.layers) > DENSE);
    if let Some(dense) = dense {
        println!("Don't: {dense}.");
        println!("With this model a 4-bit version that fits in memory will be faster.");
        return;
    }
    if dense_here {
        println!("Don't: with so many a 4-bit version that fits in memory will be faster.");
        return;
    }
    println!("{estimate}");
    if source::model_name(&args.checkpoint).is_some() {
        println!("  network {} to fetch, as far as they are not here yet", human_bytes(checkpoint.model_bytes()));
    }
    if !args.quick {
        println!("Next: flashlm prepare {}", args.checkpoint.display());
    }
}

fn print_measured(all: usize, positions: usize, measured: &Measured) {
    let Measured { layers, tokens, speeds, reading_all, disk } = measured;
    let shares: Vec<f64> = layers.iter().map(|layer| 100.0 * f64::from(layer.active)).collect();
    let (least, most) = shares.iter().fold((f64::INFINITY, 0.0_f64), |(a, b), s| (a.min(*s), b.max(*s)));
    println!("{}", verdict(active(layers)).replace(". This", ".\nThis"));
    let which = if layers.len() < all {
        format!("the first {} of {all} layers, the others are taken to be like the last of these", layers.len())
    } else {
        "all layers".to_owned()
    };
    println!("({tokens} tokens, {which}; {least:.1} to {most:.1} %)");
    println!();
    println!("  {:>10}  {:>16}", "memory", "tokens/s");
    for speed in speeds {
        let range = format!("{} to {}", about(speed.tokens_per_s.0), about(speed.tokens_per_s.1));
        let enough = if speed.is_enough { "  more memory gives nothing" } else { "" };
        println!("  {:>10}  {range:>16}{enough}", human_bytes(speed.memory_bytes));
    }
    println!("  {:>10}  {:>16}  reading all of it for every token", "any", about(*reading_all));
    println!("(weights as the checkpoint has them, {} tokens of context,", positions.min(assess::CONTEXT));
    println!("and {disk})");
    println!();
}
