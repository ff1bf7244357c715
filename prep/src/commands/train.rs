//! `flashlm-prep train`: predictors of the active neurons.

use std::cell::RefCell;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use flashlm_formats::bundle::PredictorDType;
use flashlm_formats::destination::{Directory, DirectoryKind};
use flashlm_formats::predictors::{
    LayerReport, LayerTraining, OperatingPoint, PredictorForm, RankCurve, SeedPoint, TrainReport,
};
use flashlm_prep::train::{
    LOOK_AHEAD_MISSES, LowRankPredictorParams, Progress, RankChoice, SweepEntry, TrainOptions, TrainingData,
    judge_seed, sweep, train_recording,
};

use super::{Stage, inputs, numbers, recorded, source};

/// Arguments of `flashlm-prep train`.
#[derive(Args)]
#[command(
    after_help = "Example:\n  flashlm-prep train recording --model CHECKPOINT -o predictors --size-budget 9%\n\n\
    Layers can be trained separately, with the same results: --layers 0..16 here, --layers 16..32 there, each with the same --rank."
)]
pub(crate) struct TrainArgs {
    /// Directory that `record` (or examples/record_with_transformers.py) wrote
    #[arg(value_name = "RECORDING")]
    recording: PathBuf,
    /// The recorded checkpoint: training starts from its weights, which gives a third fewer false alarms than
    /// starting from the recording alone
    #[arg(long, value_name = "CHECKPOINT")]
    model: Option<PathBuf>,
    /// Directory for the predictors
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Train only layers A..B, B excluded
    #[arg(long, value_name = "A..B", value_parser = parse_layers)]
    layers: Option<Range<usize>>,
    /// `auto`, one rank for all layers, or a list with one for each layer of the model; `projection` instead of a
    /// rank is the model's own projection in four bits
    #[arg(long, value_name = "N|projection|auto", default_value = "auto", value_parser = parse_rank, allow_negative_numbers = true)]
    rank: RankChoice,
    /// How the matrices are stored; int8 allows twice the rank in the same size
    #[arg(long, value_enum, default_value = "int8")]
    dtype: DTypeArg,
    /// Share of the active neurons that must be found, on held-out documents
    #[arg(long, value_name = "SHARE", default_value_t = 0.96, value_parser = numbers::share)]
    recall: f64,
    /// Predict more than that as long as each neuron read brings this share of an active one's mean energy
    #[arg(long, value_name = "SHARE", default_value_t = 0.05, value_parser = numbers::part)]
    worth: f64,
    /// Predict at least this many times as many neurons as are active, however good the predictor: for measuring
    #[arg(long, value_name = "TIMES", default_value_t = 0.0, value_parser = numbers::times)]
    over_fetch: f64,
    /// In place of a threshold chosen by --recall and --worth: predict a neuron where the trained logit says that it is active with
    /// more than this probability. 0.5 is the rule of Deja Vu and of "LLM in a flash" (which also train with --balance 1)
    #[arg(long, value_name = "P", value_parser = numbers::share, conflicts_with_all = ["recall", "worth", "over_fetch"])]
    fixed_threshold: Option<f64>,
    /// Memory that a bundle with these predictors is to run in, as a share of the model's 16-bit size: how much of it they are worth
    /// beside cached neurons (automatic ranks)
    #[arg(long = "for", value_name = "PERCENT", default_value = "50%", value_parser = numbers::percent)]
    memory: f64,
    /// The disk that it is to run from: a profile, as `flashlm disk` keeps it; without one a disk of 14 us a read and 2 GB/s is assumed
    #[arg(long, value_name = "FILE")]
    disk: Option<PathBuf>,
    /// Largest size of all predictors, as a share of the FFN's bytes (automatic ranks)
    #[arg(long, value_name = "PERCENT", default_value = "9%", value_parser = numbers::percent)]
    size_budget: f64,
    /// Maximum number of passes over the training tokens
    #[arg(long, value_name = "N", default_value_t = 6, value_parser = numbers::count)]
    epochs: usize,
    /// Adam's step size at its height [default: 0.003]
    #[arg(long, value_name = "SIZE", value_parser = numbers::step_size)]
    learning_rate: Option<f32>,
    /// Tokens of a step [default: 256]
    #[arg(long, value_name = "N", value_parser = numbers::count)]
    batch: Option<usize>,
    /// How far active and inactive pairs are brought to equal weight in the loss: 0 not at all, 1 fully [default: 0.5]
    #[arg(long, value_name = "SHARE", value_parser = numbers::part)]
    balance: Option<f64>,
    /// Stop after this many epochs without gain on held-out documents [default: 2]
    #[arg(long, value_name = "N", value_parser = numbers::count)]
    patience: Option<usize>,
    /// Train on at most this many tokens
    #[arg(long, value_name = "N", value_parser = numbers::tokens)]
    tokens: Option<usize>,
    /// Also train predictors of the next layer's neurons, of this rank
    #[arg(long, value_name = "N", value_parser = numbers::count)]
    look_ahead: Option<usize>,
    /// Also measure on this recording, of text not used in training
    #[arg(long, value_name = "RECORDING")]
    validation: Option<PathBuf>,
    /// Store no predictors; measure all these ranks on --validation instead, with both dtypes at many thresholds
    #[arg(long, value_name = "N,N,..", value_delimiter = ',', requires = "validation")]
    sweep: Vec<NonZeroUsize>,
    /// Decides the order of the training tokens
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Train with this many seeds, from --seed on: the first one's predictors are kept, and the figures of all are compared
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = numbers::few, conflicts_with = "sweep")]
    seeds: usize,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum DTypeArg {
    F16,
    Int8,
}

