//! Everything the process will hold, added up before any of it is allocated.

use flashlm_formats::bundle::{Bundle, TensorEntry};
use flashlm_formats::model::ModelSpec;

use crate::budget::human_bytes;
use crate::error::{Result, RuntimeError};
use crate::model::forward::Forward;
use crate::model::kv_cache::{KvCache, KvDtype};
use crate::model::weights::vector_bytes;
use crate::sampler::Sampler;

/// One part of the plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanItem {
    /// What it is.
    pub name: &'static str,
    /// Bytes.
    pub bytes: u64,
}

/// The memory that a run will take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The parts.
    pub items: Vec<PlanItem>,
    /// Tokens the KV cache holds.
    pub context: usize,
    /// Where the FFN comes from, for messages.
    pub ffn: &'static str,
}

/// Lengths of a bundle's sections that a plan needs.
#[derive(Clone, Copy, Debug)]
pub struct SectionBytes {
    /// Resident tensors.
    pub resident: u64,
    /// Index.
    pub index: u64,
    /// tokenizer.json.
    pub tokenizer: u64,
}

/// Bytes of memory that decoding a token touches outside the FFN, with `tokens` in an f16 KV cache: attention, head, keys and values.
pub fn resident_bytes_touched(bundle: &Bundle, tokens: usize) -> u64 {
    let spec = bundle.spec();
    let head = if spec.tied_head { "embed.tokens" } else { "head.weight" };
    let is_touched = |tensor: &&TensorEntry| {
        let name = tensor.name.as_str();
        name.starts_with("layers.") && tensor.shape.len() == 2 || name == head || name.starts_with("embed.project")
    };
    let matrices: u64 = bundle.resident_tensors().iter().filter(is_touched).map(stored_bytes).sum();
    matrices + (spec.layers * KvCache::layer_bytes(spec, tokens, KvDtype::F16)) as u64
}

fn stored_bytes(tensor: &TensorEntry) -> u64 {
    tensor.extent.bytes + tensor.scales.map_or(0, |scales| scales.bytes)
}

/// The program itself: code, allocator, stacks, and what the kernel keeps for it. Measured: docs/measurements/memory.md.
const PROCESS_BYTES: u64 = 24 << 20;

/// Memory that a tokenizer takes while it is read, per byte of its tokenizer.json. Measured on vocabularies of 4 096 to 65 024.
const TOKENIZER_FACTOR: u64 = 14;

impl MemoryPlan {
    /// The plan for a model: `resident` and `index` are the bundle's section lengths, `tokenizer` the length of its
    /// tokenizer.json, `ffn` what the FFN's source is called and takes.
    pub fn new(
        spec: &ModelSpec,
        context: usize,
        kv: KvDtype,
        sections: SectionBytes,
        (ffn, ffn_items): (&'static str, &[PlanItem]),
    ) -> Self {
        let item = |name, bytes| PlanItem { name, bytes };
        let mut items = vec![item("resident weights", sections.resident + vector_bytes(spec))];
        items.extend_from_slice(ffn_items);
        items.extend([
            item("KV cache", (spec.layers * KvCache::layer_bytes(spec, context, kv)) as u64),
            item("activations", Forward::working_bytes(spec, context) + Sampler::bytes(spec.vocab_size)),
            // Read whole, and taken apart, before the checksums are kept.
            item("index", 2 * sections.index),
            item("tokenizer", sections.tokenizer * TOKENIZER_FACTOR),
            item("process", PROCESS_BYTES),
        ]);
        Self { items, context, ffn }
    }

    /// Bytes in all.
    pub fn total(&self) -> u64 {
        self.items.iter().map(|i| i.bytes).sum()
    }

    /// An error unless the plan fits `budget`.
    pub fn check(&self, budget: u64) -> Result<()> {
        if self.total() <= budget {
            return Ok(());
        }
        Err(RuntimeError::BudgetTooSmall {
            budget,
            needed: self.total(),
            what: format!("{} tokens of context with a {} FFN", self.context, self.ffn),
        })
    }

    /// The plan as lines of text.
    pub fn table(&self) -> String {
        let mut text = String::new();
        for PlanItem { name, bytes } in self.items.iter().filter(|item| item.bytes > 0) {
            text += &format!("  {name:<18} {:>12}\n", human_bytes(*bytes));
        }
        text + &format!("  {:<18} {:>12}\n", "total", human_bytes(self.total()))
    }
}
