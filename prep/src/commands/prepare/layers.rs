//! Layer by layer: record, train and order, and delete the recording.
//!
//! Ranks come first, as all layers share one budget: from a pilot, a recording of the text's begin, and short trials on it.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use flashlm_formats::bundle::{FlashLayout, LayerSparsity};
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::recording::HELD_OUT;
use flashlm_formats::recording::Recording;
use flashlm_formats::weight_format::WeightFormat;
use flashlm_prep::gain;
use flashlm_prep::ordering::{LayerScores, ORDERS_JSON, OrderFile, OrderOptions, Ordering};
use flashlm_prep::predictors::predictor_path;
use flashlm_prep::record::{Calibration, Recorder};
use flashlm_prep::sparsity::layer_sparsity;
use flashlm_prep::train::{
    LayerReport, Progress, RankChoice, RankCurve, TrainOptions, choose_ranks, train_layer, write_report,
};
use flashlm_runtime::cache::PolicyKind;
use serde::de::IgnoredAny;

use super::super::Stage;
use super::estimate::Left;
use super::stamp::Stamp;
use super::work::{self, Work, publish_sealed, read_sealed};
use super::{PrepareArgs, pilot_tokens};

/// What the layers are prepared from and with.
pub(super) struct Layers<'a> {
    pub(super) args: &'a PrepareArgs,
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) calibration: &'a Calibration,
    /// What the recording is made from.
    pub(super) recorded: &'a Stamp,
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
    // These files are written behind all others of their layer, and speak for them.
    fn measured(&self, layer: usize) -> PathBuf {
        numbered(&self.sparsity, "sparsity", layer)
    }

    fn ranks(&self) -> PathBuf {
        self.predictors.join("ranks.json")
    }

    fn trained(&self, layer: usize) -> PathBuf {
        numbered(&self.predictors, "report", layer)
    }

    fn ordered(&self, layer: usize) -> PathBuf {
        numbered(&self.orders, "scores", layer)
    }

    /// What is there, and as it was written.
    fn look(&self, layers: usize) -> Vec<Done> {
        let is_there = |path: PathBuf| read_sealed::<IgnoredAny>(&path).is_some();
        let look = |layer| Done {
            measured: is_there(self.measured(layer)),
            trained: is_there(self.trained(layer)),
            ordered: is_there(self.ordered(layer)),
        };
        (0..layers).map(look).collect()
    }
}

/// What is done of a layer.
#[derive(Clone, Copy)]
struct Done {
    measured: bool,
    trained: bool,
    ordered: bool,
}

impl Done {
    fn all(self) -> bool {
        self.measured && self.trained && self.ordered
    }
}