impl From<DTypeArg> for PredictorDType {
    fn from(dtype: DTypeArg) -> Self {
        match dtype {
            DTypeArg::F16 => Self::F16,
            DTypeArg::Int8 => Self::Int8,
        }
    }
}

fn parse_layers(text: &str) -> Result<Range<usize>, String> {
    let (first, end) = text.split_once("..").ok_or("expected A..B")?;
    let number = |part: &str| part.trim().parse::<usize>().map_err(|e| format!("{part:?}: {e}"));
    let range = number(first)?..number(end)?;
    if range.is_empty() { Err(format!("{text} holds no layer")) } else { Ok(range) }
}

fn parse_rank(text: &str) -> Result<RankChoice, String> {
    if text == "auto" {
        return Ok(RankChoice::Auto);
    }
    let form = |part: &str| match part.trim() {
        "projection" => Ok(PredictorForm::PROJECTION),
        rank => rank.parse().map(PredictorForm::LowRank),
    };
    let forms: Result<Vec<PredictorForm>, _> = text.split(',').map(form).collect();
    match forms.map_err(|e| format!("expected auto, projection, a number, or several with commas: {e}"))?.as_slice() {
        forms if forms.contains(&PredictorForm::LowRank(0)) => Err("a rank is at least 1".into()),
        [form] => Ok(RankChoice::Fixed(*form)),
        forms => Ok(RankChoice::Each(forms.to_vec())),
    }
}

