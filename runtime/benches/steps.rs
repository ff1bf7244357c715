//! What a step of several rows costs beside one of a single row: rows of one sequence, as speculation verifies them, and of several.
//!
//! `cargo bench -p flashlm --bench steps -- BUNDLE --text FILE [--memory BYTES] [--rows 1,2,4,8] [--rounds 3] [--steps 16]`
//!
//! Every number of rows is measured in every round, so that all see the same machine.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use flashlm::engine::{BATCH_MAX, Executor, Row, SequenceId, Work};
use flashlm::load::load;
use flashlm::options::LoadOptions;
use flashlm::text::Tokenizer;
use flashlm_formats::bundle::Bundle;

#[derive(Parser)]
struct Arguments {
    /// A bundle
    bundle: PathBuf,
    /// Text that the rows are from
    #[arg(long)]
    text: PathBuf,
    /// Bytes for the whole process [default: all that is to be had]
    #[arg(long)]
    memory: Option<u64>,
    /// Rows of a step
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8")]
    rows: Vec<usize>,
    /// Rounds
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Steps of each number of rows in a round, besides two to get going
    #[arg(long, default_value_t = 16)]
    steps: usize,
    /// Threads that compute
    #[arg(long, default_value_t = NonZeroUsize::new(2).unwrap())]
    threads: NonZeroUsize,
    /// What cargo says to programs that measure
    #[arg(long, hide = true)]
    bench: bool,
}

const PROMPT: usize = 64;
const WARM_UP: usize = 2;

fn main() -> Result<()> {
    let args = Arguments::parse();
    let bundle = Bundle::open(&args.bundle)?;
    let text = std::fs::read_to_string(&args.text).with_context(|| format!("cannot read {}", args.text.display()))?;
    let ids = Tokenizer::of(&bundle)?.encode(&text)?;
    let most = args.rows.iter().copied().max().context("--rows is empty")?;
    ensure!((1..=BATCH_MAX).contains(&most), "--rows: from 1 to {BATCH_MAX}");
    let context = PROMPT + (args.steps + WARM_UP) * most;
    ensure!(
        ids.len() >= context + most * PROMPT,
        "{} tokens of text; {} are needed",
        ids.len(),
        context + most * PROMPT
    );
    let options = LoadOptions {
        budget: args.memory,
        threads: args.threads,
        sequences: most,
        batch: most,
        ..LoadOptions::new(context)
    };
    let loaded = load(&bundle, &options, &mut |_, _| ())?;
    eprint!("{}", loaded.plan.table());
    let mut executor = loaded.forward.into_executor();
    println!("round  rows  of one sequence: ms, MB read   of several: ms, MB read");
    for round in 0..args.rounds {
        for &rows in &args.rows {
            let one = measure(&mut executor, &ids, &args, 1, rows)?;
            let several = measure(&mut executor, &ids, &args, rows, 1)?;
            let [(a, b), (c, d)] = [one, several].map(|(ms, bytes)| (ms, bytes / 1e6));
            println!("{round:>5}  {rows:>4}  {a:>21.2} {b:>8.2}   {c:>15.2} {d:>8.2}");
        }
    }
    Ok(())
}

/// The median of a step's milliseconds, and the mean of the bytes it reads: `each` rows of every one of this many sequences.
fn measure(
    executor: &mut Executor,
    ids: &[u32],
    args: &Arguments,
    sequences: usize,
    each: usize,
) -> Result<(f64, f64)> {
    let mut opened: Vec<(SequenceId, usize)> = Vec::new();
    let context = executor.context();
    for number in 0..sequences {
        let (sequence, from) = (executor.open(context)?, number * PROMPT);
        let row = |&token: &u32| Row { sequence, token, work: Work::Prompt, wants_logits: false };
        let prompt: Vec<Row> = ids[from..from + PROMPT].iter().map(row).collect();
        executor.step(&prompt, &mut |_, _| Ok(()))?;
        opened.push((sequence, from + PROMPT));
    }
    let (mut ms, mut bytes) = (Vec::new(), 0);
    for step in 0..args.steps + WARM_UP {
        let mut rows = Vec::new();
        for (sequence, next) in &mut opened {
            rows.extend(ids[*next..*next + each].iter().map(|token| Row::decode(*sequence, *token)));
            *next += each;
        }
        let (before, begin) = (executor.read_counters().bytes, Instant::now());
        executor.step(&rows, &mut |_, _| Ok(()))?;
        if step >= WARM_UP {
            ms.push(begin.elapsed().as_secs_f64() * 1e3);
            bytes += executor.read_counters().bytes - before;
        }
    }
    opened.iter().for_each(|(sequence, _)| executor.close(*sequence));
    ms.sort_by(f64::total_cmp);
    Ok((ms[ms.len() / 2], bytes as f64 / args.steps as f64))
}
