//! `flashlm-prep order`: finds a storage order for every layer and says what it is worth.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;
use flashlm_formats::bundle::{DEFAULT_ALIGNMENT, FlashLayout, LayoutOptions};
use flashlm_formats::destination::{Directory, DirectoryKind};
use flashlm_formats::model::DType;
use flashlm_formats::publish::create_directory;
use flashlm_formats::recording::{Recording, Split};
use flashlm_formats::regular::read_regular;
use flashlm_formats::weight_format::WeightFormat;
use flashlm_io::DiskProfile;
use flashlm_prep::coactivation::PairOptions;
use flashlm_prep::ordering::{
    GroupShape, LayerTraining, OrderFile, OrderScore, OrderingOptions, ScoreOptions, StrategyKind, positions, score,
    usual_cache_share,
};
use flashlm_prep::wanted::{behind_a_warm_up, wanted_sets};
use flashlm_runtime::cache::PolicyKind;
use flashlm_runtime::disk_cost::ReadCost;
use flashlm_runtime::replay::{ReplayCounts, WantedSets};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::numbers;
use super::progress::Stage;
use super::recorded::{self, layer_range};

/// Find a storage order for each layer's neurons, so that those a token misses lie together.
#[derive(Args, Debug)]
pub(crate) struct OrderArgs {
    /// Directory of the recording.
    recording: PathBuf,
    /// Directory for the orders and `orders.json`.
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// How to order: auto tries all and takes the best; identity, frequency, path; or a step on the way to path:
    /// path-active, path-missed, path-improved.
    #[arg(long, default_value = "auto")]
    strategy: String,
    /// Order what these predictors choose, as `train` wrote them, instead of the active neurons.
    #[arg(long, value_name = "DIR")]
    predictors: Option<PathBuf>,
    /// Layers to order: one (3), or a range (2..5); all that are recorded by default.
    #[arg(long, value_name = "A..B")]
    layers: Option<String>,
    /// Score on all of another recording of the same model, instead of the documents that this one holds out.
    #[arg(long, value_name = "DIR")]
    score_on: Option<PathBuf>,
    /// Use no more than so many tokens for making an order.
    #[arg(long, value_name = "N", default_value_t = 100_000, value_parser = numbers::tokens)]
    tokens: usize,
    /// Neuron cache policy that stands before the disk: window:K, lru, lfu:HALFLIFE, s3-fifo, w-tinylfu; by default the runtime's.
    #[arg(long, default_value_t = PolicyKind::DEFAULT)]
    policy: PolicyKind,
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
    /// Disk profile, as `flashlm disk` keeps it; without one a disk of 14 us a read and 2 GB/s is taken.
    #[arg(long, value_name = "FILE")]
    disk: Option<PathBuf>,
    /// Print what orders.json holds instead of a table.
    #[arg(long)]
    json: bool,
}

impl OrderArgs {
    /// What `prepare` asks for: the best of all strategies, for groups as a bundle has them.
    pub(crate) fn best_of(recording: PathBuf, output: PathBuf, dtype: WeightFormat, cache: f64) -> Self {
        Self {
            recording,
            output,
            strategy: "auto".into(),
            predictors: None,
            layers: None,
            score_on: None,
            tokens: 100_000,
            policy: PolicyKind::DEFAULT,
            cache: Some(cache),
            dtype,
            alignment: DEFAULT_ALIGNMENT,
            records: None,
            request_max: 1 << 20,
            disk: None,
            json: false,
        }
    }
}

/// Tokens that fill the cache before a score counts: of the text that orders are made from, or the first of another recording.
const WARM_UP: usize = 512;
/// Share of the FFN's bytes that predictors are taken to have where nothing is known of them.
const PREDICTOR_SHARE: f64 = 0.05;

/// The whole of `orders.json`.
#[derive(Serialize)]
pub(crate) struct Orders {
    format: &'static str,
    version: u32,
    recording: String,
    scored_on: String,
    training_tokens: usize,
    scored_tokens: u64,
    records_per_group: u32,
    group_bytes: u64,
    policy: String,
    slots: u32,
    request_ns: f64,
    byte_ns: f64,
    layers: Vec<LayerScores>,
}

/// What `orders.json` says of a layer.
#[derive(Serialize, Deserialize)]
pub(crate) struct LayerScores {
    layer: usize,
    chosen: String,
    file: String,
    strategies: Vec<StrategyScore>,
    #[serde(skip)]
    seconds: f64,
}

#[derive(Clone, Serialize, Deserialize)]
struct StrategyScore {
    strategy: String,
    /// Everything wanted is read, gaps never.
    wanted: Figures,
    /// What the cache misses is read, gaps never.
    missed: Figures,
    /// What the cache misses is read as the runtime does it.
    planned: Figures,
    hit_rate: f64,
    predicted_ms_per_token: f64,
}

#[derive(Clone, Serialize, Deserialize)]
struct Figures {
    reads_per_token: f64,
    bytes_per_token: f64,
    mean_run_groups: f64,
    mean_read_groups: f64,
}

