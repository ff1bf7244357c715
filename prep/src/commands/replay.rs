//! `flashlm-prep replay`: recorded tokens through cache policies of any size, without a disk.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use clap::Args;
use flashlm::cache::PolicyKind;
use flashlm::neurons::predictor::PredictorTensors;
use flashlm::planner::PlanLimits;
use flashlm::replay::{ReplayCounts, ReplayOptions, WantedSets, replay, replay_optimal};
use flashlm::tensors::SharedBytes;
use flashlm_formats::bundle::{Bundle, FlashLayout, LayoutOptions};
use flashlm_formats::ids::{GroupId, Position};
use flashlm_formats::orders::OrderFile;
use flashlm_formats::publish::create_directory;
use flashlm_formats::recording::Recording;
use flashlm_formats::weight_format::WeightFormat;
use flashlm_prep::demand::{behind_a_warm_up, chosen_sets, wanted_sets};
use flashlm_prep::ordering::positions;
use flashlm_prep::traces;
use rayon::prelude::*;
use serde::Serialize;

use super::progress::Stage;
use super::recorded::{self, layer_range};
use super::{numbers, read_cost};

/// Largest read, as in decoding.
const REQUEST_BYTES_MAX: u64 = 1 << 20;
/// Groups of a trace that does not say how large they are.
const GROUP_BYTES: u64 = 4096;

/// Arguments of `flashlm-prep replay`.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    flashlm-prep replay recording --predictors predictors --orders orders --policy lru,lfu:64 --cache 10%,25%\n  \
    flashlm-prep replay recording --bundle model.flashlm --write-traces traces --json > figures.json\n  \
    flashlm-prep replay --traces traces --policy window:4 --cache 200\n\n\
    The tokens to train on fill the caches, those held out are counted. `belady` in the results is the optimum, which knows the future. \
    A trace is two arrays of u32 for each layer, layer-NNN.offsets.npy and layer-NNN.ids.npy: token t needs the groups \
    ids[offsets[t]:offsets[t + 1]].")]
pub(crate) struct ReplayArgs {
    /// Directory of the recording
    #[arg(value_name = "RECORDING", required_unless_present = "traces", conflicts_with = "traces")]
    recording: Option<PathBuf>,
    /// Replay these traces instead
    #[arg(long, value_name = "DIR")]
    traces: Option<PathBuf>,
    /// Replay what these predictors (a directory that `train` wrote) choose, instead of the active neurons
    #[arg(long, value_name = "DIR", conflicts_with = "traces")]
    predictors: Option<PathBuf>,
    /// Neurons lie in these orders (a directory that `order` wrote), instead of the checkpoint's
    #[arg(long, value_name = "DIR", conflicts_with = "traces")]
    orders: Option<PathBuf>,
    /// Take predictors, orders and groups from this bundle
    #[arg(long, value_name = "FILE", conflicts_with_all = ["traces", "predictors", "orders"])]
    bundle: Option<PathBuf>,
    /// Layers to replay: one (3), or a range (2..5); by default all that are recorded
    #[arg(long, value_name = "A..B", conflicts_with = "traces")]
    layers: Option<String>,
    /// Policies: window:TOKENS, lru, lfu:TOKENS, s3-fifo, w-tinylfu [default: one of each]
    #[arg(long, value_name = "POLICY,..", value_delimiter = ',')]
    policy: Vec<PolicyKind>,
    /// Sizes of each layer's cache: shares of the layer, or groups
    #[arg(long, value_name = "SIZE,..", value_delimiter = ',', default_value = "5%,10%,25%,50%")]
    cache: Vec<Size>,
    /// Tokens that fill the caches before any is counted [default: those to train on, at most 2048; of traces none]
    #[arg(long, value_name = "N", value_parser = numbers::tokens)]
    warm_up: Option<usize>,
    /// Count at most this many tokens
    #[arg(long, value_name = "N", default_value_t = 100_000, value_parser = numbers::tokens)]
    tokens: usize,
    /// How a bundle stores neurons, which decides its groups: f32, f16, bf16, int8, int4, or int4/N
    #[arg(long, value_name = "FORMAT", default_value = "f16", conflicts_with_all = ["traces", "bundle"])]
    dtype: WeightFormat,
    /// Groups of a layer [default: as many as the traces show]
    #[arg(long, value_name = "N", value_parser = numbers::count, requires = "traces")]
    groups: Option<usize>,
    /// Bytes of a group [default: 4096]
    #[arg(long, value_name = "N", value_parser = numbers::bytes, requires = "traces")]
    group_bytes: Option<u64>,
    /// Disk profile, as `flashlm disk` keeps it, for planning reads; without one a typical disk is assumed
    #[arg(long, value_name = "FILE")]
    disk: Option<PathBuf>,
    /// Also write the traces that are replayed, into this new directory
    #[arg(long, value_name = "DIR")]
    write_traces: Option<PathBuf>,
    /// Print a JSON object instead of the table
    #[arg(long)]
    json: bool,
}

