//! What other commands left: `predictors.json` and `orders.json`. Reads the fields that the report needs and no others, so
//! that those files may grow.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use flashlm_formats::regular::read_regular;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};

use super::ReportError;
use crate::ordering::OrderFile;

/// Longest of these files; those of models with many layers have a few megabytes.
const JSON_BYTES_MAX: u64 = 256 << 20;

/// What `flashlm-prep train` reports.
#[derive(Clone, Debug, Deserialize)]
pub struct Predictors {
    pub(super) recording: String,
    pub(super) layers: Vec<PredictorLayer>,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct PredictorLayer {
    pub(super) layer: usize,
    pub(super) rank: usize,
    pub(super) dtype: String,
    pub(super) bytes: u64,
    pub(super) ffn_bytes: u64,
    pub(super) held_out: Point,
    #[serde(default)]
    pub(super) validation: Option<Point>,
    #[serde(default)]
    pub(super) curves: Vec<Curve>,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct Curve {
    pub(super) dtype: String,
    pub(super) points: Vec<Point>,
}

/// A predictor at one threshold.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(super) struct Point {
    pub(super) false_negative_rate: f64,
    pub(super) false_positive_rate: f64,
    pub(super) predicted_fraction: f64,
    pub(super) active_fraction: f64,
    pub(super) energy_recall: f64,
}

impl PredictorLayer {
    /// The chosen point, on text that the predictor was not trained on.
    pub(super) fn chosen(&self) -> &Point {
        self.validation.as_ref().unwrap_or(&self.held_out)
    }

    /// The curve of the predictor as it is stored, from few misses to many.
    pub(super) fn curve(&self) -> &[Point] {
        self.curves.iter().find(|c| c.dtype == self.dtype).map_or(&[], |c| &c.points)
    }
}

impl Predictors {
    /// Reads `predictors.json` in `dir`.
    pub fn read(dir: &Path) -> Result<Self, ReportError> {
        read_json(&dir.join("predictors.json"))
    }
}

/// What `flashlm-prep order` made.
#[derive(Clone, Debug, Deserialize)]
pub struct Orders {
    #[serde(skip)]
    dir: PathBuf,
    pub(super) recording: String,
    pub(super) records_per_group: u32,
    pub(super) group_bytes: u64,
    pub(super) request_ns: f64,
    pub(super) byte_ns: f64,
    #[serde(deserialize_with = "numbers")]
    layers: BTreeSet<usize>,
}

/// Only the number of each layer.
fn numbers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeSet<usize>, D::Error> {
    #[derive(Deserialize)]
    struct Ordered {
        layer: usize,
    }
    Ok(Vec::<Ordered>::deserialize(deserializer)?.into_iter().map(|ordered| ordered.layer).collect())
}

impl Orders {
    /// Reads `orders.json` in `dir`; the orders themselves are read one by one.
    pub fn read(dir: &Path) -> Result<Self, ReportError> {
        let mut orders: Orders = read_json(&dir.join("orders.json"))?;
        orders.dir = dir.to_path_buf();
        Ok(orders)
    }

    /// The order of a layer, where there is one.
    pub(super) fn layer(&self, layer: usize, neurons: usize) -> Result<Option<OrderFile>, ReportError> {
        if !self.layers.contains(&layer) {
            return Ok(None);
        }
        Ok(Some(OrderFile::read(&self.dir, layer, neurons)?))
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, ReportError> {
    let bytes =
        read_regular(path, JSON_BYTES_MAX).map_err(|source| ReportError::Io { path: path.to_path_buf(), source })?;
    serde_json::from_slice(&bytes).map_err(|source| ReportError::Json { path: path.to_path_buf(), source })
}
