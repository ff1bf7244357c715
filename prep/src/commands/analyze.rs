//! `flashlm-prep analyze`: what the recorded activity looks like.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Args;
use flashlm::cache::PolicyKind;
use flashlm::planner::PlanLimits;
use flashlm::replay::{ReplayOptions, WantedSets, replay, replay_optimal};
use flashlm_formats::ids::NeuronId;
use flashlm_prep::coactivation::{LayerActivity, PairGraph, PairOptions, PartnerReport, WindowReuse};
use flashlm_prep::demand::wanted_sets;
use serde::Serialize;

use super::numbers;
use super::progress::Stage;
use super::recorded::{self, layer_range};

/// Show how sparse and how repetitive a model's neurons are: skew, reuse, co-activation, cache policies.
#[derive(Args, Debug)]
pub(crate) struct AnalyzeArgs {
    /// Directory of the recording.
    recording: PathBuf,
    /// Analyze what these predictors (a directory that `train` wrote) choose, instead of the active neurons.
    #[arg(long, value_name = "DIR")]
    predictors: Option<PathBuf>,
    /// Layers to analyze: one (3), or a range (2..5); by default all that are recorded.
    #[arg(long, value_name = "A..B")]
    layers: Option<String>,
    /// Analyze at most this many tokens.
    #[arg(long, value_name = "N", default_value_t = 100_000, value_parser = numbers::tokens)]
    tokens: usize,
    /// Analyze only held-out documents, which predictors were not trained on.
    #[arg(long)]
    held_out: bool,
    /// Windows of up to this many tokens.
    #[arg(long, value_name = "K", default_value_t = 8, value_parser = numbers::few)]
    windows: usize,
    /// Window, in tokens, that the closest-partner analysis assumes to be cached.
    #[arg(long, value_name = "K", default_value_t = 4, value_parser = numbers::few)]
    window: usize,
    /// Partners kept for each neuron.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = numbers::few)]
    partners: usize,
    /// Print JSON instead of tables.
    #[arg(long)]
    json: bool,
}

/// Sizes of the caches that policies are compared at, in percent of the layer.
const CACHE_PERCENT: [u32; 3] = [10, 25, 50];

#[derive(Serialize)]
struct LayerReport {
    layer: usize,
    activity: LayerActivity,
    pairs: PairReport,
    partners: PartnerReport,
    /// Neurons missed per token, by size and policy.
    caches: Vec<CacheReport>,
}

#[derive(Serialize)]
struct PairReport {
    /// Every i-th token was counted.
    token_step: usize,
    /// Where a neuron fires, its strongest partner fires too: mean over neurons that fire.
    strongest_partner: f64,
    /// The same, had all neurons fired independently: the rate of the strongest partner.
    strongest_partner_rate: f64,
}

#[derive(Serialize)]
struct CacheReport {
    percent_of_layer: u32,
    policy: String,
    missed_per_token: f64,
    hit_rate: f64,
}

#[derive(Serialize)]
struct Report {
    recording: String,
    tokens: usize,
    layers: Vec<LayerReport>,
}

pub(crate) fn run(args: &AnalyzeArgs) -> Result<()> {
    super::start_pool(None)?;
    let recording = recorded::open(&args.recording)?;
    let layers = layer_range(args.layers.as_deref(), &recording)?;
    let held_out = recording.split().flags(recording.tokens().len());
    let looked_at = recording.sequences().filter(|sequence| !args.held_out || held_out[sequence.start]);
    let (mut parts, mut sequences, mut tokens) = (Vec::new(), vec![0], 0);
    for sequence in looked_at {
        let end = sequence.end.min(sequence.start + (args.tokens - tokens));
        if end > sequence.start {
            tokens += end - sequence.start;
            parts.push(sequence.start..end);
            sequences.push(tokens as u32);
        }
    }
    ensure!(tokens > 0, "{} holds no whole sequences out", recording.dir().display());
    let stage = Stage::new("analyze", "layers", layers.len() as u64);
    let mut reports = Vec::new();
    for &layer in &layers {
        let mut recorded = recording.layer(layer)?;
        let chosen_by = args.predictors.as_deref().map(|dir| (dir, layer));
        let sets = wanted_sets(&mut recorded, &parts, tokens, chosen_by)?;
        drop(recorded);
        reports.push(look_at(layer, &sets, &sequences, args));
        stage.advance(1);
    }
    drop(stage);
    let report = Report { recording: recording.info().id.clone(), tokens, layers: reports };
    if args.json {
        super::print_json(&report)?;
    } else {
        print_tables(&report, args);
    }
    Ok(())
}

fn look_at(layer: usize, sets: &WantedSets<NeuronId>, sequences: &[u32], args: &AnalyzeArgs) -> LayerReport {
    let graph = PairGraph::count(sets, &PairOptions { partners_max: args.partners, ..Default::default() });
    let counted = sets.tokens().div_ceil(graph.token_step()).max(1) as f64;
    let strongest: Vec<(f64, f64)> = (0..sets.layer_size())
        .filter_map(|n| {
            let partner = graph.partners(n).first()?;
            Some((partner.together as f64 / graph.uses(n) as f64, graph.uses(partner.neuron) as f64 / counted))
        })
        .collect();
    let mean = |f: fn(&(f64, f64)) -> f64| strongest.iter().map(f).sum::<f64>() / strongest.len().max(1) as f64;
    let (mut caches, alone) = (Vec::new(), sets.alone());
    for percent_of_layer in CACHE_PERCENT {
        let slots = (sets.layer_size() as u64 * percent_of_layer as u64 / 100) as u32;
        let limits = PlanLimits::adjacent_only(1);
        let options = |policy| ReplayOptions { policy, slots, limits, warm_up: sets.tokens() / 20 };
        let mut add = |policy: String, counts: flashlm::replay::ReplayCounts| {
            let missed_per_token = counts.missed as f64 / counts.tokens.max(1) as f64;
            caches.push(CacheReport { percent_of_layer, policy, missed_per_token, hit_rate: counts.hit_rate() });
        };
        for policy in PolicyKind::ALL {
            add(policy.to_string(), replay(&alone, &options(policy)));
        }
        add("optimum".into(), replay_optimal(&alone, &options(PolicyKind::Lru)));
    }
    LayerReport {
        layer,
        activity: LayerActivity::of(sets, sequences, args.windows),
        pairs: PairReport {
            token_step: graph.token_step(),
            strongest_partner: mean(|s| s.0),
            strongest_partner_rate: mean(|s| s.1),
        },
        partners: PartnerReport::of(sets, &graph, args.window),
        caches,
    }
}

