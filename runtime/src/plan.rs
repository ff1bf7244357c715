//! Everything the process will hold, added up before any of it is allocated; `choice` finds the source of neurons that fits.

mod choice;
mod expectation;
mod planned;

pub use choice::plan;
pub(crate) use choice::plan_reading;
pub use expectation::{Decoding, Expectation, Held};
pub use planned::Planned;

use flashlm_formats::bundle::{Bundle, Section, TensorEntry};

use crate::budget::human_bytes;
use crate::engine::Room;
use crate::error::{Result, RuntimeError};
use crate::forward::kv::{KvDtype, KvMemory};
use crate::forward::weights::vector_bytes;
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

/// Bytes of memory that decoding a token touches outside the FFN, with `tokens` in the KV cache: attention, head, keys and values.
pub fn resident_bytes_touched(bundle: &Bundle, tokens: usize, kv: KvDtype) -> u64 {
    let spec = bundle.spec();
    let head = if spec.tied_head { "embed.tokens" } else { "head.weight" };
    let is_touched = |tensor: &&TensorEntry| {
        let name = tensor.name.as_str();
        name.starts_with("layers.") && tensor.shape.len() == 2 || name == head || name.starts_with("embed.project")
    };
    let matrices: u64 = bundle.resident_tensors().iter().filter(is_touched).map(stored_bytes).sum();
    matrices + (spec.layers.len() * KvMemory::layer_bytes(spec.attention(), tokens, kv)) as u64
}

fn stored_bytes(tensor: &TensorEntry) -> u64 {
    tensor.extent.bytes + tensor.scales.map_or(0, |scales| scales.bytes)
}

/// The program before it has read anything: its code as far as it is used, its heap, and what the kernel keeps for it and has
/// counted in advance. Measured: docs/measurements/memory.md.
const PROCESS_BYTES: u64 = 6 << 20;

/// The name of what is no model's.
const PROCESS: &str = "process";

/// A thread: what it uses of its stack, and the kernel's for it.
const THREAD_BYTES: u64 = 48 << 10;

/// One in this many bytes of memory goes to page tables, and to what allocations are rounded up by.
const BYTES_PER_TABLE_BYTE: u64 = 400;

/// Memory that a tokenizer takes while it is read, per byte of its tokenizer.json. Measured on vocabularies of 4 096 to 65 024.
const TOKENIZER_FACTOR: u64 = 14;

/// What the ring of buffers that a bundle is loaded through may take: as much as what is used after that alone, but not less than
/// the first and no more than the second.
const LOADING_BYTES: (u64, u64) = (512 << 10, 16 << 20);

/// What a process holds whatever its FFN's source is.
#[derive(Clone, Copy, Debug)]
pub struct Base<'a> {
    /// The bundle.
    pub bundle: &'a Bundle,
    /// What a sequence may take.
    pub room: Room,
    /// Threads that compute.
    pub threads: usize,
    /// Threads that only read.
    pub readers: usize,
    /// Bytes of the resident section that are left on flash.
    pub left_out: u64,
    /// Bytes of a model that guesses.
    pub draft: u64,
}

impl Base<'_> {
    fn kv_bytes(&self) -> u64 {
        let spec = self.bundle.spec();
        self.room.kv_bytes(spec)
    }

    /// What computing keeps beside weights and the KV cache.
    pub fn working_bytes(&self) -> u64 {
        let spec = self.bundle.spec();
        self.room.working_bytes(spec, self.threads) + Sampler::bytes(spec.vocab_size)
    }

    /// Bytes of the ring that the bundle is loaded through: it is gone before KV cache and activations are touched.
    pub fn loading_bytes(&self) -> u64 {
        (self.kv_bytes() + self.working_bytes()).clamp(LOADING_BYTES.0, LOADING_BYTES.1)
    }

    /// The plan with an FFN source of this name, which takes `ffn`.
    pub fn plan(&self, name: &'static str, ffn: &[PlanItem]) -> MemoryPlan {
        let item = |name, bytes| PlanItem { name, bytes };
        let (spec, kv) = (self.bundle.spec(), self.kv_bytes());
        let index = self.bundle.section(Section::Index).map_or(0, |section| section.extent.bytes);
        let resident = self.bundle.resident().extent.bytes - self.left_out;
        let mut items = vec![item("draft model", self.draft), item("resident weights", resident + vector_bytes(spec))];
        items.extend_from_slice(ffn);
        items.extend([
            item("KV cache", kv),
            item("activations", self.working_bytes().max(self.loading_bytes().saturating_sub(kv))),
            // Read whole, and taken apart, before the checksums are kept.
            item("index", 2 * index),
            item("tokenizer", self.bundle.tokenizer().len() as u64 * TOKENIZER_FACTOR),
        ]);
        let so_far: u64 = items.iter().map(|item| item.bytes).sum();
        let threads = (self.threads + self.readers) as u64 * THREAD_BYTES;
        items.push(item(PROCESS, PROCESS_BYTES + threads + so_far / BYTES_PER_TABLE_BYTE));
        MemoryPlan { items, context: self.room.context, ffn: name }
    }
}

impl MemoryPlan {
    /// Bytes that the model takes in a process that runs another one, too.
    pub fn bytes_beside(&self) -> u64 {
        self.items.iter().filter(|item| item.name != PROCESS).map(|item| item.bytes).sum()
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
