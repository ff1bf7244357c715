//! Only the neurons that matter, from flash: the source that flashlm exists for.
//!
//! One token: the predictor says which neurons of the layer to compute; the store says which of their groups are in memory and
//! starts reading the others. Groups that a layer will probably want are read ahead of that: while its attention runs, from what
//! its input would be without attention; or, where attention and FFN run side by side or a predictor was trained for it, while the
//! layer before it is computed. Neurons in memory are computed
//! while reads are under way, the others as they arrive. What is computed is exactly the predictor's choice, and every sum runs in
//! storage order: the result does not depend on what was cached, read ahead, or read together.
//!
//! Many tokens at once: each layer is streamed through a ring of the same arena and computed with matrix products, and the last
//! tokens leave the cache as decoding them would have.

mod arena;
mod decode;
mod prefill;
mod store;

use std::sync::Arc;
use std::time::Duration;

use flashlm_formats::bundle::{Bundle, FlashLayout};
use flashlm_formats::model::{Block, Ffn};
use flashlm_io::{DirectFile, EngineChoice, EngineOptions, FaultPlan};
use flashlm_kernels::{MATMUL_TOKENS_MIN, Threads};

use super::checks::GroupChecks;
use crate::cache::PolicyKind;
use crate::error::Result;
use crate::model::ffn::{FfnCall, FfnSource, ReadCounters, Records, Selection};
use crate::planner::ReadCost;
use crate::predictor::LayerPredictors;
pub use arena::ArenaPlan;
use decode::{DecodeScratch, Foresight};
use store::Store;

/// What an engine keeps for its reads in flight, and for their own buffers where they need such. Measured.
const ENGINE_BYTES: u64 = 1 << 20;
const BOUNCE_BYTES: u64 = 9 << 20;

/// How neurons are chosen, kept and read.
pub struct FlashOptions {
    /// How the arena is divided.
    pub arena: ArenaPlan,
    /// What decides which groups stay.
    pub policy: PolicyKind,
    /// What reading costs on this disk.
    pub cost: ReadCost,
    /// How reads are issued.
    pub engine: EngineChoice,
    /// How long a read may take.
    pub deadline: Duration,
    /// What shall go wrong on purpose, for tests.
    pub faults: Option<FaultPlan>,
    /// Hold every group that is read against its checksum.
    pub verify: bool,
    /// Read ahead what a layer will probably want.
    pub look_ahead: bool,
    /// How reads are cut, for measuring what bundling and ordering are worth.
    pub cut: ReadCut,
}

/// How reads are cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReadCut {
    /// As the planner finds best.
    #[default]
    Planned,
    /// One read for each group: about what the checkpoint's own order of neurons would give.
    Groups,
    /// Two reads for each group: up and down apart, as without bundling.
    Halves,
}

/// Reads predicted neurons, keeps the useful ones.
pub struct FlashFfn {
    ffn: Ffn,
    records: Records,
    layout: FlashLayout,
    /// One for each layer; `None` admits everything.
    predictors: Option<Vec<LayerPredictors>>,
    look_ahead: bool,
    store: Store,
    checks: Option<GroupChecks>,
    scratch: DecodeScratch,
    selection: Selection,
    /// Attention and FFN see the same input, so that the FFN's is known before attention.
    parallel: bool,
    /// The layer that the scores in `scratch` speak of, until reads for it have begun.
    foreseen: Option<usize>,
    /// The layer that was begun ahead of its turn.
    begun_ahead: Option<usize>,
    /// The layer whose neurons are chosen already.
    started: Option<usize>,
    manage_ns: u64,
    touched_bytes: u64,
}

impl FlashFfn {
    /// A source over `bundle`, which `file` is.
    pub fn new(
        bundle: &Bundle,
        file: Arc<DirectFile>,
        predictors: Option<Vec<LayerPredictors>>,
        options: &FlashOptions,
    ) -> Result<Self> {
        let layout = *bundle.layout();
        let FlashOptions { arena, policy, cost, engine, deadline, faults, verify, look_ahead, cut } = options;
        let reads = EngineOptions { deadline: *deadline, faults: *faults, ..EngineOptions::default() };
        Ok(Self {
            ffn: bundle.spec().ffn,
            records: Records::of(bundle),
            layout,
            look_ahead: *look_ahead && predictors.is_some(),
            predictors,
            store: Store::new(bundle, file, (*engine, reads), *policy, arena, cost, *cut)?,
            checks: verify.then(|| GroupChecks::new(bundle)),
            scratch: DecodeScratch::new(&bundle.spec().ffn, &layout),
            selection: Selection::default(),
            parallel: matches!(bundle.spec().block, Block::ParallelOneNorm | Block::ParallelTwoNorms),
            foreseen: None,
            begun_ahead: None,
            started: None,
            manage_ns: 0,
            touched_bytes: 0,
        })
    }

    /// Bytes of everything but the arena and the predictors, for a model of so many layers; `bounces`: where the disk is read in larger
    /// steps than groups are aligned to, every read goes through a buffer of its own.
    pub fn working_bytes(layout: &FlashLayout, layers: usize, arena: &ArenaPlan, bounces: bool) -> u64 {
        let groups = layout.groups() as u64;
        let tables = arena.total() as u64 * 48 + groups * layers as u64 * 48;
        let ring = groups * 64 + layout.neurons() as u64 * 64;
        // Requests in flight with the pieces of each, and what is read through.
        tables + ring + ENGINE_BYTES + if bounces { BOUNCE_BYTES } else { 0 }
    }

    /// How reads are issued, for announcements.
    pub fn engine(&self) -> &str {
        self.store.engine().description()
    }
}

impl FfnSource for FlashFfn {
    fn run(&mut self, mut call: FfnCall<'_>) -> Result<()> {
        if call.tokens >= MATMUL_TOKENS_MIN || call.observer.is_some() {
            return self.prefill(call);
        }
        let hidden = call.input.len() / call.tokens;
        for token in 0..call.tokens {
            let range = token * hidden..(token + 1) * hidden;
            let ahead = token + 1 == call.tokens;
            self.decode(&mut call, range, ahead)?;
        }
        Ok(())
    }

    fn prepare(&mut self, layer: usize, input: &[f32], threads: &Threads) -> Result<()> {
        self.start(layer, input, threads, true)?;
        self.started = Some(layer);
        Ok(())
    }

    fn foresee(&mut self, layer: usize, input: &[f32], threads: &Threads) -> Result<()> {
        if self.foresight(layer, Foresight::Own, input, threads) {
            self.foreseen = Some(layer);
        }
        Ok(())
    }

    fn poll(&mut self) -> Result<()> {
        let reads = match self.foreseen.take() {
            Some(layer) => self.read_ahead(layer),
            None => self.store.wait(0),
        };
        // After an error the next token begins anew.
        reads.inspect_err(|_| self.started = None)
    }

    fn read_sizes(&self) -> Vec<(u64, u64)> {
        self.store.read_sizes()
    }

    fn read_counters(&self) -> ReadCounters {
        let io = self.store.engine().counters();
        let cache = self.store.counters();
        ReadCounters {
            bytes: io.bytes,
            reads: io.reads,
            retries: io.retries,
            wait_ns: io.wait_ns,
            manage_ns: self.manage_ns,
            touched_bytes: self.touched_bytes,
            wanted: cache.wanted,
            hits: cache.hits,
            wasted_bytes: (cache.ahead - cache.ahead_hits.min(cache.ahead)) * self.layout.group_bytes() as u64,
        }
    }
}
