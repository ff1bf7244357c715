//! Layer by layer: record, train and order, and delete the recording.
//!
//! Ranks come first, as all layers share one budget: from a pilot, a recording of the text's start, and short trials on it.

use std::cell::Cell;
use std::path::{Path, PathBuf};

use flashlm_formats::bundle::{FlashLayout, LayerSparsity};
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::destination::Destination;
use flashlm_formats::orders::{LayerScores, ORDERS_JSON, OrderFile};
use flashlm_formats::predictors::{
    LayerReport, PREDICTORS_JSON, PredictorForm, RankCurve, TrainReport, predictor_path,
};
use flashlm_formats::recording::{HELD_OUT, Recording, RecordingInfo};
use flashlm_formats::weight_format::WeightFormat;
use serde::de::IgnoredAny;

use super::error::PrepareError;
use super::estimate::Left;
use super::event::{Event, Running, Task};
use super::graph::StageKind;
use super::options::{PrepareOptions, pilot_tokens};
use super::stamp::Stamp;
use super::work::{self, Work, publish_sealed};
use crate::gain;
use crate::ordering::{OrderOptions, Ordering};
use crate::record::{Calibration, Recorder};
use crate::report::{self, LayerMeasures, Made, Orders, Report, ReportInput, Storage};
use crate::sparsity::layer_sparsity;
use crate::threads;
use crate::train::{Progress, RankChoice, TrainOptions, TrainingData, choose_ranks, train_layer, write_report};

type Result<T> = std::result::Result<T, PrepareError>;

