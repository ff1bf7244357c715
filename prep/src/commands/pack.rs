//! `flashlm-prep pack`: a bundle with predictors and storage orders.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::Args;
use flashlm::budget::human_bytes;
use flashlm_formats::bundle::{FlashLayout, LayerSparsity, LayoutOptions};
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::ids::NeuronId;
use flashlm_formats::orders::{GroupShape, StoredOrders};
use flashlm_formats::thresholds::ThresholdFile;
use flashlm_formats::weight_format::WeightFormat;
use flashlm_prep::pack::{PackOptions, Packed, pack};
use flashlm_prep::predictors::assemble;
use flashlm_prep::sparsity::layer_sparsity;

use super::formats::FormatArgs;
use super::recorded;
use super::rounding::CalibrateArgs;
use super::source::{self, CHECKPOINT_HELP};
use super::{Stage, inputs, reserve_bundle};

/// Arguments of `flashlm-prep pack`.
#[derive(Args)]
#[command(
    after_help = "Example:\n  flashlm-prep pack /models/opt-1.3b --predictors predictors --orders orders -o opt-1.3b.flashlm"
)]
pub(crate) struct PackArgs {
    #[arg(value_name = "CHECKPOINT", help = CHECKPOINT_HELP)]
    checkpoint: PathBuf,
    /// Directory that `train` wrote
    #[arg(long, value_name = "DIR")]
    predictors: PathBuf,
    /// Directory that `order` wrote; the checkpoint's order without it
    #[arg(long, value_name = "DIR")]
    orders: Option<PathBuf>,
    /// The recording, to note in the bundle how often neurons are reused: the runtime divides its memory by that
    #[arg(long, value_name = "DIR")]
    recording: Option<PathBuf>,
    /// What `thresholds` wrote, for models whose neurons are never exactly zero
    #[arg(long, value_name = "FILE")]
    thresholds: Option<PathBuf>,
    /// The bundle to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    formats: FormatArgs,
    #[command(flatten)]
    calibrate: CalibrateArgs,
    /// Replace an existing bundle
    #[arg(long)]
    force: bool,
}

/// Says so where orders were made for other groups than the bundle's: it will be right, and read more than it need.
fn compare_groups(made_for: Option<GroupShape>, bundle: &FlashLayout, format: WeightFormat) {
    let bundle = GroupShape::from(bundle);
    if let Some(made_for) = made_for.filter(|made_for| *made_for != bundle) {
        eprintln!(
            "note: the orders were made for {made_for}, the bundle has {bundle}: it will read more than it needs to; \
             `flashlm-prep order --dtype {format}` makes orders for it"
        );
    }
}

/// What a recording says of every layer.
fn sparsity(
    args: &PackArgs,
    dir: &Path,
    checkpoint: &Checkpoint,
    orders: Option<&StoredOrders>,
    layout: &FlashLayout,
) -> Result<Vec<LayerSparsity>> {
    let spec = checkpoint.spec();
    let recording = recorded::open(dir)?;
    let found = &recording.info().model;
    ensure!(
        (found.layers.len(), found.hidden_size, found.ffn().size)
            == (spec.layers.len(), spec.hidden_size, spec.ffn().size),
        "{} is a recording of another model",
        dir.display()
    );
    let stage = Stage::new("measuring reuse", "layers", spec.layers.len() as u64);
    let layers = (0..spec.layers.len()).map(|layer| {
        let order = orders.map(|orders| orders.layers[layer].as_slice());
        let sparsity = layer_sparsity(&recording, layer, &args.predictors, order, layout);
        stage.advance(1);
        sparsity
    });
    Ok(layers.collect::<Result<_, _>>()?)
}

pub(crate) fn run(args: &PackArgs) -> Result<ExitCode> {
    super::start_pool(None)?;
    let read = [Some(&args.checkpoint), Some(&args.predictors), args.orders.as_ref(), args.recording.as_ref()];
    let inputs = inputs(read.into_iter().chain([args.thresholds.as_ref()]).flatten().chain(&args.calibrate.calibrate));
    let reserved = reserve_bundle(&args.output, &inputs, args.force)?;
    let mut checkpoint = source::open(&args.checkpoint)?;
    if let Some(file) = &args.thresholds {
        ThresholdFile::apply(file, &mut checkpoint)?;
    }
    let spec = checkpoint.spec();
    let format = args.formats.dtype.unwrap_or(checkpoint.ffn_dtype().into());
    let layout = FlashLayout::new(spec, format, LayoutOptions::default())?;
    let orders = match &args.orders {
        Some(dir) => {
            let orders = StoredOrders::read(dir, spec)?;
            compare_groups(orders.groups, &layout, format);
            Some(orders)
        }
        None => None,
    };
    let identity = || vec![(0..spec.ffn().size as u32).map(NeuronId).collect(); spec.layers.len()];
    let predictors = assemble(
        &args.predictors,
        spec,
        orders.as_ref().map_or_else(identity, |orders| orders.layers.clone()).as_slice(),
    )?;
    let sparsity =
        args.recording.as_ref().map(|dir| sparsity(args, dir, &checkpoint, orders.as_ref(), &layout)).transpose()?;
    let tokenizer = super::tokenizer(&checkpoint)?;
    let rounded = args.calibrate.rounded(&checkpoint, &tokenizer, args.formats, &args.output)?;
    let options = PackOptions {
        sparsity,
        tokenizer,
        orders: orders.map(|orders| (orders.name, orders.layers)),
        predictors: Some(predictors),
        ffn: args.formats.dtype,
        resident: args.formats.resident(),
        rounded,
        overwrite: args.force,
        ..PackOptions::default()
    };
    let stage = Stage::bytes("packing");
    drop(reserved);
    let Packed { manifest, parts } =
        pack(&checkpoint, &args.output, options, &mut |done, total| stage.set(done, total))?;
    drop(stage);
    super::note_wide_kv(&manifest);
    let bytes = std::fs::metadata(&args.output)?.len();
    eprintln!("wrote {}: {}, neurons in {} order", args.output.display(), human_bytes(bytes), manifest.ffn.order);
    super::say_parts(&parts);
    Ok(ExitCode::SUCCESS)
}