impl From<&ReplayCounts> for Figures {
    fn from(counts: &ReplayCounts) -> Self {
        Figures {
            reads_per_token: counts.reads_per_token(),
            bytes_per_token: counts.bytes_per_token(),
            mean_run_groups: counts.mean_run_groups(),
            mean_read_groups: counts.mean_read_groups(),
        }
    }
}

pub(crate) fn run(args: &OrderArgs) -> Result<()> {
    super::start_pool(None)?;
    let recording = recorded::open(&args.recording)?;
    let layers = layer_range(args.layers.as_deref(), &recording)?;
    let other = args.score_on.as_deref().map(Recording::open).transpose().context("--score-on")?;
    let read = [Some(&args.recording), args.predictors.as_ref(), args.score_on.as_ref(), args.disk.as_ref()];
    let _taken = Directory::take(&args.output, DirectoryKind::Orders, &super::inputs(read.into_iter().flatten()))?;
    let ordering = Ordering::new(args, &recording, other)?;
    let stage = Stage::new("order", "strategies", (layers.len() * ordering.kinds.len()) as u64);
    // Layers in parallel: parts of the work cannot be divided. The results are the same in any case.
    let results: Vec<Result<LayerScores>> =
        layers.par_iter().map(|&layer| ordering.layer(args, &recording, layer, Some(&stage))).collect();
    drop(stage);
    let orders = ordering.finish(args, &recording, results.into_iter().collect::<Result<_>>()?)?;
    if args.json {
        super::print_json(&orders)?;
    } else {
        print_table(&orders, &args.output);
    }
    Ok(())
}

/// All that the layers of a recording share when they are ordered.
pub(crate) struct Ordering {
    kinds: Vec<StrategyKind>,
    cost: ReadCost,
    options: ScoreOptions,
    ordering: OrderingOptions,
    groups: GroupShape,
    /// What orders are made from, and what they are judged on: in that, the first `warm_up` tokens fill the cache.
    training: Vec<Range<usize>>,
    judged: Vec<Range<usize>>,
    other: Option<Recording>,
}

impl Ordering {
    /// Checks the arguments. Orders are judged on `other`, or on documents of the recording that they were not made from.
    pub(crate) fn new(args: &OrderArgs, recording: &Recording, other: Option<Recording>) -> Result<Self> {
        let kinds: Vec<StrategyKind> = match args.strategy.as_str() {
            "auto" => StrategyKind::ALL.to_vec(),
            name => vec![StrategyKind::Identity, name.parse()?],
        };
        let model = &recording.info().model;
        let layout = FlashLayout::new(
            model,
            args.dtype,
            LayoutOptions { alignment: args.alignment, ..LayoutOptions::default() },
        )?;
        let layout = match args.records {
            Some(records) => {
                let row_bytes = args.dtype.row_bytes(model.hidden_size);
                FlashLayout::with_records(model.ffn().size, model.ffn().vectors(), row_bytes, records, args.alignment)?
            }
            None => layout,
        };
        let (records, groups) = (layout.records_per_group() as u32, layout.groups() as u32);
        let cost = read_cost(args.disk.as_deref())?;
        let usual = || usual_cache_share(model, args.dtype, WeightFormat::Plain(DType::F16), PREDICTOR_SHARE);
        let slots = (f64::from(groups) * args.cache.unwrap_or_else(usual)) as u32;
        let whole =
            |recording: &Recording| -> Vec<Range<usize>> { std::iter::once(0..recording.tokens().len()).collect() };
        let (training, judged, warm_up) = match &other {
            Some(other) => (whole(recording), whole(other), WARM_UP.min(other.tokens().len() / 2)),
            None => {
                let (judged, warm_up) = behind_a_warm_up(recording.split(), WARM_UP);
                (recording.split().training.clone(), judged, warm_up)
            }
        };
        let enough = !training.is_empty() && Split::tokens(&judged) > warm_up;
        ensure!(
            enough,
            "{} has too few tokens to make orders from some and judge them on others",
            recording.dir().display()
        );
        let options = ScoreOptions {
            records,
            group_bytes: layout.group_bytes() as u64,
            request_bytes_max: args.request_max,
            cost,
            policy: args.policy,
            slots,
            warm_up,
        };
        if let Some(other) = &other {
            let found = other.info().model.ffn().size;
            ensure!(
                found == model.ffn().size,
                "--score-on: {found} neurons a layer, the recording has {}",
                model.ffn().size
            );
        }
        create_directory(&args.output).with_context(|| args.output.display().to_string())?;
        let ordering = OrderingOptions {
            records,
            policy: args.policy,
            slots,
            limits: options.limits(),
            pairs: PairOptions::default(),
        };
        let groups = GroupShape::from(&layout);
        Ok(Ordering { kinds, cost, options, ordering, groups, training, judged, other })
    }

