//! What was chosen for a run.

use super::MemoryPlan;
use crate::disk_cost::ReadCost;
use crate::forward::kv::KvDtype;
use crate::neurons::flash::ArenaPlan;
use crate::options::FfnChoice;
use crate::tables::TablePlan;

/// What was chosen for a run, and the memory it takes.
pub struct Planned {
    /// Where the FFN comes from.
    pub choice: FfnChoice,
    /// The memory.
    pub plan: MemoryPlan,
    /// How the memory for neurons is divided, for [`FfnChoice::Flash`].
    pub arena: Option<ArenaPlan>,
    /// Layers whose neurons stay in memory, for the choices that read the others for every token.
    pub pinned: usize,
    /// Pieces of a layer that are read ahead, for the choices that read whole layers.
    pub chunks: usize,
    /// How keys and values are stored.
    pub kv: KvDtype,
    /// Tokens of a prompt that go through a block together.
    pub scratch_tokens: usize,
    /// Rows that are decoded together.
    pub batch: usize,
    /// What stays in memory of the vocabulary's matrices.
    pub tables: TablePlan,
    /// Bytes of the ring that the bundle is loaded through.
    pub loading_bytes: u64,
    /// Whether predictors choose what is computed; every neuron is where they do not.
    pub predicted: bool,
    /// What reading costs on the bundle's disk, and where that is known from, in words.
    pub cost: (ReadCost, String),
    /// Why it is slow, where the budget allowed nothing better.
    pub fallback: Option<String>,
}