pub(crate) fn run(args: &TrainArgs) -> Result<ExitCode> {
    super::start_pool(None)?;
    let recording = recorded::open(&args.recording)?;
    let checkpoint = args.model.as_ref().map(|model| source::open(model)).transpose().context("--model")?;
    let other = |dir: &PathBuf| recorded::open_other("--validation", dir, &recording);
    let validation = args.validation.as_ref().map(other).transpose()?;
    if checkpoint.is_none() {
        eprintln!(
            "note: training starts from the recorded inputs alone; with --model CHECKPOINT it starts from the weights"
        );
    }
    let inputs = inputs([&args.recording].into_iter().chain(&args.validation).chain(&args.model));
    let _taken = Directory::take(&args.output, DirectoryKind::Predictors, &inputs)?;
    let mut options = TrainOptions::new(recording.info().model.layers.len());
    options.layers = args.layers.clone().unwrap_or(options.layers);
    options.rank = args.rank.clone();
    options.dtype = args.dtype.into();
    options.recall = args.recall;
    options.worth = args.worth;
    options.over_fetch = args.over_fetch;
    options.size_budget = args.size_budget;
    options.run.memory = args.memory;
    options.run.cost = super::read_cost(args.disk.as_deref())?;
    options.look_ahead = args.look_ahead;
    options.fixed_threshold = args.fixed_threshold;
    options.fit = fit(args, options.fit);
    let data = TrainingData { recording: &recording, validation: validation.as_ref(), checkpoint: checkpoint.as_ref() };
    if !args.sweep.is_empty() {
        return sweep_ranks(args, data, &options);
    }
    let shown = Shown::new(&options, recording.info().model.layers.len());
    let report = train_recording(data, &options, &args.output, &shown)?;
    drop(shown);
    let seeds = if args.seeds > 1 { other_seeds(args, data, &options, &report)? } else { Vec::new() };
    let layers = report.layers.iter().enumerate();
    let layers: Vec<_> =
        layers.map(|(at, layer)| LayerTraining::new(layer, seeds.get(at).cloned().unwrap_or_default())).collect();
    LayerTraining::write(&layers, &args.output)?;

    let on = if validation.is_some() { "validation" } else { "held-out documents" };
    print_layers(&report, on);
    print_seeds(&layers);
    let predictors = super::counted(report.layers.len(), "predictor");
    eprintln!("wrote {predictors} and predictors.json to {}", args.output.display());
    Ok(ExitCode::SUCCESS)
}

/// `params` with what the arguments change.
fn fit(args: &TrainArgs, mut params: LowRankPredictorParams) -> LowRankPredictorParams {
    params = params.epochs(args.epochs).seed(args.seed);
    if let Some(tokens) = args.tokens {
        params = params.tokens_max(tokens);
    }
    if let Some(size) = args.learning_rate {
        params = params.learning_rate(size);
    }
    if let Some(tokens) = args.batch {
        params = params.batch(tokens);
    }
    if let Some(share) = args.balance {
        params = params.balance(share as f32);
    }
    if let Some(epochs) = args.patience {
        params = params.patience(epochs);
    }
    params
}

/// The figures of every layer with each of the seeds, the kept predictors' first.
fn other_seeds(
    args: &TrainArgs,
    data: TrainingData<'_>,
    options: &TrainOptions,
    report: &TrainReport,
) -> Result<Vec<Vec<SeedPoint>>> {
    let stage = Stage::new("other seeds", "fits", (report.layers.len() * (args.seeds - 1)) as u64);
    let of_layer = |layer: &LayerReport| {
        let OperatingPoint { false_negative_rate, false_positive_rate, .. } = *layer.judged();
        let mut points = vec![SeedPoint { seed: args.seed, false_negative_rate, false_positive_rate }];
        for more in 1..args.seeds as u64 {
            points.push(judge_seed(data, options, layer.layer, layer.form(), args.seed.wrapping_add(more))?);
            stage.advance(1);
        }
        Ok(points)
    };
    report.layers.iter().map(of_layer).collect()
}

/// Means and standard deviations over seeds, where there are several.
fn print_seeds(layers: &[LayerTraining]) {
    let seeds = layers.first().map_or(0, |layer| layer.seeds.len());
    if seeds < 2 {
        return;
    }
    println!("\nover {seeds} seeds, mean and standard deviation\nlayer          misses      false alarms");
    for layer in layers {
        let over = |figure: fn(&SeedPoint) -> f64| {
            let mean = layer.seeds.iter().map(figure).sum::<f64>() / seeds as f64;
            let squares: f64 = layer.seeds.iter().map(|seed| (figure(seed) - mean).powi(2)).sum();
            format!("{:.2}% ± {:.2}", 100.0 * mean, 100.0 * (squares / (seeds - 1) as f64).sqrt())
        };
        let (misses, alarms) = (over(|seed| seed.false_negative_rate), over(|seed| seed.false_positive_rate));
        println!("{:>5}  {misses:>14}  {alarms:>16}", layer.layer);
    }
}

