//! `flashlm bench`: how fast a model runs, and what bounds it; or, as a ladder, what each optimisation gains, in one run on one
//! machine, compared with the machine's limits.
//!
//! Every step is a process of its own, in a memory cgroup of its own where that is permitted; all are fed the same ids. The steps
//! are repeated in turn, so that a machine that grows slower does so for all of them.

mod free_running;
mod limited;
mod limits;
mod speed;
mod step;
mod table;

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use flashlm::KvDtype;
use flashlm::budget::{Budget, counted, human_bytes};
use flashlm::error::longest;
use flashlm::memory;
use flashlm::options::LoadOptions;
use flashlm::plan::plan;
use flashlm::signals;
use flashlm::speculate::Speculate;
use flashlm::text::Tokenizer;
use flashlm::threads;
use flashlm_formats::bundle::Bundle;
use flashlm_io::{AlignedMemory, DirectFile, DirectIo, StreamOptions, sequential_read_rate};
use flashlm_kernels::read_bandwidth_of;
use indicatif::{ProgressBar, ProgressStyle};
use rand_xoshiro::SplitMix64;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use serde_json::{Value, json};

use super::values::Disk;
use limits::{Limits, Machine};
use step::{RUN, STEPS, Step};
pub(crate) use step::{StepArgs, run_step};
use table::write_table;

/// Arguments of `flashlm bench`.
#[derive(Args)]
#[command(after_help = "Examples:\n  flashlm bench model.flashlm --memory 50%\n  \
    flashlm bench model.flashlm --memory 50% --ladder --text held-out.txt --json > ladder.json\n  \
    flashlm bench model.flashlm --steps overlap --speculate auto --text held-out.txt\n\n\
    Measure the disk first: flashlm disk model.flashlm")]
pub(crate) struct BenchArgs {
    /// The bundle, made by `flashlm-prep`
    #[arg(value_name = "BUNDLE")]
    pub(crate) bundle: PathBuf,
    /// Memory for each step's process: 50% (of the model), 4GiB, 6.7GB [default: 50%]
    #[arg(long, value_name = "AMOUNT")]
    memory: Option<Budget>,
    /// Text whose first tokens are used as input [default: a seeded sequence of random ids]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tokens of the prompt
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u64).range(1..))]
    prompt_tokens: u64,
    /// Tokens decoded in each repeat of a step [default: 64, of the ladder 256]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(2..))]
    tokens: Option<u64>,
    /// Number of repeats of every step
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=1000))]
    repeats: u64,
    /// Precision of the KV cache: f16, f32 or int8 [default: f16, unless the bundle says that this is too narrow]
    #[arg(long, value_name = "DTYPE")]
    kv: Option<KvDtype>,
    /// Threads that compute [default: all processors]
    #[arg(long, value_name = "N", value_parser = flashlm::command_line::thread_count)]
    threads: Option<NonZeroUsize>,
    /// Plan reads for the disk of this profile, as `flashlm disk` keeps it, or with `none` for a typical disk [default: the
    /// profile kept for the bundle's disk, if there is one]
    #[arg(long, value_name = "FILE|none")]
    disk: Option<Disk>,
    /// Measure, beside a run or the step `overlap`, the model's own greedy text with and without guessed tokens: as many as pay (auto), or so many
    /// in each step
    #[arg(long, value_name = "auto|N")]
    speculate: Option<Speculate>,
    /// What each optimisation gains, step by step, beside the machine's limits
    #[arg(long)]
    ladder: bool,
    /// The ladder's steps to run, such as naive,overlap [default: all]
    #[arg(long, value_name = "STEPS", value_delimiter = ',')]
    steps: Option<Vec<String>>,
    /// Print one JSON object instead of the table
    #[arg(long)]
    json: bool,
}

impl BenchArgs {
    fn is_ladder(&self) -> bool {
        self.ladder || self.steps.is_some()
    }

    /// Tokens decoded in each repeat.
    fn tokens(&self) -> u64 {
        self.tokens.unwrap_or(if self.is_ladder() { 256 } else { 64 })
    }