/// A size of a layer's cache.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Size {
    /// Of the layer.
    Share(f64),
    Groups(u32),
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.ends_with('%') {
            return numbers::percent(text).map(Self::Share);
        }
        text.parse()
            .map(Self::Groups)
            .map_err(|_| "expected a share of a layer such as 10%, or a number of groups".into())
    }
}

impl Size {
    fn slots(self, groups: u32) -> u32 {
        match self {
            Self::Share(share) => (f64::from(groups) * share) as u32,
            Self::Groups(slots) => slots.min(groups),
        }
    }
}

/// All that one policy reads with caches of one size.
#[derive(Serialize)]
struct Outcome {
    policy: String,
    cache: String,
    /// All layers together.
    #[serde(flatten)]
    total: Figures,
    layers: Vec<LayerFigures>,
}

#[derive(Serialize)]
struct LayerFigures {
    layer: usize,
    slots: u32,
    #[serde(flatten)]
    figures: Figures,
}

#[derive(Serialize)]
struct Figures {
    needed_per_token: f64,
    missed_per_token: f64,
    hit_rate: f64,
    reads_per_token: f64,
    bytes_per_token: f64,
}

impl From<&ReplayCounts> for Figures {
    fn from(counts: &ReplayCounts) -> Self {
        let per_token = |count: u64| count as f64 / counts.tokens.max(1) as f64;
        Self {
            needed_per_token: per_token(counts.wanted),
            missed_per_token: per_token(counts.missed),
            hit_rate: counts.hit_rate(),
            reads_per_token: counts.reads_per_token(),
            bytes_per_token: counts.bytes_per_token(),
        }
    }
}

/// What is replayed, layer by layer.
enum Demand {
    Recorded { recording: Box<Recording>, storage: Storage, parts: Vec<std::ops::Range<usize>> },
    Traces { dir: PathBuf, groups: Option<u32> },
}

/// Where neurons lie, and what chooses them.
enum Storage {
    Files { predictors: Option<PathBuf>, orders: Option<PathBuf>, records: u32 },
    Bundle { bundle: Box<Bundle>, predictors: Option<SharedBytes> },
}

impl Demand {
    fn layer(&self, layer: usize, tokens: usize) -> Result<WantedSets<GroupId>> {
        let (recording, storage, parts) = match self {
            Self::Traces { dir, groups } => return Ok(traces::read(dir, layer, *groups)?),
            Self::Recorded { recording, storage, parts } => (recording, storage, parts),
        };
        let mut recorded = recording.layer(layer)?;
        let neurons = recorded.ffn();
        match storage {
            Storage::Files { predictors, orders, records } => {
                let chosen_by = predictors.as_ref().map(|dir| (dir.as_path(), layer));
                let sets = wanted_sets(&mut recorded, parts, tokens, chosen_by)?;
                let order = orders.as_ref().map(|dir| OrderFile::read(dir, layer, neurons)).transpose()?;
                let in_place = || (0..neurons as u32).map(Position).collect();
                Ok(sets.stored(&order.map_or_else(in_place, |order| positions(&order.order)), *records))
            }
            Storage::Bundle { bundle, predictors: Some(blob) } => {
                let (tensors, prefix) = (PredictorTensors::parse(blob)?, format!("layers.{layer}."));
                let sets: WantedSets<Position> = chosen_sets(&mut recorded, parts, tokens, (&tensors, &prefix))?;
                Ok(sets.grouped(bundle.layout().records_per_group() as u32))
            }
            Storage::Bundle { bundle, predictors: None } => {
                let sets = wanted_sets(&mut recorded, parts, tokens, None)?;
                let position = positions(bundle.storage_order(layer));
                Ok(sets.stored(&position, bundle.layout().records_per_group() as u32))
            }
        }
    }
}

