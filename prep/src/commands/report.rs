//! `flashlm-prep report`: one HTML page with what a recording, its predictors and its orders say.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use flashlm::disk_cost::profiled_cost;
use flashlm_formats::destination::{Destination, Directory, DirectoryKind, FileKind};
use flashlm_formats::predictors::TrainReport;
use flashlm_prep::gain::verdict;
use flashlm_prep::report::{Orders, Report, ReportInput, SAMPLE_TOKENS, measure_all};

use super::{Stage, inputs, numbers, recorded};

/// Arguments of `flashlm-prep report`.
#[derive(Args)]
#[command(
    after_help = "Example:\n  flashlm-prep report recording --predictors predictors --orders orders -o report.html"
)]
pub(crate) struct ReportArgs {
    /// Directory of the recording, made by `record` or `prepare --keep-recordings`
    #[arg(value_name = "RECORDING")]
    recording: PathBuf,
    /// The page
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Also write each chart as an SVG file and the numbers behind it as CSV into this directory, listed in its report.json
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Directory that `flashlm-prep train` wrote
    #[arg(long, value_name = "DIR")]
    predictors: Option<PathBuf>,
    /// Directory that `flashlm-prep order` wrote
    #[arg(long, value_name = "DIR")]
    orders: Option<PathBuf>,
    /// Disk profile made by `flashlm disk`
    #[arg(long, alias = "profile", value_name = "FILE")]
    disk: Option<PathBuf>,
    /// Tokens to use where a sample is enough
    #[arg(long, value_name = "N", default_value_t = SAMPLE_TOKENS, value_parser = numbers::tokens)]
    tokens: usize,
}

pub(crate) fn run(args: &ReportArgs) -> Result<ExitCode> {
    super::start_pool(None)?;
    let read = [Some(&args.recording), args.predictors.as_ref(), args.orders.as_ref(), args.disk.as_ref()];
    let read = inputs(read.into_iter().flatten());
    let data = args.data.as_deref().map(|dir| Directory::take(dir, DirectoryKind::ReportData, &read)).transpose()?;
    let output = Destination::take(&args.output, FileKind::Report, &read)?;
    let recording = recorded::open(&args.recording)?;
    let predictors = args.predictors.as_deref().map(TrainReport::read).transpose();
    let predictors = predictors.context("--predictors: a directory made by `flashlm-prep train`")?;
    let orders = args.orders.as_deref().map(Orders::read).transpose();
    let orders = orders.context("--orders: a directory made by `flashlm-prep order`")?;
    let disk = match &args.disk {
        Some(path) => {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            Some((profiled_cost(path)?, format!("the disk profile {name}")))
        }
        None => None,
    };
    let layers = (0..recording.info().model.layers.len()).filter(|&l| recording.has_layer(l)).count();
    let stage = Stage::new("report", "layers", layers as u64);
    let input = ReportInput {
        info: recording.info(),
        verdict,
        predictors: predictors.as_ref(),
        orders: orders.as_ref().map(Orders::summary),
        disk: disk.as_ref().map(|(cost, name)| (*cost, name.as_str())),
        made: None,
    };
    let layers = measure_all(&recording, orders.as_ref(), &input, args.tokens, &|| stage.advance(1))?;
    let report = Report::new(&input, &layers)?;
    drop(stage);
    if let Some(dir) = &data {
        report.write_data(dir.path())?;
        eprintln!("wrote charts and their numbers to {}", dir.path().display());
    }
    output.publish_bytes(report.page().as_bytes())?;
    eprintln!("wrote {}", args.output.display());
    Ok(ExitCode::SUCCESS)
}