    /// How a step loads the model.
    fn options(&self, step: &Step, budget: u64, tokens: usize) -> LoadOptions {
        let threads = self.threads.unwrap_or_else(threads::default_count);
        LoadOptions { budget: Some(budget), ffn: step.ffn, kv: self.kv, threads, ..LoadOptions::new(tokens) }
    }
}

/// The default memory: half of the model is what a machine too small for the model may well have.
const DEFAULT_BUDGET: Budget = Budget::PercentOfModel(50.0);

/// Tokens of the steps that read the model again and again, at most.
const NAIVE_TOKENS: u64 = 9;
const HYBRID_TOKENS: u64 = 33;

/// How often a waiting bench checks whether it was asked to end.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

pub(crate) fn run(args: &BenchArgs) -> Result<ExitCode> {
    // The step's process ends by itself; this one goes on to take its cgroup away.
    super::watch_signals()?;
    // Before there are steps nothing would be lost, and a text may be a pipe that nobody writes to.
    signals::end_at_once(true);
    let bundle = Bundle::open(&args.bundle)?;
    let budget = args.memory.unwrap_or(DEFAULT_BUDGET).bytes(bundle.manifest().model_bytes);
    let explain = |refused: flashlm::error::Result<()>| match args.memory {
        Some(_) => refused.map_err(Into::into),
        None => refused.context("without --memory every step has half of the model"),
    };
    explain(memory::check_budget(budget))?;
    args.disk.as_ref().map(Disk::reads).transpose()?;
    let names: Vec<&str> = match &args.steps {
        Some(steps) => steps.iter().map(String::as_str).collect(),
        None if args.ladder => STEPS.iter().map(|step| step.name).collect(),
        None => vec![RUN.name],
    };
    if let Some(unknown) = names.iter().find(|name| step::step(name).is_none()) {
        bail!("there is no step `{unknown}`; the steps are {}", STEPS.map(|step| step.name).join(","));
    }
    let ids = ids(args, &bundle)?;
    let steps = || names.iter().filter_map(|name| step::step(name));
    if !steps().any(|step| fits(args, step, &bundle, budget, ids.len()).is_ok()) {
        explain(steps().try_for_each(|step| fits(args, step, &bundle, budget, ids.len())))?;
    }
    signals::end_at_once(false);
    let result = ladder(args, &bundle, budget, &names, &ids);
    if let Some(code) = signals::asked() {
        eprintln!("interrupted; nothing was left behind");
        return Ok(ExitCode::from(code));
    }
    result?;
    Ok(ExitCode::SUCCESS)
}

/// Whether a step's process can live in the budget. Said here, with the number needed: its cgroup would end it before it could.
fn fits(args: &BenchArgs, step: &Step, bundle: &Bundle, budget: u64, tokens: usize) -> flashlm::error::Result<()> {
    plan(bundle, &args.options(step, budget, tokens)).map(|_| ())
}

