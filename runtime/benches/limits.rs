//! How near decoding comes to what the machine can do: streamed against the disk, resident against memory.
//!
//! `cargo bench -p flashlm --bench limits -- BUNDLE [--tokens N] [--rounds N] [--threads N] [--json]`
//!
//! Each round measures a limit and then the decoding it limits, so that both see the same machine. Use a model of 2 GB or more:
//! smaller ones stay in the processor's caches.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use flashlm::KvDtype;
use flashlm::engine::Forward;
use flashlm::error::Result;
use flashlm::load::load;
use flashlm::neurons::hook::{Activations, FfnHook};
use flashlm::options::{FfnChoice, LoadOptions};
use flashlm::plan::resident_bytes_touched;
use flashlm_formats::bundle::Bundle;
use flashlm_formats::model::ModelSpec;
use flashlm_io::{AlignedMemory, DirectFile, DirectIo, StreamOptions, sequential_read_rate};
use flashlm_kernels::{Threads, read_bandwidth_of};

#[derive(Parser)]
struct Arguments {
    /// A bundle of 2 GB or more
    bundle: PathBuf,
    /// Tokens decoded from memory in a round; streamed, a quarter of them
    #[arg(long, default_value_t = 32)]
    tokens: usize,
    /// Rounds
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Threads that compute and read memory
    #[arg(long, default_value_t = NonZeroUsize::new(2).unwrap())]
    threads: NonZeroUsize,
    /// Bytes of the plain read of memory
    #[arg(long, default_value_t = 2 << 30)]
    read_bytes: usize,
    /// Do not verify streamed groups against their checksums
    #[arg(long)]
    no_verify: bool,
    /// What cargo says to programs that measure
    #[arg(long, hide = true)]
    bench: bool,
    /// One JSON object per round
    #[arg(long)]
    json: bool,
}

const PROMPT: usize = 16;

/// A limit and what was reached of it, in bytes per second.
struct Rate {
    limit: f64,
    reached: f64,
    ms_per_token: f64,
}

impl Rate {
    fn share(&self) -> f64 {
        self.reached / self.limit
    }

    fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "limit_bytes_per_s": self.limit, "reached_bytes_per_s": self.reached, "share": self.share(),
            "ms_per_token": self.ms_per_token,
        })
    }
}

