//! One page that shows what a recording, its predictors and its orders say: charts as inline SVG, nothing to load, no scripts; and
//! the charts as files, with the numbers behind them.
//!
//! Layers are counted one by one, so that none but the one at hand must be recorded at the time; [`Report::new`] writes about them,
//! and about what `train` and `order` left. A part whose input is missing says which command makes it. The same inputs give the
//! same bytes.

mod chart;
mod data;
mod html;
mod inputs;
mod measures;
mod sections;

use std::path::PathBuf;

use flashlm::disk_cost::ReadCost;
use flashlm_formats::orders::{OrderFile, OrderFileError, OrderSummary};
use flashlm_formats::predictors::TrainReport;
use flashlm_formats::recording::{Recording, RecordingError, RecordingInfo};
use rayon::prelude::*;

use html::Section;
pub use inputs::Orders;
pub use measures::{LayerMeasures, Storage};

/// Bytes that groups are padded to when no orders say otherwise.
const ALIGNMENT: u64 = 4096;
/// Bytes of a weight, likewise.
const WEIGHT_BYTES: usize = 2;
/// Tokens that are looked at where a sample is enough.
pub const SAMPLE_TOKENS: usize = 8192;

/// What can go wrong in making a report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReportError {
    /// The recording.
    #[error(transparent)]
    Recording(#[from] RecordingError),
    /// An order.
    #[error(transparent)]
    Order(#[from] OrderFileError),
    /// The recording has no layers.
    #[error("{}: a recording without layers", dir.display())]
    NoLayers {
        /// Its directory.
        dir: PathBuf,
    },
    /// Predictors of another model.
    #[error("predictors for layer {layer}, the recorded model has {layers} layers")]
    NoSuchLayer {
        /// The layer.
        layer: usize,
        /// Layers of the model.
        layers: usize,
    },
    /// A cost of reading that is no cost, in the orders.
    #[error("orders.json: {0}")]
    Cost(#[from] flashlm::disk_cost::ReadCostError),
    /// The system refused.
    #[error("cannot write {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The drawing library refused.
    #[error("drawing a chart: {0}")]
    Chart(String),
}

/// What a report is made from, but for what is counted in the recording.
#[derive(Clone, Copy)]
pub struct ReportInput<'a> {
    /// What was recorded.
    pub info: &'a RecordingInfo,
    /// What the mean share of active neurons means for speed, in words.
    pub verdict: fn(f64) -> String,
    /// From `train`.
    pub predictors: Option<&'a TrainReport>,
    /// From `order`.
    pub orders: Option<&'a OrderSummary>,
    /// What reading costs, and from which disk that is known.
    pub disk: Option<(ReadCost, &'a str)>,
    /// Whose report this is, where it is to say so.
    pub made: Option<&'a Made>,
}

/// Which model a report is of, and who made it when.
#[derive(Clone, Debug)]
pub struct Made {
    /// The model's name, as it was given.
    pub model: String,
    /// What was typed.
    pub command: String,
    /// The day, such as 2026-12-01.
    pub date: String,
}

/// What the sections are written from.
struct Facts<'a> {
    input: &'a ReportInput<'a>,
    layers: &'a [LayerMeasures],
    storage: Storage,
    /// Where the cost of reading comes from, in words.
    cost_source: String,
    sampled_tokens: usize,
    /// The layer whose matrix is shown.
    matrix_layer: usize,
}

/// What is shown, to be written as a page or as files.
pub struct Report {
    title: String,
    recording: String,
    sections: Vec<Section>,
}

impl Report {
    /// Writes the sections about layers that were measured as [`measure_layer`] or [`measure_all`] does.
    ///
    /// # Errors
    /// Inputs that do not belong together, and numbers that cannot be drawn.
    pub fn new(input: &ReportInput<'_>, layers: &[LayerMeasures]) -> Result<Self, ReportError> {
        let model = &input.info.model;
        let trained = input.predictors.iter().flat_map(|p| &p.layers);
        if let Some(stray) = trained.map(|l| l.layer).find(|&l| l >= model.layers.len()) {
            return Err(ReportError::NoSuchLayer { layer: stray, layers: model.layers.len() });
        }
        let (storage, cost_source) = storage(input)?;
        let matrix_layer = layers.iter().find(|layer| layer.has_matrix()).map_or(0, |layer| layer.layer);
        let sampled_tokens = layers.first().map_or(0, |layer| layer.activity.tokens);
        let facts = Facts { input, layers, storage, cost_source, sampled_tokens, matrix_layer };
        let name = input.made.map_or_else(|| sections::model_name(model), |made| made.model.clone());
        Ok(Self {
            title: format!("How sparse and how predictable: {name}"),
            recording: input.info.id.clone(),
            sections: sections::all(&facts)?,
        })
    }

    /// The page.
    pub fn page(&self) -> String {
        html::page(&self.title, &self.sections)
    }
}

/// Counts in all layers that are recorded what a report shows, on `tokens_max` tokens where a sample is enough. `progress` is called
/// after each layer.
///
/// # Errors
/// If the recording or an order cannot be read.
pub fn measure_all(
    recording: &Recording,
    orders: Option<&Orders>,
    input: &ReportInput<'_>,
    tokens_max: usize,
    progress: &(dyn Fn() + Sync),
) -> Result<Vec<LayerMeasures>, ReportError> {
    let model = &recording.info().model;
    let present: Vec<usize> = (0..model.layers.len()).filter(|&l| recording.has_layer(l)).collect();
    if present.is_empty() {
        return Err(ReportError::NoLayers { dir: recording.dir().to_path_buf() });
    }
    let (storage, _) = storage(input)?;
    // Orders are not judged on what they were made from.
    let own_orders = orders.is_some_and(|orders| orders.summary().recording == recording.info().id);
    let sample = measures::sample(recording, tokens_max, own_orders);
    let matrix_layer = present[present.len() / 2];
    let measure = |&number: &usize| {
        let layer = recording.layer(number)?;
        let chosen = orders.map(|orders| orders.layer(number, layer.ffn())).transpose()?.flatten();
        let measured = measures::measure(&layer, number, &sample, chosen.as_ref(), &storage, number == matrix_layer);
        progress();
        Ok(measured)
    };
    present.par_iter().map(measure).collect()
}

/// The same for one layer, while the others may not be recorded yet, and no longer be: with an order that was made from the training
/// part of this recording, to be stored as `storage` says.
///
/// # Errors
/// If the recording cannot be read.
pub fn measure_layer(
    recording: &Recording,
    number: usize,
    chosen: &OrderFile,
    storage: &Storage,
) -> Result<LayerMeasures, RecordingError> {
    let sample = measures::sample(recording, SAMPLE_TOKENS, true);
    let is_middle = number == recording.info().model.layers.len() / 2;
    Ok(measures::measure(&recording.layer(number)?, number, &sample, Some(chosen), storage, is_middle))
}

/// Layout and cost of reading: from the disk, else from the orders, else the usual ones.
fn storage(input: &ReportInput<'_>) -> Result<(Storage, String), ReportError> {
    let model = &input.info.model;
    let record_bytes = (model.ffn().vectors() * model.hidden_size * WEIGHT_BYTES) as u64;
    let fitting = (ALIGNMENT / record_bytes.max(1)).max(1);
    let (records_per_group, group_bytes) = match input.orders {
        Some(orders) => (orders.records_per_group.max(1), orders.group_bytes),
        None => (fitting as u32, (record_bytes * fitting).next_multiple_of(ALIGNMENT)),
    };
    let (cost, source) = match (input.disk, input.orders) {
        (Some((cost, disk)), _) => (cost, disk.into()),
        (None, Some(orders)) => {
            (ReadCost::new(orders.request_ns, orders.byte_ns)?, "the disk that the orders were made for".into())
        }
        (None, None) => (ReadCost::USUAL, "an assumed virtual disk; flashlm disk PATH measures yours".into()),
    };
    Ok((Storage { records_per_group, group_bytes, cost }, source))
}

#[cfg(test)]
mod tests;
