//! How near attention over long contexts comes to the rate at which memory is read.
//!
//! `cargo bench -p flashlm --bench attention [-- --threads 2] [--rounds 5]`
//!
//! One token attends to a full context in every layer of several published shapes, with keys and values of each kind. There are as many
//! layers as exceed the caches many times over. A plain read of memory is measured before each case.

use std::num::NonZeroUsize;
use std::time::Instant;

use anyhow::Result;
use clap::Parser;
use flashlm::KvDtype;
use flashlm::buffers::Buffers;
use flashlm::forward::attention::{AttentionCall, AttentionScratch, Batch, TokenPlace, attend};
use flashlm::forward::kv::{KvMemory, SequencePlaces};
use flashlm::forward::positions::PositionTable;
use flashlm::neurons::source::Arithmetic;
use flashlm_formats::model::Attention;
use flashlm_kernels::{Threads, read_bandwidth_of};

#[derive(Parser)]
struct Arguments {
    /// Threads that compute
    #[arg(long, default_value_t = NonZeroUsize::new(2).unwrap())]
    threads: NonZeroUsize,
    /// Rounds; the best and the median are shown
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// What cargo says to programs that measure
    #[arg(long, hide = true)]
    bench: bool,
}

/// Name, heads, heads of keys and values, width of a head, context.
const SHAPES: [(&str, usize, usize, usize, usize); 4] = [
    ("OPT-6.7B", 32, 32, 128, 2048),
    ("Llama-3-8B", 32, 8, 128, 8192),
    ("SmolLM2-135M", 9, 3, 64, 8192),
    ("Falcon-7B", 71, 1, 64, 8192),
];
/// Keys and values in all layers, at least.
const BYTES: usize = 512 << 20;

fn main() -> Result<()> {
    let args = Arguments::parse();
    let threads = Threads::new(args.threads)?;
    println!(
        "shape         positions  kv    MB a layer  ms a layer: best, median    GB/s: best, median  of a plain read"
    );
    let data = vec![1.0f32; BYTES / 4];
    for (name, heads, kv_heads, head_dim, positions) in SHAPES {
        let shape = Attention { heads, kv_heads, head_dim, qkv_bias: false, out_bias: false, qk_norm: None };
        for (dtype, label) in [(KvDtype::F16, "f16"), (KvDtype::Int8, "int8")] {
            let bytes = KvMemory::layer_bytes(&shape, positions, dtype);
            let layers = BYTES.div_ceil(bytes);
            let mut kv = KvMemory::new(&shape, layers, positions, dtype)?;
            let row: Vec<f32> = (0..kv_heads * head_dim).map(|i| ((i * 7919) % 2003) as f32 / 1001.0 - 1.0).collect();
            for layer in 0..layers {
                for position in 0..positions {
                    kv.put(layer, (position, position), &row, &row)?;
                }
            }
            let mut scratch = AttentionScratch::new(&mut Buffers::default(), &shape, 1, positions);
            let sequences = [SequencePlaces::new(std::iter::once(0..positions))];
            let tokens = [TokenPlace { sequence: 0, position: positions - 1 }];
            let batch = Batch { tokens: &tokens, sequences: &sequences, arithmetic: Arithmetic::Each };
            let qkv: Vec<f32> = (0..shape.qkv_size()).map(|i| ((i * 104_729) % 997) as f32 / 498.0 - 1.0).collect();
            let mut out = vec![0.0; heads * head_dim];
            let plain = read_bandwidth_of(&threads, &data);
            let mut times = Vec::new();
            for _ in 0..args.rounds {
                let start = Instant::now();
                for layer in 0..layers {
                    let positions = &PositionTable::None;
                    let call = AttentionCall { shape: &shape, layer, qk_norm: None, positions, batch: &batch };
                    attend(&call, &threads, &mut qkv.clone(), &mut kv, &mut scratch, &mut out)?;
                }
                times.push(start.elapsed().as_secs_f64() / layers as f64);
            }
            times.sort_by(f64::total_cmp);
            let (best, median) = (times[0], times[times.len() / 2]);
            let rate = |seconds: f64| bytes as f64 / seconds / 1e9;
            println!(
                "{name:<13} {positions:>9}  {label:<4} {:>11.2} {:>17.3} {:>7.3} {:>16.1} {:>7.1} {:>15.2}",
                bytes as f64 / 1e6,
                best * 1e3,
                median * 1e3,
                rate(best),
                rate(median),
                rate(best) * 1e9 / plain
            );
        }
    }
    Ok(())
}