fn ladder(args: &BenchArgs, bundle: &Bundle, budget: u64, names: &[&str], ids: &[u32]) -> Result<()> {
    let bar = ProgressBar::new(args.repeats * names.len() as u64 + 1);
    bar.set_style(
        ProgressStyle::with_template("{msg:16} [{bar:30}] {pos}/{len}, {elapsed} elapsed, {eta} left")?
            .progress_chars("=> "),
    );
    bar.set_message("machine");
    bar.tick();
    let machine = machine(args)?;
    bar.inc(1);
    let mut rounds: Vec<Vec<Value>> = vec![Vec::new(); names.len()];
    for _ in 0..args.repeats {
        for (at, name) in names.iter().enumerate() {
            bar.set_message((*name).to_owned());
            let step = step::step(name).expect("the names were looked at");
            rounds[at].push(match fits(args, step, bundle, budget, ids.len()) {
                Ok(()) => child(args, budget, name, ids)?,
                Err(reason) => json!({ "not_applicable": reason.to_string() }),
            });
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let limits = Limits::new(&machine, names.iter().zip(&rounds).map(|(name, rounds)| (*name, rounds.as_slice())));
    let steps: Vec<Value> = names.iter().zip(&rounds).map(|(name, rounds)| summary(name, rounds, &limits)).collect();
    let report = json!({
        "machine": {
            "disk_sequential_bytes_per_s": machine.disk_bytes_per_s,
            "dram_bytes_per_s": machine.dram_bytes_per_s,
            "disk_profile": machine.profile,
            "limits": limits.json(),
        },
        "memory_budget_bytes": budget,
        "model_bytes": bundle.manifest().model_bytes,
        "repeats": args.repeats,
        "steps": steps,
    });
    let mut out = flashlm::terminal::Printable(std::io::stdout().lock());
    if args.json {
        writeln!(out, "{report:#}")?;
    } else if !args.is_ladder() {
        let (step, rounds) = (&report["steps"][0], &rounds[0]);
        let source = rounds[0]["source"].as_str().unwrap_or_default();
        let speed = speed::Speed { step, source, prompt_tokens: args.prompt_tokens };
        let verdict = speed.verdict(bundle, &args.options(&RUN, budget, ids.len()), budget, machine.dram_bytes_per_s);
        let sizes = [bundle.manifest().model_bytes, budget].map(human_bytes);
        let model = format!("{}: {} in {} of memory, by {source}", args.bundle.display(), sizes[0], sizes[1]);
        speed.write(&mut out, &model, &verdict)?;
        free_running::write_line(&mut out, step)?;
    } else {
        let (bundle, repeats) = (args.bundle.display(), counted(args.repeats as usize, "repeat"));
        let of = format!("{bundle}, prompt of {}, {repeats} in turn", counted(args.prompt_tokens as usize, "token"));
        write_table(&mut out, &report, &of, &limits.describe())?;
    }
    Ok(())
}

/// The ids that every step is fed.
fn ids(args: &BenchArgs, bundle: &Bundle) -> Result<Vec<u32>> {
    let wanted = usize::try_from(args.prompt_tokens.saturating_add(args.tokens())).unwrap_or(usize::MAX);
    let spec = bundle.spec();
    if wanted > spec.max_positions {
        bail!(
            "a prompt of {} and {} further tokens are more than {}; give fewer --prompt-tokens or --tokens",
            args.prompt_tokens,
            args.tokens(),
            longest(spec.max_positions)
        );
    }
    let mut ids = match &args.text {
        Some(path) => {
            let what = || format!("cannot use the text in {}", path.display());
            let (tokenizer, mut file) = (Tokenizer::of(bundle)?, File::open(path).with_context(what)?);
            let text = tokenizer.read_beginning(&mut file, wanted).with_context(what)?;
            tokenizer.encode(&text)?
        }
        None => {
            let mut random = SplitMix64::seed_from_u64(1);
            std::iter::repeat_with(|| (random.next_u64() % spec.vocab_size as u64) as u32).take(wanted).collect()
        }
    };
    if ids.len() < wanted {
        bail!("the text has only {} tokens and {wanted} are needed; give a longer one or fewer --tokens", ids.len());
    }
    ids.truncate(wanted);
    Ok(ids)
}

fn machine(args: &BenchArgs) -> Result<Machine> {
    let file = Arc::new(DirectFile::open(&args.bundle, DirectIo::Optional)?);
    let disk_bytes_per_s = sequential_read_rate(&file, StreamOptions::default(), Duration::from_secs(2), 1)?;
    let threads = threads::start(args.threads.unwrap_or_else(threads::default_count))?;
    // More than any cache holds, and no more than can be spared.
    let mut plain = AlignedMemory::new(memory::available().map_or(1 << 30, |bytes| (bytes / 4).min(1 << 30)) as usize)?;
    plain.as_mut_slice().fill(1);
    let dram_bytes_per_s = read_bandwidth_of(&threads, bytemuck::cast_slice(plain.as_slice()));
    let profile = Disk::profile(args.disk.as_ref(), &args.bundle)?;
    Ok(Machine { disk_bytes_per_s, dram_bytes_per_s, profile })
}

/// Runs a step once, in its own process and cgroup.
fn child(args: &BenchArgs, budget: u64, name: &str, ids: &[u32]) -> Result<Value> {
    let group = limited::LimitedGroup::new(budget).ok();
    let tokens = match name {
        "naive" => args.tokens().min(NAIVE_TOKENS),
        "hybrid" => args.tokens().min(HYBRID_TOKENS),
        _ => args.tokens(),
    };
    let mut command = Command::new(std::env::current_exe().context("cannot find this program")?);
    command.arg("bench-step").arg(&args.bundle).args(["--step", name]);
    command.args(["--prompt-tokens", &args.prompt_tokens.to_string(), "--tokens", &tokens.to_string()]);
    command.args(["--memory", &budget.to_string()]);
    if let Some(threads) = args.threads {
        command.args(["--threads", &threads.to_string()]);
    }
    if let Some(kv) = args.kv {
        command.args(["--kv", kv.name()]);
    }
    if let Some(disk) = &args.disk {
        command.args(["--disk", &disk.to_string()]);
    }
    if let Some(how) = args.speculate.filter(|_| [free_running::STEP, RUN.name].contains(&name)) {
        command.args(["--speculate", &how.to_string()]);
    }
    if let Some(group) = &group {
        command.arg("--cgroup").arg(group.processes());
    }
    // Files hold whatever it says while this process looks out for signals. They have no names.
    let file = || tempfile::tempfile().context("cannot make a temporary file");
    let (mut out, mut error) = (file()?, file()?);
    command.stdin(Stdio::piped()).stdout(out.try_clone()?).stderr(error.try_clone()?);
    let mut step = command
        .spawn()
        .context("cannot start the step's process; allow more (`ulimit -u`, a container's pids limit)")?;
    // One that ends before it has read them has its reason to say.
    let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
    _ = step.stdin.take().map(|mut pipe| pipe.write_all(ids.join(",").as_bytes()));
    let status = loop {
        if let Some(status) = step.try_wait()? {
            break status;
        }
        if signals::asked().is_some() {
            _ = step.kill();
            step.wait()?;
            bail!("interrupted");
        }
        std::thread::sleep(POLL_INTERVAL);
    };
    let contents = |file: &mut File| -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        file.rewind()?;
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    if !status.success() {
        bail!("step {name} ended with {status}: {}", String::from_utf8_lossy(&contents(&mut error)?).trim());
    }
    serde_json::from_slice(&contents(&mut out)?).with_context(|| format!("step {name} said something unexpected"))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    if values.is_empty() { 0.0 } else { values[values.len() / 2] }
}

/// What a step's repeats say together.
fn summary(name: &str, rounds: &[Value], limits: &Limits<'_>) -> Value {
    if let Some(reason) = rounds.iter().find_map(|round| round["not_applicable"].as_str()) {
        return json!({ "name": name, "not_applicable": reason });
    }
    let of = |key: &str| limits::of(rounds, &[key]);
    let decode = |key: &str| -> Vec<f64> {
        rounds.iter().filter_map(|round| round["decode_ms_per_token"][key].as_f64()).collect()
    };
    let medians = decode("median");
    let middle = median(medians.clone());
    let (low, high) = medians.iter().fold((f64::MAX, 0f64), |(low, high), m| (low.min(*m), high.max(*m)));
    let (io_limit_ms, dram_limit_ms) = (limits.io_ms(rounds), limits.dram_ms(rounds));
    json!({
        "name": name,
        "source": rounds[0]["source"],
        "decode_ms_per_token": {
            "median": middle, "p95": median(decode("p95")), "p99": median(decode("p99")),
            "spread": if middle > 0.0 { (high - low) / middle } else { 0.0 },
        },
        "prefill_ms": of("prefill_ms"),
        "load_ms": of("load_ms"),
        "io_wait_ms": of("io_wait_ms"),
        "planning_ms": of("planning_ms"),
        "compute_ms": of("compute_ms"),
        "bytes_read_per_token": of("bytes_read_per_token"),
        "reads_per_token": of("reads_per_token"),
        "unused_prefetch_bytes_per_token": of("unused_prefetch_bytes_per_token"),
        "hit_rate": of("hit_rate"),
        "io_limit_ms": io_limit_ms,
        "dram_limit_ms": dram_limit_ms,
        "distance": middle / io_limit_ms.max(dram_limit_ms).max(1e-9),
        "peak_memory_bytes": of("peak_memory_bytes"),
        "memory_source": rounds[0]["memory_source"],
        "tokens": rounds[0]["tokens"],
        "read_cost": rounds[rounds.len() - 1]["read_cost"],
        "free_running": free_running::summary(rounds),
    })
}
