//! `flashlm plan`: what a run would hold in memory, without running it.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use flashlm_formats::bundle::Bundle;
use flashlm_runtime::budget::human_bytes;
use flashlm_runtime::error::RuntimeError;
use flashlm_runtime::load::{FfnChoice, LoadOptions, Planned, plan};
use serde_json::json;

use super::ModelArgs;

/// Arguments of `flashlm plan`.
#[derive(Args)]
#[command(after_help = "Examples:\n  flashlm plan model.flashlm --memory 50%\n  \
    flashlm plan model.flashlm --memory 4GiB --context 1024 --json")]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens the KV cache holds: the prompt and what follows
    #[arg(long, value_name = "N", default_value_t = 256)]
    context: usize,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &PlanArgs) -> Result<ExitCode> {
    let bundle = Bundle::open(&args.model.bundle)?;
    let options = args.model.options(&bundle, args.context);
    let smallest = smallest(&bundle, &options);
    let Planned { choice, plan, arena, pinned } = plan(&bundle, &options)?;
    let groups = bundle.layout().groups() as u64 * bundle.spec().layers as u64;
    let kept = arena.as_ref().map(|arena| arena.slots.iter().map(|s| u64::from(*s)).sum::<u64>());
    if args.json {
        let items: serde_json::Map<_, _> = plan.items.iter().map(|i| (i.name.to_owned(), i.bytes.into())).collect();
        let object = json!({
            "ffn": name(choice),
            "context": args.context,
            "items": items,
            "total_bytes": plan.total(),
            "budget_bytes": options.budget,
            "smallest_budget_bytes": smallest,
            "model_bytes": bundle.manifest().model_bytes,
            "cached_groups": kept,
            "groups": groups,
            "slots_of_layers": arena.map(|arena| arena.slots),
            "pinned_layers": pinned,
        });
        println!("{object:#}");
        return Ok(ExitCode::SUCCESS);
    }
    println!("{} FFN, {} tokens of context:", name(choice), args.context);
    print!("{}", plan.table());
    if let (Some(kept), Some(arena)) = (kept, &arena) {
        let share = 100.0 * kept as f64 / groups as f64;
        let (least, most) = (arena.slots.iter().min().unwrap_or(&0), arena.slots.iter().max().unwrap_or(&0));
        println!("the neuron cache holds {share:.1} % of the neurons, {least} to {most} groups of each layer");
    }
    println!(
        "model {}; smallest budget that works {}",
        human_bytes(bundle.manifest().model_bytes),
        human_bytes(smallest)
    );
    Ok(ExitCode::SUCCESS)
}

fn name(choice: FfnChoice) -> &'static str {
    match choice {
        FfnChoice::Resident => "resident",
        FfnChoice::Streamed => "streamed",
        FfnChoice::Flash => "flash",
        FfnChoice::Naive => "naive",
        FfnChoice::Hybrid => "hybrid",
    }
}

/// The smallest budget that works with these options.
fn smallest(bundle: &Bundle, options: &LoadOptions) -> u64 {
    match plan(bundle, &LoadOptions { budget: Some(1), ..options.clone() }) {
        Err(RuntimeError::BudgetTooSmall { needed, .. }) => needed,
        // Nothing fits a byte.
        _ => 0,
    }
}