impl Layers<'_> {
    /// Does what is missing in `stages`. Gives what was measured of every layer's activity.
    pub(super) fn run(&self, stages: &Stages) -> Result<Vec<LayerSparsity>> {
        let layers = self.checkpoint.spec().layers;
        let done = stages.look(layers);
        let summaries = [&stages.predictors, &stages.orders].map(|dir| work::is_whole(dir));
        if !done.iter().all(|layer| layer.all()) || summaries.contains(&false) {
            self.missing(stages, &done)?;
        }
        Ok((0..layers).filter_map(|layer| read_sealed(&stages.measured(layer))).collect())
    }

    /// What is left to do, with a bundle at the output whose predictors alone are to be replaced, or not.
    pub(super) fn left(&self, stages: &Stages, replaced: bool) -> Left {
        let done = stages.look(self.checkpoint.spec().layers);
        Left {
            tokens: self.calibration.tokens.len(),
            ranks: done.iter().any(|layer| !layer.trained) && read_sealed::<Vec<usize>>(&stages.ranks()).is_none(),
            layers: done.iter().filter(|layer| !layer.all()).count(),
            replaced,
            ..Left::default()
        }
    }

    fn missing(&self, stages: &Stages, done: &[Done]) -> Result<()> {
        let layers = self.checkpoint.spec().layers;
        let mut options = self.train_options();
        let ranks = match done.iter().any(|layer| !layer.trained) {
            true => self.ranks(&options, &stages.ranks())?,
            false => Vec::new(),
        };
        options.rank = RankChoice::Each(ranks.clone());

        // A look-ahead is trained on this layer's inputs and the next one's activity: one layer later.
        let behind = usize::from(options.look_ahead.is_some());
        let unfinished: Vec<bool> = done.iter().map(|layer| !layer.all()).collect();
        let needed = |layer: usize| unfinished[layer - behind.min(layer)..=layer].contains(&true);
        let mut recorder = self.recorder(self.calibration, "recording")?;
        let mut first = recorder.resume_layer();
        if (0..layers).all(|layer| !needed(layer) || recorder.recording().has_layer(layer)) {
            first = layers;
        } else if (0..first).any(|layer| needed(layer) && !recorder.recording().has_layer(layer)) {
            // Deleted after another training: from the begin.
            drop(recorder);
            self.work.clear("recording")?;
            recorder = self.recorder(self.calibration, "recording")?;
            first = 0;
        }

        let cache = self.args.cache_share(self.checkpoint.spec(), self.ffn);
        let options_of_orders = OrderOptions { cache: Some(cache), ..OrderOptions::new(self.ffn) };
        let ordering = Ordering::new(options_of_orders, recorder.recording(), None, &stages.orders)?;
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
                let done = done[layer];
                self.layer(recording, stages, done, &options, &ranks, &ordering, layer, &stage)?;
            }
            if !self.args.keep_recordings && recording.has_layer(layer) {
                recording.remove_layer(layer)?;
            }
            stage.set(2 * tokens * (layer as u64 + 1), 2 * tokens * layers as u64);
        }

        let recording = recorder.finish()?;
        let reports: Vec<LayerReport> = (0..layers).filter_map(|layer| read_sealed(&stages.trained(layer))).collect();
        let scores: Vec<LayerScores> = (0..layers).filter_map(|layer| read_sealed(&stages.ordered(layer))).collect();
        let mean = |value: &dyn Fn(&LayerReport) -> f64| reports.iter().map(value).sum::<f64>() / layers as f64;
        stage.say(&format!(
            "predictors: {:.2} % missed, {:.2} % false alarms (mean over layers, held-out documents); {:.2} % of the FFN's bytes",
            100.0 * mean(&|r| r.held_out.false_negative_rate),
            100.0 * mean(&|r| r.held_out.false_positive_rate),
            100.0 * mean(&|r| r.bytes as f64 / r.ffn_bytes as f64),
        ));
        stage.say(&format!(
            "orders: judged by what {} misses with {:.0} % of a layer cached, about what --memory 50% leaves (held-out documents)",
            PolicyKind::DEFAULT,
            100.0 * cache
        ));
        ordering.finish(&recording, scores)?;
        write_report(&recording.info().id, reports, &stages.predictors)?;
        work::seal_whole(&stages.orders, &[stages.orders.join(ORDERS_JSON)])?;
        work::seal_whole(&stages.predictors, &[stages.predictors.join("predictors.json")])
    }

    /// Everything about one recorded layer. Training and ordering side by side: much of ordering cannot be divided.
    #[expect(clippy::too_many_arguments, reason = "one call; the stages share little")]
    fn layer(
        &self,
        recording: &Recording,
        stages: &Stages,
        done: Done,
        options: &TrainOptions,
        ranks: &[usize],
        ordering: &Ordering,
        layer: usize,
        stage: &Stage,
    ) -> Result<()> {
        let active = recording.layer(layer)?.active_fraction();
        let train = || -> Result<()> {
            if !done.trained {
                let report = train_layer(recording, None, options, layer, ranks, &stages.predictors)?;
                publish_sealed(&stages.trained(layer), &report, &[predictor_path(&stages.predictors, layer)])?;
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
            if !done.ordered {
                let scores = ordering.layer(recording, layer, &|| ())?;
                publish_sealed(&stages.ordered(layer), &scores, &[OrderFile::path(&stages.orders, layer)])?;
            }
            Ok(())
        };
        let (trained, ordered) = rayon::join(train, order);
        trained.and(ordered)?;
        let neurons = self.checkpoint.spec().ffn.size;
        let order = OrderFile::read(&stages.orders, layer, neurons)?.order;
        let sparsity = layer_sparsity(recording, layer, &stages.predictors, Some(&order), self.layout)?;
        publish_sealed(&stages.measured(layer), &sparsity, &[])
    }

    /// The rank of every layer, from a pilot; kept in `file`.
    fn ranks(&self, options: &TrainOptions, file: &Path) -> Result<Vec<usize>> {
        if let Some(ranks) = read_sealed(file) {
            return Ok(ranks);
        }
        let layers = self.checkpoint.spec().layers;
        let pilot = self.calibration.sample(pilot_tokens(self.calibration.tokens.len()), HELD_OUT);
        let tokens = pilot.tokens.len() as u64;
        let mut recorder = self.recorder(&pilot, "pilot")?;
        let stage = Stage::new("choosing ranks", "tokens x layers x 2", 2 * tokens * layers as u64);
        if (0..layers).any(|layer| !recorder.recording().has_layer(layer)) {
            // Without the states that enter it a layer cannot be recorded alone.
            let first = match recorder.resume_layer() {
                first if (0..first).all(|layer| recorder.recording().has_layer(layer)) => first,
                _ => 0,
            };
            for layer in first..layers {
                recorder.record(layer, true, &mut |done| {
                    stage.set(tokens * layer as u64 + done as u64, 2 * tokens * layers as u64);
                })?;
            }
        }
        let recording = recorder.finish()?;
        let (ranks, trials) = choose_ranks(&recording, options, &Trials { stage, tokens })?;
        let admitted =
            trials.iter().zip(&ranks).filter_map(|(trial, &rank)| trial.admitted_at(rank)).sum::<f64>() / layers as f64;
        eprintln!("ranks are chosen; the predictors tried admit {:.1} % of the neurons", 100.0 * admitted);
        ensure!(
            admitted <= gain::POINTLESS || self.args.anyway,
            "{}; nothing more was done (--anyway goes on)",
            gain::pointless(admitted, &self.args.checkpoint, &self.args.output)
        );
        publish_sealed(file, &ranks, &[])?;
        self.work.clear("pilot")?;
        Ok(ranks)
    }

    /// A recorder of these inputs; what is there of others, or not as it was written, is removed.
    fn recorder(&self, calibration: &Calibration, name: &str) -> Result<Recorder<'_>> {
        let made_from = self.recorded.and(&calibration.id(self.checkpoint));
        let mut dir = self.work.stage(name, &made_from)?;
        if dir.join("recording.json").exists()
            && let Err(error) = Recording::open(&dir)
        {
            eprintln!("note: {error}: recording begins anew");
            self.work.clear(name)?;
            dir = self.work.stage(name, &made_from)?;
        }
        let recorder = Recorder::open(self.checkpoint, calibration, &dir, super::super::threads(self.args.threads)?)?;
        for path in recorder.drop_damaged()? {
            eprintln!("note: {} is not as it was written: it is made anew", path.display());
        }
        Ok(recorder)
    }

    fn train_options(&self) -> TrainOptions {
        let mut options = TrainOptions::new(self.checkpoint.spec().layers);
        options.size_budget = self.args.size_budget(self.checkpoint.spec());
        options.recall = self.args.recall;
        options.look_ahead = self.args.look_ahead;
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
