//! One page that shows what a recording, its predictors and its orders say: charts as inline SVG, nothing to load, no scripts; and
//! the charts as files, with the numbers behind them.
//!
//! [`build`] counts in the recording what it shows, and reads what `train` and `order` left. A part whose input is missing says
//! which command makes it. The same inputs give the same bytes.

mod chart;
mod data;
mod html;
mod inputs;
mod measures;
mod sections;

use std::path::PathBuf;

use flashlm::disk_cost::ReadCost;
use flashlm_formats::orders::OrderFileError;
use flashlm_formats::predictors::TrainReport;
use flashlm_formats::recording::{Recording, RecordingError};
use rayon::prelude::*;

use html::Section;
pub use inputs::Orders;
use measures::{LayerMeasures, Storage};

/// Bytes that groups are padded to when no orders say otherwise.
const ALIGNMENT: u64 = 4096;
/// Bytes of a weight, likewise.
const WEIGHT_BYTES: usize = 2;

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

/// What a report is made from.
pub struct ReportInput<'a> {
    /// The recording.
    pub recording: &'a Recording,
    /// What the mean share of active neurons means for speed, in words.
    pub verdict: fn(f64) -> String,
    /// From `train`.
    pub predictors: Option<&'a TrainReport>,
    /// From `order`.
    pub orders: Option<&'a Orders>,
    /// What reading costs, and from which disk that is known.
    pub disk: Option<(ReadCost, String)>,
    /// Tokens that are looked at where a sample is enough.
    pub tokens_max: usize,
}

/// What the sections are written from.
struct Facts<'a> {
    input: &'a ReportInput<'a>,
    layers: Vec<LayerMeasures>,
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
    /// The page.
    pub fn page(&self) -> String {
        html::page(&self.title, &self.sections)
    }
}

/// Makes the report. `progress` is called after each layer.
pub fn build(input: &ReportInput, progress: &(dyn Fn() + Sync)) -> Result<Report, ReportError> {
    let (recording, model) = (input.recording, &input.recording.info().model);
    let present: Vec<usize> = (0..model.layers.len()).filter(|&l| recording.has_layer(l)).collect();
    if present.is_empty() {
        return Err(ReportError::NoLayers { dir: recording.dir().to_path_buf() });
    }
    let trained = input.predictors.iter().flat_map(|p| &p.layers);
    if let Some(stray) = trained.map(|l| l.layer).find(|&l| l >= model.layers.len()) {
        return Err(ReportError::NoSuchLayer { layer: stray, layers: model.layers.len() });
    }
    let (storage, cost_source) = storage(input)?;
    // Orders are not judged on what they were made from.
    let own_orders = input.orders.is_some_and(|orders| orders.summary.recording == recording.info().id);
    let sample = measures::sample(recording, input.tokens_max, own_orders);
    let matrix_layer = present[present.len() / 2];
    let layers: Result<Vec<LayerMeasures>, ReportError> = present
        .par_iter()
        .map(|&number| {
            let layer = recording.layer(number)?;
            let measured = measures::measure(&layer, number, &sample, input.orders, &storage, number == matrix_layer)?;
            progress();
            Ok(measured)
        })
        .collect();
    let sampled_tokens = sample.iter().map(|s| s.len()).sum();
    let facts = Facts { input, layers: layers?, storage, cost_source, sampled_tokens, matrix_layer };
    Ok(Report {
        title: format!("How sparse and how predictable: {}", sections::model_name(model)),
        recording: recording.info().id.clone(),
        sections: sections::all(&facts)?,
    })
}

/// Layout and cost of reading: from the disk, else from the orders, else the usual ones.
fn storage(input: &ReportInput) -> Result<(Storage, String), ReportError> {
    let model = &input.recording.info().model;
    let record_bytes = (model.ffn().vectors() * model.hidden_size * WEIGHT_BYTES) as u64;
    let fitting = (ALIGNMENT / record_bytes.max(1)).max(1);
    let orders = input.orders.map(|orders| &orders.summary);
    let (records_per_group, group_bytes) = match orders {
        Some(orders) => (orders.records_per_group.max(1), orders.group_bytes),
        None => (fitting as u32, (record_bytes * fitting).next_multiple_of(ALIGNMENT)),
    };
    let (cost, source) = match (&input.disk, orders) {
        (Some((cost, disk)), _) => (*cost, disk.clone()),
        (None, Some(orders)) => {
            (ReadCost::new(orders.request_ns, orders.byte_ns)?, "the disk that the orders were made for".into())
        }
        (None, None) => (ReadCost::USUAL, "an assumed virtual disk; flashlm disk PATH measures yours".into()),
    };
    Ok((Storage { records_per_group, group_bytes, cost }, source))
}

#[cfg(test)]
mod tests;