/// What the layers are prepared from and with.
pub(super) struct Layers<'a> {
    pub(super) options: &'a PrepareOptions,
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) calibration: &'a Calibration,
    /// What the recording is made from.
    pub(super) recorded: &'a Stamp,
    /// How neurons will be stored, and where.
    pub(super) ffn: WeightFormat,
    pub(super) layout: &'a FlashLayout,
    pub(super) work: &'a Work<'a>,
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
    // These files are written after all others of their layer, and speak for them.
    fn measured(&self, layer: usize) -> PathBuf {
        numbered(&self.sparsity, "sparsity", layer)
    }

    /// What the report shows of a layer.
    fn shown(&self, layer: usize) -> PathBuf {
        numbered(&self.sparsity, "shown", layer)
    }

    /// What was recorded, for when the recording is gone.
    fn recorded(&self) -> PathBuf {
        self.sparsity.join("recorded.json")
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
    fn look(&self, work: &Work<'_>, layers: usize) -> Vec<Done> {
        let is_there = |path: PathBuf| work.read_sealed::<IgnoredAny>(&path).is_some();
        let look = |layer| Done {
            measured: is_there(self.measured(layer)) && is_there(self.shown(layer)),
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
        let layers = self.checkpoint.spec().layers.len();
        let done = stages.look(self.work, layers);
        let summaries = [&stages.predictors, &stages.orders].map(|dir| self.work.is_whole(dir));
        if !done.iter().all(|layer| layer.all()) || summaries.contains(&false) {
            self.missing(stages, &done)?;
        }
        Ok((0..layers).filter_map(|layer| self.work.read_sealed(&stages.measured(layer))).collect())
    }

    /// Writes the report about layers that are done; not where an older version of the program prepared them.
    pub(super) fn write_report(
        &self,
        stages: &Stages,
        made: &Made,
        destination: Destination,
    ) -> Result<Option<PathBuf>> {
        let layers = self.checkpoint.spec().layers.len();
        let shown = (0..layers).filter_map(|layer| self.work.read_sealed(&stages.shown(layer)));
        let shown: Vec<LayerMeasures> = shown.collect();
        let Some(info) = self.work.read_sealed::<RecordingInfo>(&stages.recorded()) else { return Ok(None) };
        let (predictors, orders) = (TrainReport::read(&stages.predictors)?, Orders::read(&stages.orders)?);
        let input = ReportInput {
            info: &info,
            verdict: gain::verdict,
            predictors: Some(&predictors),
            orders: Some(orders.summary()),
            disk: None,
            made: Some(made),
        };
        destination.publish_bytes(Report::new(&input, &shown)?.page().as_bytes())?;
        Ok(Some(self.options.report_path()))
    }

    /// What is left to do, with a bundle at the output whose predictors alone are to be replaced, or not.
    pub(super) fn left(&self, stages: &Stages, replaced: bool) -> Left {
        let done = stages.look(self.work, self.checkpoint.spec().layers.len());
        Left {
            tokens: self.calibration.tokens.len(),
            ranks: done.iter().any(|layer| !layer.trained)
                && self.work.read_sealed::<Vec<PredictorForm>>(&stages.ranks()).is_none(),
            layers: done.iter().filter(|layer| !layer.all()).count(),
            replaced,
            ..Left::default()
        }
    }

    fn missing(&self, stages: &Stages, done: &[Done]) -> Result<()> {
        let layers = self.checkpoint.spec().layers.len();
        let mut options = self.train_options();
        let ranks = match done.iter().any(|layer| !layer.trained) {
            true => self.ranks(&options, &stages.ranks())?,
            false => Vec::new(),
        };
        options.rank = RankChoice::Each(ranks.clone());
        // A look-ahead is trained on this layer's inputs and the next one's activity: one layer later.
        let behind = usize::from(options.look_ahead.is_some());
        let unfinished: Vec<bool> = done.iter().map(|layer| !layer.all()).collect();
        let needed: Vec<bool> =
            (0..layers).map(|layer| unfinished[layer - behind.min(layer)..=layer].contains(&true)).collect();
        let (mut recorder, first) = self.resumed(&needed)?;

        let tokens = self.calibration.tokens.len() as u64;
        let task = Running::begin(self.work.observer, Task::PreparingLayers { layers: layers as u64, tokens });
        let (spec, run) = (self.checkpoint.spec(), self.options.run(self.ffn));
        let cached = run.cache_share(spec);
        let order_options = OrderOptions { cache: Some(cached), cost: run.cost, ..OrderOptions::new(self.ffn) };
        let ordering = Ordering::new(order_options, recorder.recording(), None, &stages.orders)?;
        let each =
            EachLayer { layers: self, stages, options: &options, ranks: &ranks, ordering: &ordering, task: &task };
        // Half of a layer's progress is recording.
        let total = 2 * tokens * layers as u64;
        for step in 0..layers + behind {
            if step < layers && step >= first && needed[step..].contains(&true) {
                let keep = needed[step] || self.options.keep_recordings;
                let before = 2 * tokens * step as u64;
                recorder.record(step, keep, &mut |done| task.at(before + done as u64, total))?;
            }
            let Some(layer) = step.checked_sub(behind) else { continue };
            let recording = recorder.recording();
            if unfinished[layer] {
                each.prepare(recording, layer, done[layer])?;
            }
            if !self.options.keep_recordings && recording.has_layer(layer) {
                recording.remove_layer(layer)?;
            }
            task.at(2 * tokens * (layer as u64 + 1), total);
        }
        self.summarise(stages, &ordering, &recorder.finish()?, cached, &task)
    }

    /// A recorder that continues with what is there, and the layer that it resumes from, where these layers are needed.
    fn resumed(&self, needed: &[bool]) -> Result<(Recorder<'_>, usize)> {
        let recorder = self.recorder(self.calibration, StageKind::Recording)?;
        let first = recorder.resume_layer();
        let is_missing = |layer: usize| needed[layer] && !recorder.recording().has_layer(layer);
        if !(0..needed.len()).any(is_missing) {
            return Ok((recorder, needed.len()));
        }
        if !(0..first).any(is_missing) {
            return Ok((recorder, first));
        }
        // Deleted after another training: from the start.
        drop(recorder);
        self.work.clear(StageKind::Recording.directory())?;
        Ok((self.recorder(self.calibration, StageKind::Recording)?, 0))
    }

    /// Writes what is known of all layers, and says that the stages are whole.
    fn summarise(
        &self,
        stages: &Stages,
        ordering: &Ordering,
        recording: &Recording,
        cached: f64,
        task: &Running<'_>,
    ) -> Result<()> {
        let layers = self.checkpoint.spec().layers.len();
        let reports = (0..layers).filter_map(|layer| self.work.read_sealed(&stages.trained(layer)));
        let reports: Vec<LayerReport> = reports.collect();
        let scores = (0..layers).filter_map(|layer| self.work.read_sealed(&stages.ordered(layer)));
        let scores: Vec<LayerScores> = scores.collect();
        let mean = |value: &dyn Fn(&LayerReport) -> f64| reports.iter().map(value).sum::<f64>() / layers as f64;
        task.tell(Event::Layers {
            missed: mean(&|r| r.held_out.false_negative_rate),
            false_alarms: mean(&|r| r.held_out.false_positive_rate),
            size: mean(&|r| r.bytes as f64 / r.ffn_bytes as f64),
            without_row: reports.iter().map(|r| r.rows.map_or(0, |rows| r.neurons.saturating_sub(rows))).sum(),
            cached,
        });
        ordering.finish(recording, scores)?;
        publish_sealed(&stages.recorded(), recording.info(), &[])?;
        write_report(&recording.info().id, reports, &stages.predictors)?;
        work::seal_whole(&stages.orders, &[stages.orders.join(ORDERS_JSON)])?;
        work::seal_whole(&stages.predictors, &[stages.predictors.join(PREDICTORS_JSON)])
    }

    /// The rank of every layer, from a pilot; kept in `file`.
    fn ranks(&self, options: &TrainOptions, file: &Path) -> Result<Vec<PredictorForm>> {
        if let Some(ranks) = self.work.read_sealed(file) {
            return Ok(ranks);
        }
        let layers = self.checkpoint.spec().layers.len();
        let pilot = self.calibration.sample(pilot_tokens(self.calibration.tokens.len()), HELD_OUT);
        let tokens = pilot.tokens.len() as u64;
        let recorder = self.recorder(&pilot, StageKind::Pilot)?;
        let task = Running::begin(self.work.observer, Task::ChoosingRanks);
        let total = 2 * tokens * layers as u64;
        let recording = recorder.record_all(&mut |layer, done| task.at(tokens * layer as u64 + done as u64, total))?;
        let progress = Trials { task, tokens, total, done: Cell::new(tokens * layers as u64) };
        let (ranks, trials) = choose_ranks(self.training(&recording), options, &progress)?;
        drop(progress);
        let admitted = trials.iter().zip(&ranks).filter_map(|(trial, &rank)| trial.admitted_at(rank));
        let admitted = admitted.sum::<f64>() / layers as f64;
        (self.work.observer)(Event::Ranks { admitted });
        if admitted > gain::POINTLESS && !self.options.anyway {
            let (checkpoint, output) = (self.options.checkpoint.clone(), self.options.output.clone());
            return Err(PrepareError::Pointless { checkpoint, output, admitted });
        }
        publish_sealed(file, &ranks, &[])?;
        self.work.clear(StageKind::Pilot.directory())?;
        Ok(ranks)
    }

    /// A recorder of these inputs; what is there of others, or not as it was written, is removed.
    fn recorder(&self, calibration: &Calibration, kind: StageKind) -> Result<Recorder<'_>> {
        let note = |note: String| (self.work.observer)(Event::Note(&note));
        let made_from = self.recorded.and(&calibration.id(self.checkpoint));
        let mut dir = self.work.stage(kind, &made_from)?;
        if dir.join("recording.json").exists()
            && let Err(error) = Recording::open(&dir)
        {
            note(format!("{error}: recording starts again"));
            self.work.clear(kind.directory())?;
            dir = self.work.stage(kind, &made_from)?;
        }
        let recorder = Recorder::open(self.checkpoint, calibration, &dir, threads::start(self.options.threads)?)?;
        for path in recorder.drop_damaged()? {
            note(format!("{} is not as it was written: it is made again", path.display()));
        }
        Ok(recorder)
    }

    fn training<'s>(&'s self, recording: &'s Recording) -> TrainingData<'s> {
        TrainingData { recording, validation: None, checkpoint: Some(self.checkpoint) }
    }

    fn train_options(&self) -> TrainOptions {
        let mut options = TrainOptions::new(self.checkpoint.spec().layers.len());
        options.size_budget = self.options.size_budget;
        options.run = self.options.run(self.ffn);
        options.recall = self.options.recall;
        options.look_ahead = self.options.look_ahead;
        options.compare_look_ahead = false;
        options.weight_bytes = self.checkpoint.ffn_dtype().bytes();
        options.fit = options.fit.seed(self.options.seed);
        options
    }
}