/// A table of the layers' predictors, and their means; `on` says what they were measured on.
pub(crate) fn print_layers(report: &TrainReport, on: &str) {
    println!("layer  rank   kB  misses  false alarms  over-fetch  energy lost  seconds   ({on})");
    let mut sums = [0.0; 4];
    for layer in &report.layers {
        let point = layer.judged();
        println!(
            "{:>5}  {:>4} {:>4}  {:>5.2}%  {:>11.2}%  {:>9.2}x  {:>10.2}%  {:>7.1}",
            layer.layer,
            layer.form(),
            layer.bytes / 1000,
            100.0 * point.false_negative_rate,
            100.0 * point.false_positive_rate,
            point.over_fetch,
            100.0 * (1.0 - point.energy_recall),
            layer.seconds
        );
        let values =
            [point.false_negative_rate, point.false_positive_rate, point.predicted_fraction, 1.0 - point.energy_recall];
        sums.iter_mut().zip(values).for_each(|(sum, v)| *sum += 100.0 * v / report.layers.len() as f64);
    }
    print_look_ahead(&report.layers);
    println!(
        "mean: misses {:.2} %, false alarms {:.2} %, predicted {:.2} % of the neurons, energy lost {:.2} %; \
         {:.2} % of the FFN's bytes",
        sums[0],
        sums[1],
        sums[2],
        sums[3],
        100.0 * report.predictor_bytes as f64 / report.ffn_bytes as f64
    );
    let neurons: usize = report.layers.iter().map(|layer| layer.neurons).sum();
    let rows: usize = report.layers.iter().map(|layer| layer.rows.unwrap_or(layer.neurons)).sum();
    if rows < neurons {
        println!(
            "{} of {neurons} neurons never fired in training: they have no row and are never predicted",
            neurons - rows
        );
    }
}

/// Look-ahead of all layers: false alarms of the small predictor and of the next layer's, where the same share is missed.
fn print_look_ahead(layers: &[LayerReport]) {
    let ahead: Vec<_> = layers.iter().filter_map(|l| Some((l.layer, l.look_ahead.as_ref()?))).collect();
    let Some((_, first)) = ahead.first() else { return };
    println!(
        "\nlook-ahead, false alarms of a predictor of its own / of the next layer's used early, where at most this share is missed"
    );
    let shares = LOOK_AHEAD_MISSES.iter().take(first.own_points.len());
    let head: Vec<String> = shares.map(|share| format!("{:>15}", format!("{} %", 100.0 * share))).collect();
    println!("layer  rank   kB{}", head.concat());
    for (layer, report) in ahead {
        let cells = report.own_points.iter().enumerate().map(|(i, own)| {
            let rate = |p: &OperatingPoint| format!("{:.2}", 100.0 * p.false_positive_rate);
            let early = report.next_layers_points.get(i).map_or("-".into(), rate);
            format!("{:>15}", format!("{} / {early}", rate(own)))
        });
        println!("{layer:>5}  {:>4} {:>4}{}", report.rank, report.bytes / 1000, cells.collect::<String>());
    }
    println!();
}

/// Columns of the sweep's table: shares of misses, of those that a curve has points at.
const SWEEP_COLUMNS: [f64; 6] = [0.005, 0.01, 0.02, 0.03, 0.05, 0.10];