fn open_bundle(path: &Path, recording: &Recording) -> Result<(Storage, usize)> {
    let bundle = Bundle::open(path)?;
    let (spec, model) = (bundle.spec(), &recording.info().model);
    ensure!(
        (spec.layers.len(), spec.hidden_size, spec.ffn().size)
            == (model.layers.len(), model.hidden_size, model.ffn().size),
        "{} is a recording of another model than {}",
        recording.dir().display(),
        path.display()
    );
    let predictors = bundle.read_predictors()?.map(|blob| Arc::new(blob) as SharedBytes);
    let group_bytes = bundle.layout().group_bytes();
    Ok((Storage::Bundle { bundle: Box::new(bundle), predictors }, group_bytes))
}

/// What the arguments name.
struct Source {
    demand: Demand,
    layers: Vec<usize>,
    /// Tokens that are not counted.
    warm_up: usize,
    group_bytes: u64,
}

impl Source {
    fn open(args: &ReplayArgs) -> Result<Self> {
        match &args.traces {
            Some(dir) => {
                let layers = traces::layers(dir)?;
                ensure!(!layers.is_empty(), "{} holds no traces (layer-NNN.offsets.npy)", dir.display());
                let groups = args.groups.map(|groups| groups as u32);
                let group_bytes = args.group_bytes.unwrap_or(GROUP_BYTES);
                let demand = Demand::Traces { dir: dir.clone(), groups };
                Ok(Self { demand, layers, warm_up: args.warm_up.unwrap_or(0), group_bytes })
            }
            None => {
                let dir = args.recording.as_ref().context("give a recording, or --traces")?;
                let recording = recorded::open(dir)?;
                let layers = layer_range(args.layers.as_deref(), &recording)?;
                let (parts, warm_up) = behind_a_warm_up(recording.split(), args.warm_up.unwrap_or(2048));
                let (storage, group_bytes) = match &args.bundle {
                    Some(path) => open_bundle(path, &recording)?,
                    None => {
                        let layout = FlashLayout::new(&recording.info().model, args.dtype, LayoutOptions::default())?;
                        let records = layout.records_per_group() as u32;
                        let (predictors, orders) = (args.predictors.clone(), args.orders.clone());
                        (Storage::Files { predictors, orders, records }, layout.group_bytes())
                    }
                };
                let demand = Demand::Recorded { recording: Box::new(recording), storage, parts };
                Ok(Self { demand, layers, warm_up, group_bytes: group_bytes as u64 })
            }
        }
    }
}

