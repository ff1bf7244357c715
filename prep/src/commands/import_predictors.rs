//! `flashlm-prep import-predictors`: predictors that Deja Vu or PowerInfer trained.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use flashlm_formats::bundle::PredictorDType;
use flashlm_formats::destination::{Directory, DirectoryKind};
use flashlm_prep::foreign_predictors::{find_files, read};
use flashlm_prep::train::{TrainOptions, TrainingData, adopt_layer, write_report};

use super::train::{DTypeArg, print_layers};
use super::{Stage, inputs, numbers, recorded};

/// Arguments of `flashlm-prep import-predictors`.
#[derive(Args)]
#[command(after_help = "Example:\n  \
    flashlm-prep record /models/relullama-7b --text my.txt -o recording\n  \
    flashlm-prep import-predictors relullama-7b-predictors --recording recording -o predictors\n  \
    flashlm-prep pack /models/relullama-7b --predictors predictors -o relullama-7b.flashlm\n\n\
    The directory has one file for each layer: model_N.pt with fc1.weight and fc2.weight (PowerInfer, a ReLU between the two), or ..layerN...pt \
    with 0.weight and 1.weight (Deja Vu). Thresholds are chosen on the recording.")]
pub(crate) struct ImportArgs {
    /// Directory with one file for each layer
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Directory for the predictors
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Directory that `record` wrote, of the model that the predictors are for
    #[arg(long, value_name = "RECORDING")]
    recording: PathBuf,
    /// Judge what was imported on all of this recording, of other text, as `train --validation` does
    #[arg(long, visible_alias = "validation", value_name = "RECORDING")]
    held_out: Option<PathBuf>,
    /// How the matrices are stored
    #[arg(long, value_enum, default_value = "int8")]
    dtype: DTypeArg,
    /// Share of the active neurons that must be found on the recording
    #[arg(long, value_name = "SHARE", default_value_t = 0.96, value_parser = numbers::share)]
    recall: f64,
    /// Predict more than that as long as each neuron read brings this share of an active one's mean energy
    #[arg(long, value_name = "SHARE", default_value_t = 0.05, value_parser = numbers::part)]
    worth: f64,
    /// What is between the two matrices [default: what the names of the tensors imply]
    #[arg(long, value_enum)]
    between: Option<Between>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Between {
    None,
    Relu,
}

pub(crate) fn run(args: &ImportArgs) -> Result<ExitCode> {
    super::start_pool(None)?;
    let recording = recorded::open(&args.recording)?;
    let layers = recording.info().model.layers.len();
    let files = find_files(&args.dir, layers)?;
    let other = |dir: &PathBuf| recorded::open_other("--held-out", dir, &recording);
    let held_out = args.held_out.as_ref().map(other).transpose()?;
    let inputs = inputs([&args.dir, &args.recording].into_iter().chain(&args.held_out));
    let _taken = Directory::take(&args.output, DirectoryKind::Predictors, &inputs)?;
    let mut options = TrainOptions::new(layers);
    options.dtype = PredictorDType::from(args.dtype);
    (options.recall, options.worth) = (args.recall, args.worth);
    let data = TrainingData { validation: held_out.as_ref(), ..TrainingData::new(&recording) };
    let stage = Stage::new("choosing thresholds", "layers", layers as u64);
    let mut reports = Vec::new();
    for (layer, file) in files.iter().enumerate() {
        let predictor = read(file, args.between.map(|b| b == Between::Relu))?;
        let report = adopt_layer(data, &options, layer, predictor, &args.output);
        reports.push(report.with_context(|| file.display().to_string())?);
        stage.advance(1);
    }
    drop(stage);
    let report = write_report(&recording.info().id, reports, &args.output)?;
    let on = if held_out.is_some() { "the recording held out" } else { "held-out documents of the recording" };
    print_layers(&report, on);
    let alarms = report.layers.iter().filter(|l| l.judged().predicted_fraction > 0.9).count();
    if alarms > 0 {
        eprintln!(
            "note: {alarms} of {layers} layers predict more than 90 % of the neurons: these predictors expect an input other than the FFN's \
             own, or belong to another model; `flashlm-prep train` makes better ones"
        );
    }
    eprintln!("wrote {} and predictors.json to {}", super::counted(layers, "predictor"), args.output.display());
    Ok(ExitCode::SUCCESS)
}
