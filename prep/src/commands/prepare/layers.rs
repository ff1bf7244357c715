//! Layer by layer: record, train and order, and delete the recording.
//!
//! Ranks come first, as all layers share one budget: from a pilot, a recording of the text's begin, and short trials on it.

use std::path::{Path, PathBuf};

use anyhow::Result;
use flashlm_formats::bundle::{FlashLayout, LayerSparsity};
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::recording::Recording;
use flashlm_formats::weight_format::WeightFormat;
use flashlm_prep::ordering::OrderFile;
use flashlm_prep::record::{Calibration, Recorder};
use flashlm_prep::train::{
    LayerReport, Progress, RankChoice, RankCurve, TrainOptions, choose_ranks, train_layer, write_report,
};

use super::super::Stage;
use super::super::order::{LayerScores, OrderArgs, Ordering};
use super::super::pack::layer_sparsity;
use super::super::recorded::{Division, HELD_OUT};
use super::work::{Work, publish_json, read_json};
use super::{PrepareArgs, pilot_tokens};

/// What the layers are prepared from and with.
pub(super) struct Layers<'a> {
    pub(super) args: &'a PrepareArgs,
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) calibration: &'a Calibration,
    /// How neurons will be stored, and where.
    pub(super) ffn: WeightFormat,
    pub(super) layout: &'a FlashLayout,
    pub(super) work: &'a Work,
}

/// The stages' directories: what is done stands in them.
pub(super) struct Stages {
    /// How many neurons are active and how often they come again, with these predictors and orders.
    pub(super) sparsity: PathBuf,
    pub(super) predictors: PathBuf,
    pub(super) orders: PathBuf,
}

fn numbered(dir: &Path, name: &str, layer: usize) -> PathBuf {
    dir.join(format!("{name}-{layer:03}.json"))
}

impl Stages {
    // These files are written behind all others of their layer: where they are, the layer is done.
    fn measured(&self, layer: usize) -> PathBuf {
        numbered(&self.sparsity, "sparsity", layer)
    }

    fn trained(&self, layer: usize) -> PathBuf {
        numbered(&self.predictors, "report", layer)
    }

    fn ordered(&self, layer: usize) -> PathBuf {
        numbered(&self.orders, "scores", layer)
    }

    fn is_done(&self, layer: usize) -> bool {
        self.measured(layer).exists() && self.trained(layer).exists() && self.ordered(layer).exists()
    }
}

