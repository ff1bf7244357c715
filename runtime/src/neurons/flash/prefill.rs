//! Many tokens through one layer: every group once, in order, with matrix products.

use flashlm_formats::ids::GroupId;
use flashlm_kernels::ROW_BLOCK;

use super::FlashFfn;
use super::decode::{DecodeScratch, groups_of};
use super::turn::Turn;
use crate::error::Result;
use crate::neurons::dense::dense;
use crate::neurons::records::NeuronBlock;
use crate::neurons::source::FfnCall;

/// The ring is read and computed in pieces of about this length: enough neurons for all threads.
const CHUNK_BYTES: usize = 8 << 20;
/// Pieces that the ring holds at least: one is computed while the others are read.
const CHUNKS_MIN: u32 = 4;
/// Tokens at the end of a prompt that leave their mark in the cache.
const WARM_TOKENS: usize = 32;

impl FlashFfn {
    /// Computes all tokens of the call.
    pub(super) fn prefill(&mut self, call: FfnCall<'_, '_>) -> Result<()> {
        let layer = call.layer;
        // What was read ahead for a token that did not come.
        self.turn = Turn::Idle;
        self.store.settle()?;
        let (ring_first, ring_slots) = self.store.borrow_ring();
        let records = self.layout.records_per_group();
        let groups = self.layout.groups() as u32;
        let whole = (ROW_BLOCK / records).max(1) as u32;
        let chunk = match self.store.slots_are_contiguous() {
            true => ((CHUNK_BYTES / self.layout.group_bytes()) as u32 / whole * whole)
                .max(whole)
                .min(ring_slots / CHUNKS_MIN)
                .max(1),
            // A disk that is read in larger steps than groups: they come one by one.
            false => 1,
        };
        let chunks = groups.div_ceil(chunk);
        let ring = (ring_slots / chunk).max(1);
        // Of a chunk its first slot, its first group and how many there are.
        let piece = |at: u32| {
            let first = at * chunk;
            (ring_first.after(at % ring * chunk), GroupId(first), chunk.min(groups - first))
        };

        let mut issued = 0;
        while issued < chunks.min(ring) {
            let (slot, first, count) = piece(issued);
            self.store.read_into_ring(layer, first, count, slot)?;
            issued += 1;
        }
        // The disk works while the neurons are chosen.
        self.select(&call);
        let selection = self.predictors.is_some().then_some(&self.selection);
        let (threads, params) = (call.threads, &self.params[layer]);
        let mut call = FfnCall { selection, ..call };
        for at in 0..chunks {
            let (slot, first, count) = piece(at);
            while self.store.ring_bytes(slot, count).is_none() {
                self.store.wait(1)?;
            }
            let bytes = self.store.ring_bytes(slot, count).expect("just seen");
            if let Some(checks) = &self.checks {
                checks.contiguous(threads, layer, first, bytes)?;
            }
            let start = first.index() * records;
            let end = (start + count as usize * records).min(self.ffn.size);
            let block = NeuronBlock::new(&self.records, bytes, params.scales(), start..end);
            dense(&self.ffn, &mut call, params, block)?;
            for i in 0..count {
                self.store.keep(layer, first.after(i), slot.after(i));
            }
            if issued < chunks {
                let (slot, first, count) = piece(issued);
                self.store.read_into_ring(layer, first, count, slot)?;
                issued += 1;
            }
        }
        Ok(())
    }

    /// Chooses the neurons of every token, and tells the cache what the last ones want.
    fn select(&mut self, call: &FfnCall<'_, '_>) {
        let (layer, tokens) = (call.layer, call.inputs.tokens);
        let records = self.layout.records_per_group() as u32;
        self.selection.reset(tokens, self.ffn.size);
        let (neurons, hidden) = (self.ffn.size, call.inputs.hidden());
        let DecodeScratch { scores, ahead, .. } = &mut self.scratch;
        let batch = scores.len() / neurons;
        for first in (0..tokens).step_by(batch) {
            let count = batch.min(tokens - first);
            match &mut self.predictors {
                Some(predictors) => {
                    let values = &call.inputs.values[first * hidden..(first + count) * hidden];
                    predictors[layer].own.scores_of_each(call.threads, values, count, scores);
                }
                None => scores.fill(1.0),
            }
            for (token, scores) in (first..first + count).zip(scores.chunks_exact(neurons)) {
                self.selection.select_positive(token, scores);
                if token + WARM_TOKENS < tokens {
                    continue;
                }
                groups_of(scores, 0.0, records, ahead);
                self.store.warm(layer, ahead);
            }
        }
    }
}
