//! Only the neurons that matter, from flash: the source that flashlm exists for.
//!
//! A few tokens: the predictor says for each which neurons of the layer to compute; the store says which groups of all these are in
//! memory and starts reading the others. Groups that a layer will probably want are read ahead of that: while its attention runs, from what
//! its input would be without attention; or, where attention and FFN run side by side or a predictor was trained for it, while the
//! layer before it is computed. Neurons in memory are computed
//! while reads are under way, the others as they arrive. What is computed is exactly the predictor's choice, and every sum runs in
//! storage order: the result does not depend on what was cached, read ahead, or read together.
//!
//! Many tokens at once: each layer is streamed through a ring of the same arena, which begins while its attention is computed; each
//! neuron meets the tokens that selected it, and the last tokens leave the cache as decoding them would have.

mod arena;
mod decode;
mod prefill;
mod store;
mod turn;

use std::sync::Arc;

use flashlm_formats::bundle::{Bundle, FlashLayout};
use flashlm_formats::model::Ffn;
use flashlm_io::{DirectFile, Engines};
use flashlm_kernels::Threads;

use super::checks::GroupChecks;
use super::counters::ReadCounters;
use super::params::NeuronParams;
use super::predictor::LayerPredictors;
use super::records::Records;
use super::selection::Selection;
use super::source::{Arithmetic, FfnCall, FfnSource, Inputs};
use crate::buffers::Buffers;
use crate::cache::PolicyKind;
use crate::disk_cost::ReadCost;
use crate::error::Result;
use crate::planner::ReadPlan;
pub use arena::ArenaPlan;
use decode::{AheadPredictor, DecodeScratch};
use store::Store;
use turn::Turn;

/// What an engine keeps for its reads in flight, and for their own buffers where they need such. Measured.
const ENGINE_BYTES: u64 = 1 << 20;
const BOUNCE_BYTES: u64 = 9 << 20;

/// How neurons are chosen, kept and read.
pub struct FlashOptions {
    /// How the arena is divided.
    pub arena: ArenaPlan,
    /// What decides which groups stay.
    pub policies: Vec<PolicyKind>,
    /// How reads are planned.
    pub reads: ReadPlan,
    /// How reads are issued.
    pub engines: Engines,
    /// Hold every group that is read against its checksum.
    pub verify: bool,
    /// Read ahead what a layer will probably want.
    pub look_ahead: bool,
    /// Tokens whose neurons are chosen, looked up and read together.
    pub batch: usize,
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
    /// One for each layer.
    params: Vec<NeuronParams>,
    checks: Option<GroupChecks>,
    scratch: DecodeScratch,
    selection: Selection,
    /// For each layer whether attention and FFN see the same input, so that the FFN's is known before attention.
    parallel: Vec<bool>,
    turn: Turn,
    /// See [`FlashOptions`].
    batch: usize,
    planning_ns: u64,
    touched_bytes: u64,
    /// As in [`ReadCounters`].
    row_neurons: u64,
    step_neurons: u64,
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
        Ok(Self {
            ffn: *bundle.spec().ffn(),
            records: Records::of(bundle),
            layout,
            look_ahead: options.look_ahead && predictors.is_some(),
            predictors,
            store: Store::new(bundle, file, options)?,
            checks: options.verify.then(|| GroupChecks::new(bundle)),
            params: Vec::new(),
            scratch: DecodeScratch::new(&mut Buffers::default(), &layout, options.batch),
            selection: Selection::default(),
            parallel: bundle.spec().layers.iter().map(|layer| layer.block.is_parallel()).collect(),
            turn: Turn::Idle,
            batch: options.batch,
            planning_ns: 0,
            touched_bytes: 0,
            row_neurons: 0,
            step_neurons: 0,
        })
    }

    /// With what belongs to the neurons of each layer; nothing can be computed without.
    pub fn with_params(mut self, params: Vec<NeuronParams>) -> Self {
        self.params = params;
        self
    }

    /// Bytes of everything but the arena and the predictors; `bounces`: where the disk is read in larger steps than groups are aligned
    /// to, every read goes through a buffer of its own.
    pub fn working_bytes(
        layout: &FlashLayout,
        arena: &ArenaPlan,
        policies: &[PolicyKind],
        batch: usize,
        bounces: bool,
    ) -> u64 {
        let tables = Store::bytes(layout, arena, policies);
        let lists = Buffers::bytes_of(|buffers| DecodeScratch::new(buffers, layout, batch));
        // Requests in flight with the pieces of each, and what is read through.
        tables + lists + ENGINE_BYTES + if bounces { BOUNCE_BYTES } else { 0 }
    }

    /// How reads are issued, for announcements.
    pub fn engine(&self) -> &str {
        self.store.engine().description()
    }
}

impl FlashFfn {
    /// After an error the next token starts again.
    fn or_anew<T>(&mut self, result: Result<T>) -> Result<T> {
        if result.is_err() {
            self.turn = Turn::Idle;
        }
        result
    }

    fn run_all(&mut self, mut call: FfnCall<'_, '_>) -> Result<()> {
        if call.inputs.arithmetic == Arithmetic::Piece || call.hook.is_some() {
            return self.prefill(call);
        }
        let tokens = call.inputs.tokens;
        for start in (0..tokens).step_by(self.batch) {
            let end = (start + self.batch).min(tokens);
            self.decode(&mut call, start..end, end == tokens)?;
        }
        Ok(())
    }
}

impl FfnSource for FlashFfn {
    fn run(&mut self, call: FfnCall<'_, '_>) -> Result<()> {
        let result = self.run_all(call);
        self.or_anew(result)
    }

    fn prepare(&mut self, layer: usize, inputs: Inputs<'_>, threads: &Threads) -> Result<()> {
        if inputs.tokens > self.batch {
            // What does not go through the layer together is chosen one after the other.
            return Ok(());
        }
        let result = self.start(layer, inputs, threads, true);
        self.or_anew(result)
    }

    fn predict_ahead(&mut self, layer: usize, inputs: Inputs<'_>, threads: &Threads) -> Result<()> {
        if inputs.tokens <= self.batch && self.score_ahead(layer, AheadPredictor::Own, inputs, threads) {
            self.turn = Turn::Predicted { layer, begun: self.turn.has_begun(layer) };
        }
        Ok(())
    }

    fn poll(&mut self) -> Result<()> {
        let result = self.read_predicted().and_then(|begun| if begun { Ok(()) } else { self.store.wait(0) });
        self.or_anew(result)
    }

    fn read_cost(&self) -> Option<ReadCost> {
        self.store.observed_cost()
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
            planning_ns: self.planning_ns,
            touched_bytes: self.touched_bytes,
            row_neurons: self.row_neurons,
            step_neurons: self.step_neurons,
            wanted: cache.wanted,
            hits: cache.hits,
            unused_prefetch_bytes: (cache.ahead - cache.ahead_hits.min(cache.ahead)) * self.layout.group_bytes() as u64,
        }
    }
}