fn sweep_ranks(args: &TrainArgs, data: TrainingData<'_>, options: &TrainOptions) -> Result<ExitCode> {
    let ranks: Vec<PredictorForm> = args.sweep.iter().map(|rank| PredictorForm::LowRank(rank.get())).collect();
    let stage = Stage::new("sweep", "fits", (options.layers.len() * ranks.len()) as u64);
    let entries = sweep(data, options, &ranks, &mut |_| stage.advance(1))?;
    drop(stage);
    let path = args.output.join("sweep.json");
    super::publish(&path, (serde_json::to_string_pretty(&entries)? + "\n").as_bytes())?;
    println!("False alarms in per cent, f16 / int8, where this share of the active pairs is missed:\n");
    let head: Vec<String> = SWEEP_COLUMNS.iter().map(|m| format!("{} %", 100.0 * m)).collect();
    println!("| layer | rank | size, % of the FFN | {} | energy kept at 3 %, int8 |", head.join(" | "));
    println!("|{}", " --- |".repeat(4 + head.len()));
    for entry in &entries {
        println!("{}", sweep_row(entry));
    }
    eprintln!("wrote {}", path.display());
    Ok(ExitCode::SUCCESS)
}

fn sweep_row(entry: &SweepEntry) -> String {
    // Of each curve the point that misses no more than this, and most of those.
    let at = |misses: f64, cell: &dyn Fn(&OperatingPoint) -> f64| -> Vec<String> {
        let cells = entry.curves.iter().map(|curve| {
            let points = curve.points.iter().filter(|p| p.false_negative_rate <= misses + 1e-9);
            let best = points.max_by(|a, b| a.false_negative_rate.total_cmp(&b.false_negative_rate));
            best.map_or("-".into(), |p| format!("{:.2}", 100.0 * cell(p)))
        });
        cells.collect()
    };
    let sizes = entry.curves.iter().map(|c| format!("{:.1}", 100.0 * c.bytes as f64 / entry.ffn_bytes as f64));
    format!(
        "| {} | {} | {} | {} | {} |",
        entry.layer,
        entry.rank,
        sizes.collect::<Vec<_>>().join(" / "),
        SWEEP_COLUMNS.map(|misses| at(misses, &|p| p.false_positive_rate).join(" / ")).join(" | "),
        at(0.03, &|p| p.energy_recall).pop().unwrap_or_default()
    )
}

/// A bar over trials and trainings.
struct Shown {
    stage: Stage,
    done: RefCell<u64>,
    total: u64,
}

impl Shown {
    fn new(options: &TrainOptions, layers: usize) -> Self {
        let trials = if options.rank == RankChoice::Auto { layers } else { 0 };
        let total = (trials + options.layers.len()) as u64;
        Shown { stage: Stage::new("training", "steps", total), done: RefCell::new(0), total }
    }

    fn step(&self) {
        *self.done.borrow_mut() += 1;
        self.stage.set(*self.done.borrow(), self.total);
    }
}

impl Progress for Shown {
    fn tried(&self, _layer: usize, _curve: &RankCurve) {
        self.step();
    }

    fn trained(&self, report: &LayerReport) {
        self.step();
        let point = report.judged();
        self.stage.say(&format!(
            "layer {:>3}: {}, misses {:.2} %, false alarms {:.2} %, {:.1} s",
            report.layer,
            report.form().in_words(),
            100.0 * point.false_negative_rate,
            100.0 * point.false_positive_rate,
            report.seconds
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_parsed() {
        assert_eq!(parse_layers("2..5"), Ok(2..5));
        assert!(parse_layers("5..5").is_err() && parse_layers("x").is_err());
        assert_eq!(parse_rank("auto"), Ok(RankChoice::Auto));
        let low = PredictorForm::LowRank;
        assert_eq!(parse_rank("64"), Ok(RankChoice::Fixed(low(64))));
        assert_eq!(
            parse_rank("64,16,projection"),
            Ok(RankChoice::Each(vec![low(64), low(16), PredictorForm::PROJECTION]))
        );
        assert!(parse_rank("-1").unwrap_err().starts_with("expected auto, projection, a number"));
        assert!(parse_rank("0").is_err() && parse_rank("a").is_err());
    }
}
