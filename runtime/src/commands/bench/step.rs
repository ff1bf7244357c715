//! One step of the ladder, once: what `flashlm bench` starts as a process of its own.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;
use flashlm::KvDtype;
use flashlm::cache::PolicyKind;
use flashlm::engine::Forward;
use flashlm::generate::Percentiles;
use flashlm::load::load;
use flashlm::memory;
use flashlm::neurons::records::Records;
use flashlm::options::{FfnChoice, LoadOptions};
use flashlm::plan::resident_bytes_touched;
use flashlm::planner::ReadPlan;
use flashlm::sampler::{Sampler, Sampling};
use flashlm::speculate::Speculate;
use flashlm::threads;
use flashlm_formats::bundle::Bundle;
use serde_json::{Value, json};

use super::super::values::Disk;
use super::super::{parse_ids, with_figures};
use super::free_running;

/// A step: each has all that the one before it has.
pub(crate) struct Step {
    pub(crate) name: &'static str,
    /// What `run` would choose, where none is named.
    pub(crate) ffn: Option<FfnChoice>,
    policy: Option<PolicyKind>,
    reads: Option<ReadPlan>,
    look_ahead: bool,
}

const fn flash(name: &'static str, policy: Option<PolicyKind>, reads: Option<ReadPlan>, look_ahead: bool) -> Step {
    Step { name, ffn: Some(FfnChoice::Flash), policy, reads, look_ahead }
}

const WINDOW: Option<PolicyKind> = Some(PolicyKind::Window(4));
/// The bundle's.
const BEST: Option<PolicyKind> = None;

/// The ladder.
pub(crate) const STEPS: [Step; 8] = [
    Step { ffn: Some(FfnChoice::Naive), ..flash("naive", WINDOW, None, false) },
    Step { ffn: Some(FfnChoice::Hybrid), ..flash("hybrid", WINDOW, None, false) },
    flash("predictor", Some(PolicyKind::Window(0)), Some(ReadPlan::Halves), false),
    flash("windowing", WINDOW, Some(ReadPlan::Halves), false),
    flash("bundling", WINDOW, Some(ReadPlan::Groups), false),
    flash("storage_order", WINDOW, None, false),
    flash("policy", BEST, None, false),
    flash("overlap", BEST, None, true),
];

/// What `run` does with this budget: no step of the ladder.
pub(crate) const RUN: Step = Step { ffn: None, ..flash("run", BEST, None, true) };

/// A step by its name.
pub(crate) fn step(name: &str) -> Option<&'static Step> {
    STEPS.iter().chain([&RUN]).find(|step| step.name == name)
}

/// Arguments of a step's process.
#[derive(Args)]
pub(crate) struct StepArgs {
    bundle: PathBuf,
    #[arg(long)]
    step: String,
    #[arg(long)]
    prompt_tokens: usize,
    #[arg(long)]
    tokens: usize,
    #[arg(long)]
    memory: u64,
    #[arg(long)]
    kv: Option<KvDtype>,
    #[arg(long)]
    threads: Option<NonZeroUsize>,
    #[arg(long)]
    disk: Option<Disk>,
    #[arg(long)]
    speculate: Option<Speculate>,
    #[arg(long)]
    cgroup: Option<PathBuf>,
}