    /// Orders one layer and writes its order.
    pub(crate) fn layer(
        &self,
        args: &OrderArgs,
        recording: &Recording,
        layer: usize,
        stage: Option<&Stage>,
    ) -> Result<LayerScores> {
        let mut recorded = recording.layer(layer)?;
        let chosen_by = args.predictors.as_deref().map(|dir| (dir, layer));
        let training = wanted_sets(&mut recorded, &self.training, args.tokens, chosen_by)?;
        let scored = match &self.other {
            Some(other) => &mut other.layer(layer)?,
            None => &mut recorded,
        };
        let held_out = wanted_sets(scored, &self.judged, usize::MAX, chosen_by)?;
        drop(recorded);
        let begin = Instant::now();
        let ordered = order_layer(&training, &held_out, &self.kinds, &self.ordering, &self.options, stage);
        let seconds = begin.elapsed().as_secs_f64();
        let file = OrderFile {
            layer,
            strategy: ordered.chosen.into(),
            recording: recording.info().id.clone(),
            groups: Some(self.groups),
            order: ordered.order,
        };
        let path = file.write(&args.output)?;
        let file = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(LayerScores { layer, chosen: ordered.chosen.into(), file, strategies: ordered.scores, seconds })
    }

    /// Writes `orders.json` for layers that are ordered.
    pub(crate) fn finish(&self, args: &OrderArgs, recording: &Recording, layers: Vec<LayerScores>) -> Result<Orders> {
        let orders = Orders {
            format: "flashlm-orders",
            version: 1,
            recording: recording.info().id.clone(),
            scored_on: self.other.as_ref().unwrap_or(recording).info().id.clone(),
            training_tokens: Split::tokens(&self.training).min(args.tokens),
            scored_tokens: (Split::tokens(&self.judged) - self.options.warm_up) as u64,
            records_per_group: self.options.records,
            group_bytes: self.options.group_bytes,
            policy: args.policy.to_string(),
            slots: self.options.slots,
            request_ns: self.cost.request_ns(),
            byte_ns: self.cost.byte_ns(),
            layers,
        };
        let json = serde_json::to_string_pretty(&orders)? + "\n";
        super::publish(&args.output.join("orders.json"), json.as_bytes())?;
        Ok(orders)
    }
}

/// What came out for a layer.
struct Ordered {
    chosen: &'static str,
    order: Vec<u32>,
    scores: Vec<StrategyScore>,
}

/// Tries the strategies on a layer and takes the one of the least predicted time; of equals the simpler. The first of
/// `kinds` is there to compare with: it is taken only where all are tried.
fn order_layer(
    training: &WantedSets,
    held_out: &WantedSets,
    kinds: &[StrategyKind],
    ordering: &OrderingOptions,
    options: &ScoreOptions,
    stage: Option<&Stage>,
) -> Ordered {
    let input = LayerTraining::new(training, *ordering);
    let mut best: Option<(OrderScore, &'static str, Vec<u32>)> = None;
    let mut scores = Vec::new();
    for (at, kind) in kinds.iter().enumerate() {
        let strategy = kind.strategy();
        let order = strategy.order(&input);
        let result = score(held_out, &positions(&order), options);
        scores.push(StrategyScore {
            strategy: strategy.name().into(),
            wanted: (&result.wanted).into(),
            missed: (&result.missed).into(),
            planned: (&result.planned).into(),
            hit_rate: result.planned.hit_rate(),
            predicted_ms_per_token: result.ms_per_token,
        });
        let eligible = at > 0 || kinds.len() != 2;
        if eligible && best.as_ref().is_none_or(|b| result.ms_per_token < b.0.ms_per_token) {
            best = Some((result, strategy.name(), order));
        }
        if let Some(stage) = stage {
            stage.advance(1);
        }
    }
    let (_, chosen, order) = best.expect("at least one strategy is eligible");
    Ordered { chosen, order, scores }
}

/// Longest profile of a disk.
const PROFILE_BYTES_MAX: u64 = 16 << 20;

pub(crate) fn read_cost(profile: Option<&Path>) -> Result<ReadCost> {
    let Some(path) = profile else { return Ok(ReadCost::USUAL) };
    let text = read_regular(path, PROFILE_BYTES_MAX).with_context(|| format!("--disk {}", path.display()))?;
    let profile: DiskProfile = serde_json::from_slice(&text)
        .with_context(|| format!("{} is no disk profile; `flashlm disk PATH` makes one", path.display()))?;
    ensure!(
        profile.is_sound(),
        "{}: a profile with impossible rates, or of another version; measure again",
        path.display()
    );
    ReadCost::of_profile(&profile).with_context(|| path.display().to_string())
}

fn print_table(orders: &Orders, output: &Path) {
    println!(
        "groups of {} x {} bytes, cache {} with {} slots, a read {:.1} us + {:.2} GB/s; made from {} tokens, judged on {} others\n",
        orders.records_per_group,
        orders.group_bytes / orders.records_per_group as u64,
        orders.policy,
        orders.slots,
        orders.request_ns / 1e3,
        1.0 / orders.byte_ns,
        orders.training_tokens,
        orders.scored_tokens
    );
    println!("                        all active      what the cache misses   read as planned");
    println!("layer  strategy         reads    x      reads    x    run       reads      KB  ms/token     x");
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
        println!("       {:.1} s", layer.seconds);
    }
    println!("\nwrote {} and orders.json to {}", super::counted(orders.layers.len(), "order"), output.display());
}
