//! Many tokens through one layer: every group once, in order, with matrix products.

use flashlm_formats::ids::GroupId;
use flashlm_kernels::ROW_BLOCK;

use super::FlashFfn;
use super::arena::ArenaSlot;
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

/// The slots through which a layer is streamed, in chunks of neighbouring groups.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Ring {
    first: ArenaSlot,
    /// Groups of a chunk.
    chunk: u32,
    /// Chunks that there is room for.
    places: u32,
    /// Groups of a layer.
    groups: u32,
}

impl Ring {
    /// Chunks of a layer.
    fn chunks(&self) -> u32 {
        self.groups.div_ceil(self.chunk)
    }

    /// Where chunk `at` of a layer goes whose first chunk is at `place`; its first group and how many it has.
    fn piece(&self, place: u32, at: u32) -> (ArenaSlot, GroupId, u32) {
        let first = at * self.chunk;
        (self.first.after((place + at) % self.places * self.chunk), GroupId(first), self.chunk.min(self.groups - first))
    }
}

impl FlashFfn {
    fn ring(&self, layer: usize) -> Ring {
        let (first, slots) = self.store.ring(layer);
        let whole = (ROW_BLOCK / self.layout.records_per_group()).max(1) as u32;
        let chunk = match self.store.slots_are_contiguous() {
            true => ((CHUNK_BYTES / self.layout.group_bytes()) as u32 / whole * whole)
                .max(whole)
                .min(slots / CHUNKS_MIN)
                .max(1),
            // A disk that is read in larger steps than groups: they come one by one.
            false => 1,
        };
        Ring { first, chunk, places: (slots / chunk).max(1), groups: self.layout.groups() as u32 }
    }

    /// Reads chunk `at` of `layer`, whose first is at `place`.
    fn read_chunk(&mut self, ring: Ring, layer: usize, place: u32, at: u32) -> Result<()> {
        let (slot, first, count) = ring.piece(place, at);
        self.store.read_into_ring(layer, first, count, slot)
    }

    /// Computes all tokens of the call.
    pub(super) fn prefill(&mut self, call: FfnCall<'_, '_>) -> Result<()> {
        let layer = call.layer;
        let ring = self.ring(layer);
        let (place, mut issued) = match self.turn {
            Turn::Streaming { layer: of, place, issued } if of == layer => (place, issued),
            _ => {
                // What was read ahead for a token that did not come.
                self.store.settle()?;
                self.store.free_transients();
                (0, 0)
            }
        };
        self.turn = Turn::Idle;
        let chunks = ring.chunks();
        while issued < chunks.min(ring.places) {
            self.read_chunk(ring, layer, place, issued)?;
            issued += 1;
        }
        // The disk works while the neurons are chosen.
        let mut call = call;
        self.select(&mut call);
        let next = (layer + 1 < self.params.len()).then(|| self.ring(layer + 1));
        let next_place = (place + chunks) % ring.places;
        let mut issued_next = 0;
        for at in 0..chunks {
            let (slot, first, count) = ring.piece(place, at);
            while self.store.ring_bytes(slot, count).is_none() {
                self.store.wait(1)?;
            }
            self.compute_chunk(&mut call, slot, first, count)?;
            for i in 0..count {
                self.store.keep(layer, first.after(i), slot.after(i));
            }
            // In the place that has become free.
            if issued < chunks {
                self.read_chunk(ring, layer, place, issued)?;
                issued += 1;
            } else if next == Some(ring) && issued_next < chunks {
                self.read_chunk(ring, layer + 1, next_place, issued_next)?;
                issued_next += 1;
            }
        }
        // So that the disk works while attention is computed.
        if let Some(next) = next {
            let place = if next == ring { next_place } else { 0 };
            while issued_next < next.chunks().min(next.places) {
                self.read_chunk(next, layer + 1, place, issued_next)?;
                issued_next += 1;
            }
            self.turn = Turn::Streaming { layer: layer + 1, place, issued: issued_next };
        }
        Ok(())
    }

    /// Checks and computes a chunk that has arrived.
    fn compute_chunk(&self, call: &mut FfnCall<'_, '_>, slot: ArenaSlot, first: GroupId, count: u32) -> Result<()> {
        let bytes = self.store.ring_bytes(slot, count).expect("it has arrived");
        let params = &self.params[call.layer];
        if let Some(checks) = &self.checks {
            checks.contiguous(call.threads, call.layer, first, bytes)?;
        }
        let records = self.layout.records_per_group();
        let start = first.index() * records;
        let end = (start + count as usize * records).min(self.ffn.size);
        let block = NeuronBlock::new(&self.records, bytes, params.scales(), start..end);
        let selection = self.predictors.is_some().then_some(&self.selection);
        let mut call = FfnCall {
            selection,
            hook: call.hook.as_deref_mut(),
            output: &mut *call.output,
            scratch: &mut *call.scratch,
            ..*call
        };
        dense(&self.ffn, &mut call, params, block)
    }

    /// Chooses the neurons of every token, and tells the cache what the last ones want.
    fn select(&mut self, call: &mut FfnCall<'_, '_>) {
        let (layer, tokens) = (call.layer, call.inputs.tokens);
        let records = self.layout.records_per_group() as u32;
        let Self { predictors, selection, store, scratch, ffn, layout, .. } = self;
        let DecodeScratch { scores, ahead, .. } = scratch;
        let warms = |token: usize| token + WARM_TOKENS >= tokens;
        match predictors {
            Some(predictors) => {
                selection.reset(tokens, ffn.size);
                let room = (&mut scores[..], call.scratch.matmul());
                predictors[layer].own.score_each(call.threads, call.inputs, room, &mut |token, scores| {
                    selection.select_positive(token, scores);
                    if warms(token) {
                        groups_of(scores, 0.0, records, ahead);
                        store.warm(layer, ahead);
                    }
                });
            }
            None => {
                ahead.clear();
                ahead.extend((0..layout.groups() as u32).map(GroupId));
                (0..tokens).filter(|token| warms(*token)).for_each(|_| store.warm(layer, ahead));
            }
        }
    }
}