fn main() -> anyhow::Result<()> {
    let args = Arguments::parse();
    let bundle = Bundle::open(&args.bundle)?;
    let spec = bundle.spec().clone();
    let open = |ffn| -> Result<Forward> {
        let options = LoadOptions {
            ffn: Some(ffn),
            predict: false,
            threads: args.threads,
            direct: DirectIo::Required,
            verify: !args.no_verify,
            ..LoadOptions::new(PROMPT + args.rounds * args.tokens + 1)
        };
        Ok(load(&bundle, &options, &mut |_, _| ())?.forward)
    };
    let (mut resident, mut streamed) = (open(FfnChoice::Resident)?, open(FfnChoice::Streamed)?);
    let ids: Vec<u32> = (0..PROMPT as u32).map(|i| (i * 7919 + 17) % spec.vocab_size as u32).collect();
    resident.feed(&ids)?;
    streamed.feed(&ids)?;

    let file = Arc::new(DirectFile::open(&args.bundle, DirectIo::Required)?);
    let threads = Threads::new(args.threads)?;
    // On huge pages, as the weights are: on small ones a plain read is slower.
    let mut plain = AlignedMemory::new(args.read_bytes / 4 * 4)?;
    plain.as_mut_slice().fill(1);
    let (mut disk, mut memory) = (Vec::new(), Vec::new());
    for round in 0..args.rounds {
        let span = Duration::from_secs(2);
        let before = sequential_read_rate(&file, StreamOptions::default(), span, 2 * round as u64)?;
        let (seconds, bytes) = decode(&mut streamed, (args.tokens / 4).max(1))?;
        let reached = bytes / seconds;
        let after = sequential_read_rate(&file, StreamOptions::default(), span, 2 * round as u64 + 1)?;
        disk.push(Rate { limit: (before + after) / 2.0, reached, ms_per_token: seconds * 1e3 });

        let before = read_bandwidth_of(&threads, bytemuck::cast_slice(plain.as_slice()));
        let (seconds, _) = decode(&mut resident, args.tokens)?;
        let limit = (before + read_bandwidth_of(&threads, bytemuck::cast_slice(plain.as_slice()))) / 2.0;
        // What those tokens touched; an activity of its own pass, because watching takes time.
        let mut active = Active::default();
        let len = resident.len();
        resident.truncate(len - 1);
        resident.feed_observed(&[next(len - 1, &spec)], &mut active)?;
        let layout = bundle.layout();
        let dense = spec.layers.len() * spec.ffn().size * (spec.ffn().vectors() - 1) * layout.row_bytes();
        let touched =
            resident_bytes_touched(&bundle, len, KvDtype::F16) as f64 + (dense + active.0 * layout.row_bytes()) as f64;
        memory.push(Rate { limit, reached: touched / seconds, ms_per_token: seconds * 1e3 });

        let (disk, memory) = (&disk[round], &memory[round]);
        let share = active.0 as f64 / (spec.layers.len() * spec.ffn().size) as f64;
        if args.json {
            let (streamed, resident) = (disk.json(), memory.json());
            let row = serde_json::json!({"round": round, "streamed": streamed, "resident": resident,
                "touched_bytes": touched, "active_share": share});
            println!("{row}");
        } else {
            println!("round {round}, {:.1} % of the neurons active, {:.2} GB touched", share * 100.0, touched / 1e9);
            print_row("  streamed, disk  ", disk);
            print_row("  resident, memory", memory);
        }
    }
    eprintln!("median share: streamed {:.3}, resident {:.3}", median(&disk), median(&memory));
    Ok(())
}

fn print_row(name: &str, rate: &Rate) {
    let (limit, reached) = (rate.limit / 1e9, rate.reached / 1e9);
    println!(
        "{name}: {:8.1} ms/token, {reached:6.2} of {limit:6.2} GB/s = {:5.1} %",
        rate.ms_per_token,
        rate.share() * 100.0
    );
}

/// A fixed sequence, so that every run does the same work.
fn next(position: usize, spec: &ModelSpec) -> u32 {
    (position * 104_729 % spec.vocab_size) as u32
}

/// Feeds one token to get going, then so many more: the median of the seconds they took, and the mean of the bytes they read.
fn decode(forward: &mut Forward, tokens: usize) -> Result<(f64, f64)> {
    let spec = forward.spec().clone();
    let (mut seconds, mut bytes) = (Vec::new(), 0);
    for token in 0..=tokens {
        if token == 1 {
            bytes = forward.read_counters().bytes;
        }
        let id = next(forward.len(), &spec);
        let start = Instant::now();
        forward.feed(&[id])?;
        seconds.push(start.elapsed().as_secs_f64());
        if forward.len() == forward.context() {
            forward.truncate(PROMPT);
        }
    }
    seconds.remove(0);
    seconds.sort_by(f64::total_cmp);
    Ok((seconds[tokens / 2], (forward.read_counters().bytes - bytes) as f64 / tokens as f64))
}

fn median(rates: &[Rate]) -> f64 {
    let mut shares: Vec<f64> = rates.iter().map(Rate::share).collect();
    shares.sort_by(f64::total_cmp);
    shares[shares.len() / 2]
}

/// Counts neurons that are not zero.
#[derive(Default)]
struct Active(usize);

impl FfnHook for Active {
    fn input(&mut self, _: usize, _: usize, _: &[f32]) -> Result<()> {
        Ok(())
    }

    fn activations(&mut self, piece: &mut Activations<'_>) -> Result<()> {
        self.0 += piece.values.iter().filter(|a| **a != 0.0).count();
        Ok(())
    }
}