fn percent(x: f64) -> String {
    format!("{:.1} %", 100.0 * x)
}

fn table(title: &str, head: &[String], rows: impl Iterator<Item = Vec<String>>) {
    println!("{title}\n");
    let rows: Vec<Vec<String>> = std::iter::once(head.to_vec()).chain(rows).collect();
    let width = |at: usize| rows.iter().map(|r| r[at].chars().count()).max().unwrap_or(0);
    for row in &rows {
        let cells: Vec<String> =
            row.iter().enumerate().map(|(at, cell)| format!("{cell:>w$}", w = width(at))).collect();
        println!("  {}", cells.join("  "));
    }
    println!();
}

/// A table with a row for each layer; `row` gives the cells after the layer's number.
fn layer_table(
    title: &str,
    names: &[impl AsRef<str>],
    layers: &[LayerReport],
    row: impl Fn(&LayerReport) -> Vec<String>,
) {
    let names = names.iter().map(|name| name.as_ref().to_owned());
    let head: Vec<String> = std::iter::once("layer".to_owned()).chain(names).collect();
    table(title, &head, layers.iter().map(|l| std::iter::once(l.layer.to_string()).chain(row(l)).collect()));
}

fn print_tables(report: &Report, args: &AnalyzeArgs) {
    println!("{} tokens of recording {}\n", report.tokens, report.recording);
    print_sparsity(&report.layers);
    print_windows(&report.layers, args.windows);
    print_partners(&report.layers, args.window);
    CACHE_PERCENT.iter().for_each(|&percent| print_caches(&report.layers, percent));
}

fn print_sparsity(layers: &[LayerReport]) {
    let shares = LayerActivity::HOTTEST.iter().map(|p| format!("top {p} %"));
    let names: Vec<String> = ["active", "p99", "never"].map(String::from).into_iter().chain(shares).collect();
    layer_table(
        "Sparsity: active neurons of a token, neurons never active, share of activations in the hottest neurons",
        &names,
        layers,
        |l| {
            let a = &l.activity;
            let mut row = vec![percent(a.active_fraction), a.active_p99.to_string(), a.never_active.to_string()];
            row.extend(a.hottest_share.map(percent));
            row
        },
    );
}

/// What successive tokens have in common, for windows of up to this many tokens.
fn print_windows(layers: &[LayerReport], windows: usize) {
    let names: Vec<String> = (1..=windows).map(|k| format!("k={k}")).collect();
    let by_window = |title: &str, share: fn(&WindowReuse) -> f64| {
        layer_table(title, &names, layers, |l| l.activity.windows.iter().map(|w| percent(share(w))).collect());
    };
    by_window("Reuse: active neurons that none of the last k tokens used", |w| w.new_fraction);
    by_window("Union: share of the layer active in any of k successive tokens (cached by a window)", |w| {
        w.union_fraction
    });
    by_window("Read: share of the layer that a window of k tokens reads per token", |w| w.read_fraction);
}

fn print_partners(layers: &[LayerReport], window: usize) {
    const NAMES: [&str; 9] = [
        "partner fires",
        "if independent",
        "most popular of",
        "on hottest 1 %",
        "copies wanted",
        "useful",
        "most read copy/token",
        "reads",
        "bytes",
    ];
    let title = format!(
        "Closest partners as copies, with a window of {window} tokens (useful: wanted, not cached, not read already)"
    );
    layer_table(&title, &NAMES, layers, |l| {
        let f = &l.partners;
        vec![
            percent(l.pairs.strongest_partner),
            percent(l.pairs.strongest_partner_rate),
            format!("{} of {}", f.most_popular_of, f.with_partner),
            percent(f.hottest_share),
            percent(f.copies_wanted),
            percent(f.copies_useful),
            format!("{:.2}", f.most_read_copy_per_token),
            format!("{:.2}x", f.reads_factor),
            format!("{:.2}x", f.bytes_factor),
        ]
    });
}

fn print_caches(layers: &[LayerReport], percent_of_layer: u32) {
    let of = |l: &LayerReport| -> Vec<(String, f64)> {
        let of_size = l.caches.iter().filter(|cache| cache.percent_of_layer == percent_of_layer);
        of_size.map(|cache| (cache.policy.clone(), cache.missed_per_token)).collect()
    };
    let names: Vec<String> = layers.first().map(|l| of(l).into_iter().map(|c| c.0).collect()).unwrap_or_default();
    let title = format!("Neurons missed per token with a cache of {percent_of_layer} % of the layer");
    layer_table(&title, &names, layers, |l| of(l).into_iter().map(|c| format!("{:.2}", c.1)).collect());
}