impl Layers<'_> {
    /// Does what is missing in `stages`. Gives what was measured of every layer's activity.
    pub(super) fn run(&self, stages: &Stages) -> Result<Vec<LayerSparsity>> {
        let layers = self.checkpoint.spec().layers;
        let summaries = [stages.predictors.join("predictors.json"), stages.orders.join("orders.json")];
        if (0..layers).any(|layer| !stages.is_done(layer)) || summaries.iter().any(|file| !file.exists()) {
            self.missing(stages)?;
        }
        Ok((0..layers).filter_map(|layer| read_json(&stages.measured(layer))).collect())
    }

    fn missing(&self, stages: &Stages) -> Result<()> {
        let layers = self.checkpoint.spec().layers;
        let mut options = self.train_options();
        let ranks = match (0..layers).any(|layer| !stages.trained(layer).exists()) {
            true => self.ranks(&options, &stages.predictors)?,
            false => Vec::new(),
        };
        options.rank = RankChoice::Each(ranks.clone());

        // A look-ahead is trained on this layer's inputs and the next one's activity: one layer later.
        let behind = usize::from(options.look_ahead.is_some());
        let unfinished: Vec<bool> = (0..layers).map(|layer| !stages.is_done(layer)).collect();
        let needed = |layer: usize| unfinished[layer - behind.min(layer)..=layer].contains(&true);
        let dir = self.work.path("recording");
        let mut recorder = self.recorder(self.calibration, &dir)?;
        let mut first = recorder.resume_layer();
        if (0..layers).all(|layer| !needed(layer) || recorder.recording().has_layer(layer)) {
            first = layers;
        } else if (0..first).any(|layer| needed(layer) && !recorder.recording().has_layer(layer)) {
            // Deleted after another training: from the begin.
            drop(recorder);
            self.work.clear("recording")?;
            recorder = self.recorder(self.calibration, &dir)?;
            first = 0;
        }

        let order_args = OrderArgs::best_of(dir.clone(), stages.orders.clone(), self.ffn, self.args.seed);
        let ordering = Ordering::new(&order_args, recorder.recording(), None)?;
        let tokens = self.calibration.tokens.len() as u64;
        // Half of a layer's bar is recording.
        let stage = Stage::new("preparing", "tokens x layers x 2", 2 * tokens * layers as u64);
        for step in 0..layers + behind {
            if step < layers && step >= first && (step..layers).any(needed) {
                let keep = needed(step) || self.args.keep_recordings;
                let before = 2 * tokens * step as u64;
                recorder.record(step, keep, &mut |done| stage.set(before + done as u64, 2 * tokens * layers as u64))?;
            }
            let Some(layer) = step.checked_sub(behind) else { continue };
            let recording = recorder.recording();
            if unfinished[layer] {
                self.layer(recording, stages, &options, &ranks, (&order_args, &ordering), layer, &stage)?;
            }
            if !self.args.keep_recordings && recording.has_layer(layer) {
                recording.remove_layer(layer)?;
            }
            stage.set(2 * tokens * (layer as u64 + 1), 2 * tokens * layers as u64);
        }

        let recording = recorder.finish()?;
        let reports: Vec<LayerReport> = (0..layers).filter_map(|layer| read_json(&stages.trained(layer))).collect();
        let scores: Vec<LayerScores> = (0..layers).filter_map(|layer| read_json(&stages.ordered(layer))).collect();
        let mean = |value: &dyn Fn(&LayerReport) -> f64| reports.iter().map(value).sum::<f64>() / layers as f64;
        stage.say(&format!(
            "predictors: {:.2} % missed, {:.2} % false alarms (mean over layers, held-out documents); {:.2} % of the FFN's bytes",
            100.0 * mean(&|r| r.held_out.false_negative_rate),
            100.0 * mean(&|r| r.held_out.false_positive_rate),
            100.0 * mean(&|r| r.bytes as f64 / r.ffn_bytes as f64),
        ));
        ordering.finish(&order_args, &recording, scores)?;
        write_report(&recording.info().id, reports, &stages.predictors)?;
        Ok(())
    }

    /// Everything about one recorded layer. Training and ordering side by side: much of ordering cannot be divided.
    #[expect(clippy::too_many_arguments, reason = "one call; the stages share little")]
    fn layer(
        &self,
        recording: &Recording,
        stages: &Stages,
        options: &TrainOptions,
        ranks: &[usize],
        (order_args, ordering): (&OrderArgs, &Ordering),
        layer: usize,
        stage: &Stage,
    ) -> Result<()> {
        let active = recording.layer(layer)?.active_fraction();
        let train = || -> Result<()> {
            if !stages.trained(layer).exists() {
                let report = train_layer(recording, None, options, layer, ranks, &stages.predictors)?;
                publish_json(&stages.trained(layer), &report)?;
                stage.say(&format!(
                    "layer {layer:>3}: {:5.2} % active; rank {}, {:.2} % missed, {:.2} % false alarms",
                    100.0 * active,
                    report.rank,
                    100.0 * report.held_out.false_negative_rate,
                    100.0 * report.held_out.false_positive_rate,
                ));
            }
            Ok(())
        };
        let order = || -> Result<()> {
            if !stages.ordered(layer).exists() {
                publish_json(&stages.ordered(layer), &ordering.layer(order_args, recording, layer, None)?)?;
            }
            Ok(())
        };
        let (trained, ordered) = rayon::join(train, order);
        trained.and(ordered)?;
        let neurons = self.checkpoint.spec().ffn.size;
        let order = OrderFile::read(&stages.orders, layer, neurons)?.order;
        let division = Division::by_document(recording.documents(), HELD_OUT, self.args.seed);
        let sparsity = layer_sparsity(recording, &division, layer, &stages.predictors, Some(&order), self.layout)?;
        publish_json(&stages.measured(layer), &sparsity)
    }

    /// The rank of every layer, from a pilot; kept in `dir`.
    fn ranks(&self, options: &TrainOptions, dir: &Path) -> Result<Vec<usize>> {
        let file = dir.join("ranks.json");
        if let Some(ranks) = read_json(&file) {
            return Ok(ranks);
        }
        let layers = self.checkpoint.spec().layers;
        let pilot = self.calibration.head(pilot_tokens(self.calibration.tokens.len()));
        let tokens = pilot.tokens.len() as u64;
        let mut recorder = self.recorder(&pilot, &self.work.path("pilot"))?;
        let stage = Stage::new("choosing ranks", "tokens x layers x 2", 2 * tokens * layers as u64);
        if (0..layers).any(|layer| !recorder.recording().has_layer(layer)) {
            for layer in recorder.resume_layer()..layers {
                recorder.record(layer, true, &mut |done| {
                    stage.set(tokens * layer as u64 + done as u64, 2 * tokens * layers as u64);
                })?;
            }
        }
        let recording = recorder.finish()?;
        let (ranks, _) = choose_ranks(&recording, options, &Trials { stage, tokens })?;
        publish_json(&file, &ranks)?;
        self.work.clear("pilot")?;
        Ok(ranks)
    }

    /// A recorder of these inputs; a recording of others is removed.
    fn recorder(&self, calibration: &Calibration, dir: &Path) -> Result<Recorder<'_>> {
        let id = calibration.id(self.checkpoint);
        if dir.exists() && !Recording::open(dir).is_ok_and(|found| found.info().id == id) {
            std::fs::remove_dir_all(dir)?;
        }
        Ok(Recorder::open(self.checkpoint, calibration, dir, super::super::threads(self.args.threads)?)?)
    }

    fn train_options(&self) -> TrainOptions {
        let mut options = TrainOptions::new(self.checkpoint.spec().layers);
        options.size_budget = self.args.size_budget(self.checkpoint.spec());
        options.recall = self.args.recall;
        options.look_ahead = self.args.look_ahead.map(|rank| rank.get());
        options.compare_look_ahead = false;
        options.weight_bytes = self.checkpoint.ffn_dtype().bytes();
        options.fit = options.fit.seed(self.args.seed);
        options
    }
}

struct Trials {
    stage: Stage,
    tokens: u64,
}

impl Progress for Trials {
    fn tried(&self, _layer: usize, _curve: &RankCurve) {
        self.stage.advance(self.tokens);
    }

    fn trained(&self, _report: &LayerReport) {}
}
