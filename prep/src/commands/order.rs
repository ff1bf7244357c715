//! `flashlm-prep order`: finds a storage order for every layer and says what it is worth.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use flashlm::cache::PolicyKind;
use flashlm_formats::bundle::DEFAULT_ALIGNMENT;
use flashlm_formats::destination::{Directory, DirectoryKind};
use flashlm_formats::orders::OrderSummary;
use flashlm_formats::recording::Recording;
use flashlm_formats::weight_format::WeightFormat;
use flashlm_prep::ordering::{OrderError, OrderOptions, Ordering};
use rayon::prelude::*;

use super::numbers;
use super::progress::Stage;
use super::recorded::{self, layer_range};

/// Find a storage order for each layer's neurons, so that those a token misses lie together.
#[derive(Args, Debug)]
pub(crate) struct OrderArgs {
    /// Directory of the recording.
    recording: PathBuf,
    /// How to order: auto tries all and picks the best; identity, frequency, path, clusters; or a step on the way to path:
    /// path-active, path-missed, path-improved.
    #[arg(long, default_value = "auto")]
    strategy: String,
    /// Layers to order: one (3), or a range (2..5); by default all that are recorded.
    #[arg(long, value_name = "A..B")]
    layers: Option<String>,
    /// Use at most this many tokens for making an order.
    #[arg(long, value_name = "N", default_value_t = 100_000, value_parser = numbers::tokens)]
    tokens: usize,
    #[command(flatten)]
    judge: JudgeArgs,
}

/// What orders are judged by, and where they are written.
#[derive(Args, Debug)]
pub(super) struct JudgeArgs {
    /// Directory for the orders and `orders.json`.
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Order what these predictors (a directory that `train` wrote) choose, instead of the active neurons.
    #[arg(long, value_name = "DIR")]
    predictors: Option<PathBuf>,
    /// Score on all of another recording of the same model, instead of the documents that this one holds out.
    #[arg(long, value_name = "DIR")]
    score_on: Option<PathBuf>,
    /// Neuron cache policy in front of the disk: window:K, lru, lfu:HALFLIFE, s3-fifo, w-tinylfu [default: the runtime's, with the
    /// half-life that a bundle would note for each layer]
    #[arg(long)]
    policy: Option<PolicyKind>,
    /// Neuron cache, as a share of the layer [default: about what half of the model's size leaves for it, --memory 50%].
    #[arg(long, value_name = "SHARE", value_parser = numbers::part)]
    cache: Option<f64>,
    /// How the bundle will store neurons: f32, f16, bf16, int8, int4, or int4/N as `pack` takes it. Orders follow the groups
    /// that its records make.
    #[arg(long, value_name = "FORMAT", default_value = "f16")]
    dtype: WeightFormat,
    /// Groups are padded to a multiple of this: other groups than a bundle's, for experiments.
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_ALIGNMENT, value_parser = numbers::count)]
    alignment: usize,
    /// Neuron records in a group, likewise; by default as many as a bundle has.
    #[arg(long, value_name = "N", value_parser = numbers::count)]
    records: Option<usize>,
    /// Largest read.
    #[arg(long, value_name = "BYTES", default_value_t = 1 << 20, value_parser = numbers::bytes)]
    request_max: u64,
    /// Disk profile, as `flashlm disk` keeps it; without one a disk of 14 us a read and 2 GB/s is assumed.
    #[arg(long, value_name = "FILE")]
    disk: Option<PathBuf>,
    /// Print what orders.json holds instead of a table.
    #[arg(long)]
    json: bool,
}

impl JudgeArgs {
    fn options(&self) -> Result<OrderOptions> {
        Ok(OrderOptions {
            predictors: self.predictors.clone(),
            policy: self.policy,
            cache: self.cache,
            alignment: self.alignment,
            records: self.records,
            request_bytes_max: self.request_max,
            cost: super::read_cost(self.disk.as_deref())?,
            ..OrderOptions::new(self.dtype)
        })
    }

