//! The options of a run: where neurons come from, how memory and the disk are used.

use std::num::NonZeroUsize;

use flashlm_formats::bundle::{Bundle, PredictorInfo, SectionInfo};
use flashlm_io::{DirectIo, Engines};

use crate::cache::PolicyKind;
use crate::disk_cost::{ReadCost, known_cost};
use crate::engine::Room;
use crate::forward::kv::KvDtype;
use crate::planner::ReadPlan;
use crate::speculate::Speculate;
use crate::threads;

/// Where the FFN is to come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FfnChoice {
    /// All neurons in memory, read once.
    Resident,
    /// All neurons read for every token; those of the layers that fit stay in memory, unless this was asked for by name.
    Streamed,
    /// Predicted neurons read where they are not cached.
    Flash,
    /// The published baseline: the whole model read for every token, attention too, and every neuron computed.
    Naive,
    /// The published baseline: as many layers' neurons pinned as fit, the others read for every token, and every neuron computed.
    Hybrid,
}

impl FfnChoice {
    /// Whether predictors take part in deciding what is computed: not in the baselines, which reproduce what others do without them.
    pub fn obeys_predictors(self) -> bool {
        !matches!(self, FfnChoice::Naive | FfnChoice::Hybrid)
    }

    /// Its name, as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            FfnChoice::Resident => "resident",
            FfnChoice::Streamed => "streamed",
            FfnChoice::Flash => "flash",
            FfnChoice::Naive => "naive",
            FfnChoice::Hybrid => "hybrid",
        }
    }
}

/// How to open a bundle.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Tokens that a sequence may have.
    pub context: usize,
    /// Sequences of this many tokens that there is memory for.
    pub sequences: usize,
    /// Rows decoded together, at most [`BATCH_MAX`](crate::engine::BATCH_MAX): affects memory, not the text.
    pub batch: usize,
    /// Tokens that are guessed in a step: as many rows more are decoded together, with `Auto` as the budget allows. Affects memory, not
    /// the text.
    pub speculate: Speculate,
    /// Bytes of the budget that another model of the process takes, one that guesses.
    pub draft_bytes: u64,
    /// Bytes for the whole process; `None` takes what the machine and the memory cgroups leave, less a reserve.
    pub budget: Option<u64>,
    /// Where the FFN comes from; `None` takes `Resident` where it fits, else `Flash` where predictors choose, else `Streamed`.
    /// The text is the same.
    pub ffn: Option<FfnChoice>,
    /// Compute what the bundle's predictors choose, if it has any; with `false` every neuron, which gives another text. The baselines
    /// compute every neuron.
    pub predict: bool,
    /// Prefetch what a layer will probably need. For `Flash` only.
    pub look_ahead: bool,
    /// Which groups of neurons stay in memory; `None` takes what the bundle says for each layer. For `Flash` only.
    pub policy: Option<PolicyKind>,
    /// How reads are planned; `None` takes the cost that the profile kept for the disk tells, or that of a usual one. For `Flash` only.
    pub reads: Option<ReadPlan>,
    /// Precision of the KV cache; `None` takes what the bundle says its model needs, usually f16.
    pub kv: Option<KvDtype>,
    /// Threads that compute.
    pub threads: NonZeroUsize,
    /// Whether reads bypass the page cache.
    pub direct: DirectIo,
    /// How reads are issued.
    pub engines: Engines,
    /// Verify what is read while decoding against its checksums. What is read while loading always is.
    pub verify: bool,
}

impl LoadOptions {
    /// Room for `context` tokens; everything else as the `flashlm` command has it by default.
    pub fn new(context: usize) -> Self {
        Self {
            context,
            sequences: 1,
            batch: 1,
            speculate: Speculate::Off,
            draft_bytes: 0,
            budget: None,
            ffn: None,
            predict: true,
            look_ahead: true,
            policy: None,
            reads: None,
            kv: None,
            threads: threads::default_count(),
            direct: DirectIo::Optional,
            engines: Engines::default(),
            verify: true,
        }
    }

    /// The cache policy of each layer of `bundle`.
    pub fn policies(&self, bundle: &Bundle) -> Vec<PolicyKind> {
        let layers = bundle.manifest().sparsity.as_deref().unwrap_or_default();
        let of_layer = |layer: usize| layers.get(layer).and_then(|layer| layer.half_life);
        let noted = |layer| of_layer(layer).map_or(PolicyKind::DEFAULT, |half_life| PolicyKind::Lfu { half_life });
        (0..bundle.spec().layers.len()).map(|layer| self.policy.unwrap_or_else(|| noted(layer))).collect()
    }

    /// Precision of the KV cache of `bundle`.
    pub fn kv(&self, bundle: &Bundle) -> KvDtype {
        let wide = bundle.manifest().wide_kv;
        self.kv.unwrap_or(if wide { KvDtype::F32 } else { KvDtype::F16 })
    }

    /// What sequences may take, with scratch for this many tokens of a prompt.
    pub(crate) fn room(&self, bundle: &Bundle, scratch_tokens: usize) -> Room {
        let (context, sequences, batch) = (self.context, self.sequences, self.batch);
        Room { context, sequences, kv: self.kv(bundle), scratch_tokens, batch }
    }

    /// What reading the bundle costs, and which disk that is the cost of, in words.
    pub(crate) fn disk_cost(&self, bundle: &Bundle) -> (ReadCost, String) {
        match self.reads {
            Some(ReadPlan::Cost(cost) | ReadPlan::Observed(cost)) => (cost, "a given cost".into()),
            _ => known_cost(bundle.path()),
        }
    }

    /// The section of the predictors that decide what `choice` computes, if any do.
    pub(crate) fn predictors<'a>(
        &self,
        bundle: &'a Bundle,
        choice: FfnChoice,
    ) -> Option<(SectionInfo, &'a PredictorInfo)> {
        let decide = self.predict && choice.obeys_predictors();
        bundle.predictors().zip(bundle.manifest().predictors.as_ref()).filter(|_| decide)
    }
}
