//! `flashlm plan`: what a run would hold in memory, without running it.

use std::num::NonZeroUsize;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use flashlm::budget::{about, about_bytes, human_bytes};
use flashlm::error::RuntimeError;
use flashlm::memory;
use flashlm::options::LoadOptions;
use flashlm::plan::Expectation;
use flashlm::plan::{Planned, plan};
use flashlm::session::draft;
use flashlm::terminal::printable_line;
use flashlm::threads;
use flashlm_formats::bundle::Bundle;
use flashlm_kernels::read_bandwidth;
use serde_json::json;

use super::{GuessArgs, ModelArgs};

/// Memory that is read, at most, to see how fast this machine does it: far more than its caches hold. What a small model touches they
/// do hold, so no more than that is read.
const MEASURED_BYTES: u64 = 512 << 20;

/// The default context to plan for.
const DEFAULT_CONTEXT: usize = 256;

/// Arguments of `flashlm plan`.
#[derive(Args)]
#[command(after_help = "Examples:\n  flashlm plan model.flashlm --memory 50%\n  \
    flashlm plan model.flashlm --memory 4GiB --context 1024 --json\n  \
    flashlm plan model.flashlm --memory 50% --draft small.flashlm")]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) guesses: GuessArgs,
    /// Size of the KV cache in tokens, for the prompt and what follows [default: 256, or what the model allows]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &PlanArgs) -> Result<ExitCode> {
    let bundle = Bundle::open(&args.model.bundle)?;
    let context = args.context.unwrap_or(DEFAULT_CONTEXT.min(bundle.spec().max_positions));
    let mut options = LoadOptions { speculate: args.guesses.speculate, ..args.model.options(&bundle, context)? };
    if let Some(path) = &args.guesses.draft {
        options.draft_bytes = draft::bytes(&draft::open(path, &bundle)?, &options)?;
    }
    // As a run would.
    options.budget.map_or(Ok(()), memory::check_budget)?;
    let smallest = smallest(&bundle, &options);
    let planned = plan(&bundle, &options)?;
    let groups = bundle.layout().groups() as u64 * bundle.spec().layers.len() as u64;
    let expected = match Expectation::new(&bundle, &planned, context) {
        Some(expected) => Some((expected, memory_rate(options.threads, expected.bytes_touched as u64)?)),
        None => None,
    };
    let Planned { choice, plan, arena, pinned, predicted, batch, cost: (_, known), fallback, .. } = planned;
    let kept = arena.as_ref().map(|arena| arena.slots.iter().map(|s| u64::from(*s)).sum::<u64>());
    let budget = options.budget.or_else(memory::available);
    let origin = match options.budget {
        Some(_) => "--memory".to_owned(),
        None => memory::room().map_or_else(|| "nothing is known".into(), |room| room.bound.to_string()),
    };
    if args.json {
        let items: serde_json::Map<_, _> = plan.items.iter().map(|i| (i.name.to_owned(), i.bytes.into())).collect();
        let object = json!({
            "ffn": choice.name(),
            "fallback": fallback,
            "computes": if predicted { "predicted" } else { "all" },
            "context": context,
            "rows": batch,
            "items": items,
            "total_bytes": plan.total(),
            "budget_bytes": budget,
            "budget_from": origin,
            "smallest_budget_bytes": smallest,
            "model_bytes": bundle.manifest().model_bytes,
            "cached_groups": kept,
            "groups": groups,
            "slots_of_layers": arena.map(|arena| arena.slots),
            "pinned_layers": pinned,
            "expected": expected.map(|(expected, rate)| json!({
                "tokens_per_s_least": 1e3 / expected.ms_per_token(rate).1,
                "tokens_per_s_most": 1e3 / expected.ms_per_token(rate).0,
                "rests_on": expected.is_reading().then_some(&known),
                "bytes_read_per_token": expected.bytes_read,
                "reads_per_token": expected.reads,
                "io_limit_ms": expected.io_ms,
                "io_most_ms": expected.io_most_ms,
                "dram_limit_ms": expected.bytes_touched / rate * 1e3,
            })),
        });
        println!("{object:#}");
        return Ok(ExitCode::SUCCESS);
    }
    let computed = if predicted { "neurons chosen by the predictors" } else { "every neuron computed" };
    println!("{} FFN, {computed}, {} tokens of context:", choice.name(), context);
    print!("{}", plan.table());
    if let Some(budget) = budget {
        println!("  {:<18} {:>12} ({})", "budget", human_bytes(budget), printable_line(&origin));
    }
    if let Some(fallback) = &fallback {
        println!("{fallback}");
    }
    if let (Some(kept), Some(arena)) = (kept, &arena) {
        let share = 100.0 * kept as f64 / groups as f64;
        let (least, most) = (arena.slots.iter().min().unwrap_or(&0), arena.slots.iter().max().unwrap_or(&0));
        println!("the neuron cache holds {share:.1} % of the neurons, {least} to {most} groups of each layer");
    }
    if let Some((expected, rate)) = expected {
        let (least_ms, most_ms) = expected.ms_per_token(rate);
        let reading = if expected.is_reading() {
            format!(
                "{} are read in {} reads, {} ms ({} with no gap read through)",
                about_bytes(expected.bytes_read),
                about(expected.reads),
                about(expected.io_ms),
                about(expected.io_most_ms),
            )
        } else {
            "nothing is read".to_owned()
        };
        println!(
            "about {} to {} tokens/s\n  {reading}\n  {} of memory are touched in {} ms",
            about(1e3 / most_ms),
            about(1e3 / least_ms),
            about_bytes(expected.bytes_touched),
            about(expected.bytes_touched / rate * 1e3),
        );
        println!("  if the budget is kept and the text is like that used for preparation");
        if expected.is_reading() {
            println!("  reads are reckoned for {known}");
        }
    }
    println!(
        "the model has {}; the smallest budget that works is --memory {smallest} ({})",
        human_bytes(bundle.manifest().model_bytes),
        human_bytes(smallest)
    );
    Ok(ExitCode::SUCCESS)
}

/// Bytes of so much memory, read again and again, that all threads read in a second. Takes a quarter of what is available at most.
fn memory_rate(threads: NonZeroUsize, touched: u64) -> Result<f64> {
    let bytes = touched.min(MEASURED_BYTES).min(memory::available().unwrap_or(u64::MAX) / 4);
    Ok(read_bandwidth(&threads::start(threads)?, bytes as usize))
}

/// The smallest budget that works with these options.
fn smallest(bundle: &Bundle, options: &LoadOptions) -> u64 {
    match plan(bundle, &LoadOptions { budget: Some(1), ..options.clone() }) {
        Err(RuntimeError::BudgetTooSmall { needed, .. }) => needed,
        // Nothing fits a byte.
        _ => 0,
    }
}