/// What is done with each layer.
struct EachLayer<'a> {
    layers: &'a Layers<'a>,
    stages: &'a Stages,
    options: &'a TrainOptions,
    ranks: &'a [PredictorForm],
    ordering: &'a Ordering,
    task: &'a Running<'a>,
}

impl EachLayer<'_> {
    /// Trains and orders a recorded layer, side by side, as much of ordering cannot be divided; then measures both.
    fn prepare(&self, recording: &Recording, layer: usize, done: Done) -> Result<()> {
        let (trained, ordered) = rayon::join(
            || if done.trained { Ok(()) } else { self.train(recording, layer) },
            || if done.ordered { Ok(()) } else { self.order(recording, layer) },
        );
        trained.and(ordered)?;
        let (stages, spec) = (self.stages, self.layers.checkpoint.spec());
        let order = OrderFile::read(&stages.orders, layer, spec.ffn().size)?;
        let layout = self.layers.layout;
        let storage = Storage {
            records_per_group: layout.records_per_group() as u32,
            group_bytes: layout.group_bytes() as u64,
            cost: self.ordering.cost(),
        };
        let shown = report::measure_layer(recording, layer, &order, &storage)?;
        publish_sealed(&stages.shown(layer), &shown, &[])?;
        let sparsity = layer_sparsity(recording, layer, &stages.predictors, Some(&order.order), layout)?;
        publish_sealed(&stages.measured(layer), &sparsity, &[])
    }

    fn train(&self, recording: &Recording, layer: usize) -> Result<()> {
        let stages = self.stages;
        let active = recording.layer(layer)?.active_fraction();
        let report = train_layer(self.layers.training(recording), self.options, layer, self.ranks, &stages.predictors)?;
        publish_sealed(&stages.trained(layer), &report, &[predictor_path(&stages.predictors, layer)])?;
        self.task.tell(Event::Layer { active, report: &report });
        Ok(())
    }

    fn order(&self, recording: &Recording, layer: usize) -> Result<()> {
        let stages = self.stages;
        let scores = self.ordering.layer(recording, layer, &|| ())?;
        publish_sealed(&stages.ordered(layer), &scores, &[OrderFile::path(&stages.orders, layer)])
    }
}

/// Progress of the trials, after that of recording the pilot.
struct Trials<'a> {
    task: Running<'a>,
    tokens: u64,
    total: u64,
    done: Cell<u64>,
}

impl Progress for Trials<'_> {
    fn tried(&self, _layer: usize, _curve: &RankCurve) {
        self.done.set(self.done.get() + self.tokens);
        self.task.at(self.done.get(), self.total);
    }

    fn trained(&self, _report: &LayerReport) {}
}