pub(crate) fn run(args: &ReplayArgs) -> Result<ExitCode> {
    super::start_pool(None)?;
    let cost = read_cost(args.disk.as_deref())?;
    let Source { demand, layers, warm_up, group_bytes } = Source::open(args)?;
    if let Some(dir) = &args.write_traces {
        let empty = std::fs::read_dir(dir).map_or(true, |mut entries| entries.next().is_none());
        ensure!(empty, "{} is not empty; give a new directory for the traces", dir.display());
        create_directory(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    let limits = PlanLimits::for_cost(&cost, group_bytes, REQUEST_BYTES_MAX);
    let replayed = |sets: &WantedSets<GroupId>, policy: Option<PolicyKind>, slots| {
        let options = ReplayOptions { policy: policy.unwrap_or(PolicyKind::DEFAULT), slots, limits, warm_up };
        if policy.is_some() { replay(sets, &options) } else { replay_optimal(sets, &options) }
    };
    let policies = if args.policy.is_empty() { PolicyKind::ALL.to_vec() } else { args.policy.clone() };
    let policies: Vec<Option<PolicyKind>> = policies.into_iter().map(Some).chain([None]).collect();
    let cases: Vec<_> =
        args.cache.iter().flat_map(|size| policies.iter().map(move |policy| (*size, *policy))).collect();

    let stage = Stage::new("replay", "layers", layers.len() as u64);
    let mut totals = vec![ReplayCounts::default(); cases.len()];
    let mut of_layers: Vec<Vec<LayerFigures>> = cases.iter().map(|_| Vec::new()).collect();
    let mut groups = 0;
    for &layer in &layers {
        let mut sets = demand.layer(layer, warm_up.saturating_add(args.tokens))?;
        if sets.tokens() > warm_up.saturating_add(args.tokens) {
            let mut first = WantedSets::new(sets.layer_size());
            sets.iter().take(warm_up + args.tokens).for_each(|token| first.push(token.iter().copied()));
            sets = first;
        }
        ensure!(
            sets.tokens() > warm_up,
            "layer {layer} has {} tokens, and {warm_up} fill the caches: give a smaller --warm-up",
            sets.tokens()
        );
        if let Some(dir) = &args.write_traces {
            traces::write(dir, layer, &sets)?;
        }
        groups = groups.max(sets.layer_size());
        let counts: Vec<(u32, ReplayCounts)> = cases
            .par_iter()
            .map(|(size, policy)| {
                let slots = size.slots(sets.layer_size());
                (slots, replayed(&sets, *policy, slots))
            })
            .collect();
        for (at, (slots, counts)) in counts.into_iter().enumerate() {
            of_layers[at].push(LayerFigures { layer, slots, figures: Figures::from(&counts) });
            totals[at] += counts;
        }
        stage.advance(1);
    }
    drop(stage);
    let outcomes: Vec<Outcome> = cases
        .iter()
        .zip(totals.iter().zip(of_layers))
        .map(|((size, policy), (total, layers))| Outcome {
            policy: policy.map_or_else(|| "belady".to_owned(), |policy| policy.to_string()),
            cache: match size {
                Size::Share(share) => format!("{}%", (1e5 * share).round() / 1e3),
                Size::Groups(groups) => groups.to_string(),
            },
            total: Figures::from(total),
            layers,
        })
        .collect();
    let tokens = totals.first().map_or(0, |total| total.tokens);
    if args.json {
        super::print_json(&serde_json::json!({
            "tokens": tokens,
            "warm_up": warm_up,
            "groups": groups,
            "group_bytes": group_bytes,
            "results": outcomes,
        }))?;
    } else {
        print_table(&outcomes, tokens, warm_up, (groups, group_bytes));
    }
    if let Some(dir) = &args.write_traces {
        eprintln!("wrote the traces of {} to {}", super::counted(layers.len(), "layer"), dir.display());
    }
    Ok(ExitCode::SUCCESS)
}

fn print_table(outcomes: &[Outcome], tokens: u64, warm_up: usize, (groups, group_bytes): (u32, u64)) {
    let layers = outcomes.first().map_or(0, |outcome| outcome.layers.len());
    println!(
        "{}, each of {groups} groups of {group_bytes} bytes; {tokens} tokens counted after {warm_up}; per token:\n",
        super::counted(layers, "layer")
    );
    println!("  cache  policy           needed    missed    hits     reads        kB");
    for outcome in outcomes {
        let Figures { needed_per_token, missed_per_token, hit_rate, reads_per_token, bytes_per_token } = outcome.total;
        println!(
            "{:>7}  {:<12}{needed_per_token:>11.1}{missed_per_token:>10.1}{:>7.1}%{reads_per_token:>10.1}{:>10.1}",
            outcome.cache,
            outcome.policy,
            100.0 * hit_rate,
            bytes_per_token / 1e3
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_shares_or_groups() {
        let slots = |text: &str| text.parse::<Size>().map(|size| size.slots(1000));
        assert_eq!((slots("10%"), slots("12.5%"), slots("100%"), slots("200")), (Ok(100), Ok(125), Ok(1000), Ok(200)));
        assert_eq!((slots("0"), slots("5000")), (Ok(0), Ok(1000)));
        for bad in ["", "x", "101%", "-1", "1.5", "0%"] {
            assert!(slots(bad).is_err(), "{bad:?}");
        }
    }
}
