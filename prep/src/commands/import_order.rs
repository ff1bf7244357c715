//! `flashlm-prep import-order`: storage orders that another program made.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use flashlm_prep::foreign_orders;
use flashlm_prep::ordering::{OrderError, OrderOptions};
use rayon::prelude::*;

use super::order::JudgeArgs;
use super::{Stage, recorded};

/// Arguments of `flashlm-prep import-order`.
#[derive(Args, Debug)]
#[command(after_help = "Example, in Python, and what makes a bundle of it:\n  \
    numpy.save(\"mine/layer-000.npy\", order)    # order[position] = neuron, every neuron once; one file for each layer\n  \
    flashlm-prep import-order mine --recording recording -o orders\n  \
    flashlm-prep pack CHECKPOINT --predictors predictors --orders orders -o model.flashlm\n\n\
    An array of the positions of neurons is turned into an order by numpy.argsort. Files that `order` wrote are taken, too.")]
pub(crate) struct ImportOrderArgs {
    /// Directory with one file for each layer
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Directory that `record` wrote, of the model that the orders are for: they are judged on what it holds out
    #[arg(long, value_name = "RECORDING")]
    recording: PathBuf,
    #[command(flatten)]
    judge: JudgeArgs,
}

pub(crate) fn run(args: &ImportOrderArgs) -> Result<()> {
    super::start_pool(None)?;
    let recording = recorded::open(&args.recording)?;
    let model = &recording.info().model;
    let orders = foreign_orders::read(&args.dir, model.layers.len(), model.ffn().size)?;
    let made_elsewhere = |options| OrderOptions { tokens: 0, ..options };
    let (_taken, ordering) = args.judge.begin(&recording, &[&args.dir, &args.recording], made_elsewhere)?;
    let stage = Stage::new("judging", "layers", orders.len() as u64);
    let scores = orders.into_par_iter().enumerate().map(|(layer, order)| {
        let scores = ordering.import(&recording, layer, order);
        stage.advance(1);
        scores
    });
    let scores: Vec<Result<_, OrderError>> = scores.collect();
    drop(stage);
    args.judge.show(&ordering.finish(&recording, scores.into_iter().collect::<Result<_, _>>()?)?)
}