    /// Takes the directory and begins; `read` is read besides what is named here.
    pub(super) fn begin(
        &self,
        recording: &Recording,
        read: &[&PathBuf],
        change: impl FnOnce(OrderOptions) -> OrderOptions,
    ) -> Result<(Directory, Ordering)> {
        let other = self.score_on.as_deref().map(Recording::open).transpose().context("--score-on")?;
        let read = read.iter().copied().chain(&self.predictors).chain(&self.score_on).chain(&self.disk);
        let taken = Directory::take(&self.output, DirectoryKind::Orders, &super::inputs(read))?;
        let ordering = Ordering::new(change(self.options()?), recording, other, &self.output)?;
        Ok((taken, ordering))
    }

    /// Says what came out.
    pub(super) fn show(&self, orders: &OrderSummary) -> Result<()> {
        if self.json {
            super::print_json(orders)?;
        } else {
            print_table(orders, &self.output);
        }
        Ok(())
    }
}

pub(crate) fn run(args: &OrderArgs) -> Result<()> {
    super::start_pool(None)?;
    let strategy = match args.strategy.as_str() {
        "auto" => None,
        name => Some(name.parse()?),
    };
    let recording = recorded::open(&args.recording)?;
    let layers = layer_range(args.layers.as_deref(), &recording)?;
    let asked = |options| OrderOptions { strategy, tokens: args.tokens, ..options };
    let (_taken, ordering) = args.judge.begin(&recording, &[&args.recording], asked)?;
    let stage = Stage::new("order", "strategies", (layers.len() * ordering.strategies()) as u64);
    // Layers in parallel: parts of the work cannot be divided. The results are the same in any case.
    let scores = layers.par_iter().map(|&layer| ordering.layer(&recording, layer, &|| stage.advance(1)));
    let scores: Vec<Result<_, OrderError>> = scores.collect();
    drop(stage);
    args.judge.show(&ordering.finish(&recording, scores.into_iter().collect::<Result<_, _>>()?)?)
}

fn print_table(orders: &OrderSummary, output: &Path) {
    println!(
        "groups of {} x {} bytes, cache {} with {} slots, a read {:.1} us + {:.2} GB/s; {}, judged on {} tokens\n",
        orders.records_per_group,
        orders.group_bytes / orders.records_per_group as u64,
        orders.policy,
        orders.slots,
        orders.request_ns / 1e3,
        1.0 / orders.byte_ns,
        match orders.training_tokens {
            0 => "made elsewhere".to_owned(),
            tokens => format!("made from {tokens} other tokens"),
        },
        orders.scored_tokens
    );
    println!("                        all active      what the cache misses   read as planned");
    println!("layer  strategy         reads    x      reads    x    run       reads      kB  ms/token     x");
    for layer in &orders.layers {
        let base = &layer.strategies[0];
        for s in &layer.strategies {
            let times = |a: f64, b: f64| if b > 0.0 { a / b } else { 1.0 };
            println!(
                "{:>5}  {:<14}{:>8.2}{:>6.2}{:>10.2}{:>6.2}{:>6.2}{:>11.2}{:>8.1}{:>10.4}{:>6.2}{}",
                layer.layer,
                s.strategy,
                s.wanted.reads_per_token,
                times(base.wanted.reads_per_token, s.wanted.reads_per_token),
                s.missed.reads_per_token,
                times(base.missed.reads_per_token, s.missed.reads_per_token),
                s.missed.mean_run_groups,
                s.planned.reads_per_token,
                s.planned.bytes_per_token / 1e3,
                s.predicted_ms_per_token,
                times(base.predicted_ms_per_token, s.predicted_ms_per_token),
                if s.strategy == layer.chosen { "  <-" } else { "" }
            );
        }
        println!("       {}, {:.1} s", layer.policy, layer.seconds);
    }
    println!("\nwrote {} and orders.json to {}", super::counted(orders.layers.len(), "order"), output.display());
}