/// Runs the step on the ids that standard input gives, and prints what it cost as one JSON object.
pub(crate) fn run_step(args: &StepArgs) -> Result<ExitCode> {
    end_with_parent()?;
    if let Some(cgroup) = &args.cgroup {
        std::fs::write(cgroup, std::process::id().to_string())
            .with_context(|| format!("cannot join the memory cgroup {}", cgroup.display()))?;
    }
    let step = step(&args.step).ok_or_else(|| anyhow!("no step {}", args.step))?;
    let ids = std::io::read_to_string(std::io::stdin()).context("cannot read the ids")?;
    let ids = parse_ids(&ids).map_err(|e| anyhow!(e))?;
    let bundle = Bundle::open(&args.bundle)?;
    if step.reads == Some(ReadPlan::Halves) && step.ffn == Some(FfnChoice::Flash) {
        let layout = bundle.layout();
        let half = layout.group_bytes() / 2;
        if layout.records_per_group() != 1 || half != layout.row_bytes() || !half.is_multiple_of(layout.alignment()) {
            let reason = "up and down halves of a group are not aligned parts of it";
            println!("{}", json!({ "not_applicable": reason }));
            return Ok(ExitCode::SUCCESS);
        }
    }
    let begin = Instant::now();
    let options = LoadOptions {
        budget: Some(args.memory),
        ffn: step.ffn,
        policy: step.policy,
        reads: step.reads.or(args.disk.as_ref().map(Disk::reads).transpose()?),
        look_ahead: step.look_ahead,
        kv: args.kv,
        speculate: args.speculate.unwrap_or(Speculate::Off),
        threads: args.threads.unwrap_or_else(threads::default_count),
        ..LoadOptions::new(args.prompt_tokens + args.tokens)
    };
    let loaded = load(&bundle, &options, &mut |_, _| {})?;
    let (mut forward, source) = (loaded.forward, loaded.plan.ffn);
    let load_ms = begin.elapsed().as_secs_f64() * 1e3;
    let mut sampler = Sampler::new(Sampling::default(), bundle.spec().vocab_size);
    let (prompt, rest) =
        ids.split_at_checked(args.prompt_tokens).ok_or_else(|| anyhow!("fewer ids than --prompt-tokens"))?;
    ensure!(args.tokens >= 2 && rest.len() >= args.tokens, "{} ids for --tokens {}", rest.len(), args.tokens);
    let begin = Instant::now();
    std::hint::black_box(sampler.choose(forward.feed(prompt)?));
    let prefill_ms = begin.elapsed().as_secs_f64() * 1e3;

    // The first token warms up: it is fed and not counted.
    std::hint::black_box(sampler.choose(forward.feed(&rest[..1])?));
    let (before, sizes_before) = (forward.read_counters(), forward.read_sizes());
    let mut times = Vec::with_capacity(args.tokens);
    for id in &rest[1..args.tokens] {
        let begin = Instant::now();
        std::hint::black_box(sampler.choose(forward.feed(std::slice::from_ref(id))?));
        times.push(begin.elapsed());
    }
    let reads = forward.read_counters().since(before);
    let tokens = times.len().max(1) as f64;
    let mean_ms = times.iter().map(|t| t.as_secs_f64() * 1e3).sum::<f64>() / tokens;
    let figures = reads.per_token(times.len());
    let sizes: Vec<(u64, u64)> = forward
        .read_sizes()
        .into_iter()
        .map(|(bytes, count)| {
            let earlier = sizes_before.iter().find(|(size, _)| *size == bytes).map_or(0, |(_, count)| *count);
            (bytes, count - earlier)
        })
        .collect();
    let peak = memory::peak();
    // The bench made that cgroup for this process alone.
    let (peak_bytes, memory_source) = match peak.cgroup_bytes.filter(|_| args.cgroup.is_some()) {
        Some(bytes) => (bytes, "cgroup"),
        None => (peak.bytes, "VmHWM"),
    };
    let touched = touched(&bundle, &forward, options.kv(&bundle), source) as f64 + reads.touched_bytes as f64 / tokens;
    let report = json!({
        "decode_ms_per_token": Percentiles::of(&times),
        "source": source,
        "prefill_ms": prefill_ms,
        "load_ms": load_ms,
        "compute_ms": (mean_ms - figures.io_wait_ms - figures.planning_ms).max(0.0),
        "touched_bytes_per_token": touched,
        "read_sizes": sizes,
        "read_cost": forward.read_cost(),
        "peak_memory_bytes": peak_bytes,
        "memory_source": memory_source,
        "tokens": times.len(),
        "free_running": match args.speculate {
            Some(how) => free_running::measure(&mut forward, prompt, args.tokens, how)?,
            None => Value::Null,
        },
    });
    println!("{}", with_figures(figures, report));
    Ok(ExitCode::SUCCESS)
}

/// A step whose bench was killed is nobody's any more: it would go on, and keep its cgroup.
fn end_with_parent() -> Result<()> {
    #[cfg(target_os = "linux")]
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    Ok(())
}

/// Bytes of memory that a token touches outside the neurons that its source counts.
fn touched(bundle: &Bundle, forward: &Forward, kv: KvDtype, source: &str) -> u64 {
    let spec = bundle.spec();
    // Dense sources touch every up row, and few of the down rows.
    let dense = spec.layers.len()
        * spec.ffn().size
        * (spec.ffn().vectors() - 1)
        * (bundle.layout().row_bytes() + Records::of(bundle).scale_bytes());
    let dense = if source == FfnChoice::Flash.name() { 0 } else { dense as u64 };
    resident_bytes_touched(bundle, forward.len(), kv) + dense
}
