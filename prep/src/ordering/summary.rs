//! `orders.json`: what each strategy costs in each layer, and which was taken.

use flashlm::replay::ReplayCounts;
use serde::{Deserialize, Serialize};

use super::score::OrderScore;

/// Name of the file in a directory of orders.
pub const ORDERS_JSON: &str = "orders.json";

/// The whole of `orders.json`.
#[derive(Clone, Debug, Serialize)]
pub struct OrderSummary {
    pub(super) format: &'static str,
    pub(super) version: u32,
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
    /// The cache before the disk.
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

/// What `orders.json` says of a layer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LayerScores {
    /// Number of the layer.
    pub layer: usize,
    /// The strategy that was taken.
    pub chosen: String,
    /// The file with the order.
    pub file: String,
    /// All that were tried; the first is the checkpoint's order.
    pub strategies: Vec<StrategyScore>,
    /// Time that it took. Not part of the file, which holds nothing of the machine.
    #[serde(skip)]
    pub seconds: f64,
}

/// What one strategy's order costs.
#[derive(Clone, Debug, Serialize, Deserialize)]
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
#[derive(Clone, Debug, Serialize, Deserialize)]
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

impl From<&ReplayCounts> for ReadFigures {
    fn from(counts: &ReplayCounts) -> Self {
        ReadFigures {
            reads_per_token: counts.reads_per_token(),
            bytes_per_token: counts.bytes_per_token(),
            mean_run_groups: counts.mean_run_groups(),
            mean_read_groups: counts.mean_read_groups(),
        }
    }
}

impl StrategyScore {
    pub(super) fn new(strategy: &str, score: &OrderScore) -> Self {
        StrategyScore {
            strategy: strategy.into(),
            wanted: (&score.wanted).into(),
            missed: (&score.missed).into(),
            planned: (&score.planned).into(),
            hit_rate: score.planned.hit_rate(),
            predicted_ms_per_token: score.ms_per_token,
        }
    }
}
