//! Many tokens through one layer: every group once, in order, with matrix products.

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
        let place = |at: u32| ring_first + at % ring * chunk;
        let range = |at: u32| at * chunk..((at + 1) * chunk).min(groups);

        let mut issued = 0;
        while issued < chunks.min(ring) {
            self.store.read_into_ring(layer, range(issued), place(issued))?;
            issued += 1;
        }
        // The disk works while the neurons are chosen.
        self.select(&call);
        let selection = self.predictors.is_some().then_some(&self.selection);
        let (threads, params) = (call.threads, &self.params[layer]);
        let mut call = FfnCall { selection, ..call };
        for at in 0..chunks {
            let (slot, groups) = (place(at), range(at));
            while self.store.ring_bytes(slot, groups.len() as u32).is_none() {
                self.store.wait(1)?;
            }
            let bytes = self.store.ring_bytes(slot, groups.len() as u32).expect("just seen");
            if let Some(checks) = &self.checks {
                checks.contiguous(threads, layer, groups.start as usize, bytes)?;
            }
            let first = groups.start as usize * records;
            let count = (groups.len() * records).min(self.ffn.size - first);
            let block = NeuronBlock::new(&self.records, bytes, params.scales(), first..first + count);
            dense(&self.ffn, &mut call, params, block)?;
            for (i, group) in groups.enumerate() {
                self.store.keep(layer, group, slot + i as u32);
            }
            if issued < chunks {
                self.store.read_into_ring(layer, range(issued), place(issued))?;
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
