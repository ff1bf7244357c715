//! `orders.json`: what each strategy costs in each layer, and which was taken.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::file::OrderFileError;
use crate::destination::ORDERS_FORMAT;
use crate::publish::publish_bytes;
use crate::regular::read_regular;

/// Name of the file in a directory of orders.
pub const ORDERS_JSON: &str = "orders.json";
/// Longest file that is read; those of models with many layers have a few megabytes.
const BYTES_MAX: u64 = 256 << 20;

/// The whole of `orders.json`. Later versions may say more, which is ignored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OrderSummary {
    /// [`OrderSummary::FORMAT`].
    pub format: String,
    /// [`OrderSummary::VERSION`].
    pub version: u32,
    /// Id of the recording that orders were made from.
    pub recording: String,
    /// Id of the recording that they were judged on.
    pub scored_on: String,
    /// Tokens that they were made from.
    pub training_tokens: usize,
    /// Tokens that they were judged on.
    pub scored_tokens: u64,
    /// Neuron records in a group.
    pub records_per_group: u32,
    /// Bytes of a group.
    pub group_bytes: u64,
    /// The policy of the cache before the disk; where every layer has its own, these say it.
    pub policy: String,
    /// Its slots, in groups.
    pub slots: u32,
    /// What a read costs, and each of its bytes.
    pub request_ns: f64,
    /// Likewise.
    pub byte_ns: f64,
    /// The layers that were ordered.
    pub layers: Vec<LayerScores>,
}

impl OrderSummary {
    /// What the file says that it is.
    pub const FORMAT: &str = ORDERS_FORMAT;
    /// The version that this build writes, and the newest that it reads.
    pub const VERSION: u32 = 1;

    /// Writes the file into `dir` whole, or not at all.
    ///
    /// # Errors
    /// What the system says.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        let mut json = serde_json::to_vec_pretty(self).expect("plain data serialises");
        json.push(b'\n');
        publish_bytes(&dir.join(ORDERS_JSON), &json)
    }

    /// Reads the file in `dir`.
    ///
    /// # Errors
    /// If there is none, or none that this build knows.
    pub fn read(dir: &Path) -> Result<Self, OrderFileError> {
        let path = dir.join(ORDERS_JSON);
        let json = match read_regular(&path, BYTES_MAX) {
            Ok(json) => json,
            Err(source) => return Err(OrderFileError::Io { path, source }),
        };
        let read: Self = match serde_json::from_slice(&json) {
            Ok(read) => read,
            Err(source) => return Err(OrderFileError::Json { path, source }),
        };
        if read.format != Self::FORMAT {
            let (expected, found) = (Self::FORMAT.into(), read.format);
            return Err(OrderFileError::Mismatch { path, what: "format", expected, found });
        }
        if read.version > Self::VERSION {
            return Err(OrderFileError::TooNew { path, found: read.version, newest: Self::VERSION });
        }
        Ok(read)
    }
}

/// What `orders.json` says of a layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerScores {
    /// Number of the layer.
    pub layer: usize,
    /// The strategy that was taken.
    pub chosen: String,
    /// The file with the order.
    pub file: String,
    /// The policy of this layer's cache; earlier builds had one for all.
    #[serde(default)]
    pub policy: String,
    /// All that were tried; the first is the checkpoint's order.
    pub strategies: Vec<StrategyScore>,
    /// Time that it took. Not part of the file, which holds nothing of the machine.
    #[serde(skip)]
    pub seconds: f64,
}

/// What one strategy's order costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StrategyScore {
    /// Its name.
    pub strategy: String,
    /// Everything wanted is read, gaps never.
    pub wanted: ReadFigures,
    /// What the cache misses is read, gaps never.
    pub missed: ReadFigures,
    /// What the cache misses is read as the runtime does it.
    pub planned: ReadFigures,
    /// Share of what is wanted that the cache has.
    pub hit_rate: f64,
    /// Time that reading takes.
    pub predicted_ms_per_token: f64,
}

/// What is read, mean over tokens and reads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReadFigures {
    /// Reads of a token.
    pub reads_per_token: f64,
    /// Bytes that they take.
    pub bytes_per_token: f64,
    /// Groups that lie together, of those needed.
    pub mean_run_groups: f64,
    /// Groups of a read.
    pub mean_read_groups: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_another_file_is_not() {
        let figures =
            ReadFigures { reads_per_token: 1.5, bytes_per_token: 4096.0, mean_run_groups: 1.25, mean_read_groups: 2.0 };
        let score = StrategyScore {
            strategy: "identity".into(),
            wanted: figures.clone(),
            missed: figures.clone(),
            planned: figures,
            hit_rate: 0.5,
            predicted_ms_per_token: 0.1,
        };
        let file = "layer-000.order.safetensors".into();
        let chosen = "identity".into();
        let policy = "lru".into();
        let layer = LayerScores { layer: 0, chosen, file, policy, strategies: vec![score], seconds: 0.0 };
        let summary = OrderSummary {
            format: OrderSummary::FORMAT.into(),
            version: OrderSummary::VERSION,
            recording: "made from".into(),
            scored_on: "judged on".into(),
            training_tokens: 1000,
            scored_tokens: 100,
            records_per_group: 4,
            group_bytes: 4096,
            policy: "lru".into(),
            slots: 10,
            request_ns: 20_000.0,
            byte_ns: 1.0,
            layers: vec![layer],
        };
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(OrderSummary::read(dir.path()), Err(OrderFileError::Io { .. })));
        summary.write(dir.path()).unwrap();
        assert_eq!(OrderSummary::read(dir.path()).unwrap(), summary);
        let path = dir.path().join(ORDERS_JSON);
        let json = std::fs::read_to_string(&path).unwrap();
        let read = |from: &str, to: &str| {
            let changed = json.replace(from, to);
            assert_ne!(changed, json, "{from}");
            std::fs::write(&path, changed).unwrap();
            OrderSummary::read(dir.path())
        };
        assert_eq!(read("{\n", "{\n  \"later\": [1],\n").unwrap(), summary, "what is not known is passed over");
        let version = read("\"version\": 1", "\"version\": 2");
        assert!(matches!(version, Err(OrderFileError::TooNew { found: 2, newest: 1, .. })));
        let format = read("flashlm-orders", "flashlm-predictors");
        assert!(matches!(format, Err(OrderFileError::Mismatch { what: "format", .. })));
        assert!(matches!(read("\"slots\": 10,", ""), Err(OrderFileError::Json { .. })));
    }
}
