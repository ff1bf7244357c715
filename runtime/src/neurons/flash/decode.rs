//! A few tokens through one layer: each chooses its neurons, and what any of them misses is read once for all.

use std::ops::Range;
use std::time::Instant;

use flashlm_formats::bundle::FlashLayout;
use flashlm_formats::ids::{GroupId, Position};
use flashlm_formats::model::Ffn;
use flashlm_kernels::{Element, Threads, above};

use super::FlashFfn;
use super::store::{NO_SLOT, Store, Wanted};
use super::turn::Turn;
use crate::buffers::Buffers;
use crate::error::Result;
use crate::neurons::checks::GroupChecks;
use crate::neurons::chosen::{Chosen, ChosenScratch};
use crate::neurons::params::NeuronParams;
use crate::neurons::predictor::SCORED_TOGETHER;
use crate::neurons::records::Records;
use crate::neurons::selection::{Selection, ones};
use crate::neurons::source::{FfnCall, Inputs};
use crate::tensors::element;

/// Reads waited for at a time, at most: enough to make computing them worthwhile, few enough to begin soon.
const BATCH_READS_MAX: usize = 32;

/// Lists that are made again for every step.
pub(super) struct DecodeScratch {
    /// `[tokens, neurons]`, of rows decoded together and of some of a prompt.
    pub(super) scores: Vec<f32>,
    selection: Selection,
    chosen: ChosenScratch,
    /// The groups of the chosen neurons, ascending, each once; and for each where its neurons begin among them.
    wanted: Vec<Wanted>,
    first_neuron: Vec<u32>,
    /// Place in `wanted` of each chosen neuron's group.
    group_of: Vec<u32>,
    /// Groups, as places in `wanted`, whose bytes have not arrived, and those that just have.
    pending: Vec<u32>,
    arrived: Vec<u32>,
    /// Those of the arrived ones that are to be checked.
    unchecked: Vec<u32>,
    /// Groups that the next layer, or a token of a prompt, will want.
    pub(super) ahead: Vec<GroupId>,
}

impl DecodeScratch {
    /// Room for `batch` tokens at a time.
    pub(super) fn new(buffers: &mut Buffers, layout: &FlashLayout, batch: usize) -> Self {
        let (neurons, groups) = (layout.neurons(), layout.groups());
        Self {
            scores: buffers.zeros(batch.max(SCORED_TOGETHER) * neurons),
            selection: Selection::new(buffers, batch, neurons),
            chosen: ChosenScratch::new(buffers, neurons, batch * neurons),
            wanted: buffers.room(groups),
            first_neuron: buffers.room(groups + 1),
            group_of: buffers.room(neurons),
            pending: buffers.room(groups),
            arrived: buffers.room(groups),
            unchecked: buffers.room(groups),
            ahead: buffers.room(groups),
        }
    }

    /// Takes the neurons of `tokens` tokens with a score above zero.
    fn choose(&mut self, tokens: usize, neurons: usize, records_per_group: u32) {
        self.selection.reset(tokens, neurons);
        let scores = self.scores.chunks_exact(neurons).take(tokens);
        scores.enumerate().for_each(|(token, scores)| self.selection.select_positive(token, scores));
        self.chosen.choice.take(&self.selection, 0..tokens, 0..neurons);
        self.wanted.clear();
        self.first_neuron.clear();
        self.group_of.clear();
        for (at, neuron) in self.chosen.choice.neurons.iter().enumerate() {
            let group = neuron.group(records_per_group);
            if self.wanted.last().is_none_or(|last| last.group != group) {
                self.wanted.push(Wanted { group, slot: NO_SLOT });
                self.first_neuron.push(at as u32);
            }
            self.group_of.push(self.wanted.len() as u32 - 1);
        }
        self.first_neuron.push(self.chosen.choice.neurons.len() as u32);
    }

    /// The largest score of each neuron over `tokens` tokens, in place of the first token's.
    fn merge_scores(&mut self, tokens: usize, neurons: usize) {
        let (first, others) = self.scores.split_at_mut(neurons);
        for scores in others.chunks_exact(neurons).take(tokens.saturating_sub(1)) {
            first.iter_mut().zip(scores).for_each(|(first, score)| *first = first.max(*score));
        }
    }
}

/// Which predictor says what groups a layer will probably need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AheadPredictor {
    /// The layer's own predictor, on an input that is not quite its own.
    Own,
    /// A predictor of the layer's neurons that was trained on the input of the layer before it.
    Trained,
}

/// The groups of the neurons with a score above `margin`, ascending.
pub(super) fn groups_of(scores: &[f32], margin: f32, records_per_group: u32, groups: &mut Vec<GroupId>) {
    const WORDS: usize = 16;
    groups.clear();
    for (part, scores) in scores.chunks(WORDS * 64).enumerate() {
        let bits = &mut [0; WORDS][..scores.len().div_ceil(64)];
        above(scores, margin, bits);
        for (at, word) in bits.iter().enumerate() {
            ones(*word, part * WORDS + at, |neuron| {
                let group = neuron.group(records_per_group);
                if groups.last() != Some(&group) {
                    groups.push(group);
                }
            });
        }
    }
}

impl FlashFfn {
    /// Chooses the neurons of `layer` and starts reading those that are not in memory; `ahead`: those of the next layer, too.
    pub(super) fn start(&mut self, layer: usize, inputs: Inputs<'_>, threads: &Threads, ahead: bool) -> Result<()> {
        self.read_predicted()?;
        let (scratch, neurons) = (&mut self.scratch, self.ffn.size);
        match &mut self.predictors {
            Some(predictors) => {
                let own = &mut predictors[layer].own;
                own.scores_of_each(threads, inputs.values, inputs.tokens, &mut scratch.scores);
                self.touched_bytes += own.bytes();
            }
            None => scratch.scores[..inputs.tokens * neurons].fill(1.0),
        }
        let begin = Instant::now();
        scratch.choose(inputs.tokens, neurons, self.layout.records_per_group() as u32);
        self.row_neurons += scratch.chosen.choice.len() as u64;
        self.step_neurons += scratch.chosen.choice.neurons.len() as u64;
        if !self.turn.has_begun(layer) {
            self.store.begin(layer);
        }
        self.store.look_up(layer, &mut scratch.wanted)?;
        self.turn = Turn::Chosen { layer, next_begun: false };
        self.planning_ns += begin.elapsed().as_nanos() as u64;
        let by = match &self.predictors {
            Some(predictors) if ahead && layer + 1 < predictors.len() => match &predictors[layer].ahead {
                Some(_) => AheadPredictor::Trained,
                None if self.parallel[layer + 1] => AheadPredictor::Own,
                // Predicted while attention runs.
                None => return Ok(()),
            },
            _ => return Ok(()),
        };
        if self.score_ahead(layer + 1, by, inputs, threads) {
            self.read_ahead(layer + 1)?;
            self.turn = Turn::Chosen { layer, next_begun: true };
        }
        Ok(())
    }

    /// Scores ahead of time what `layer` will probably need, from inputs close to its own. False if nothing can be predicted.
    pub(super) fn score_ahead(
        &mut self,
        layer: usize,
        by: AheadPredictor,
        inputs: Inputs<'_>,
        threads: &Threads,
    ) -> bool {
        let (Some(predictors), true) = (&mut self.predictors, self.look_ahead) else { return false };
        let predictor = match by {
            AheadPredictor::Own => predictors.get_mut(layer).map(|own| &mut own.own),
            AheadPredictor::Trained => predictors[layer - 1].ahead.as_mut(),
        };
        let Some(predictor) = predictor else { return false };
        predictor.scores_of_each(threads, inputs.values, inputs.tokens, &mut self.scratch.scores);
        self.scratch.merge_scores(inputs.tokens, self.ffn.size);
        self.touched_bytes += predictor.bytes();
        true
    }

    /// Starts reading what was predicted, if anything was.
    pub(super) fn read_predicted(&mut self) -> Result<bool> {
        let Turn::Predicted { layer, .. } = self.turn else { return Ok(false) };
        self.read_ahead(layer)?;
        self.turn = Turn::ReadingAhead { layer };
        Ok(true)
    }

    /// Starts reading what `layer` will need by its predicted scores.
    fn read_ahead(&mut self, layer: usize) -> Result<()> {
        let begin = Instant::now();
        let DecodeScratch { scores, ahead, .. } = &mut self.scratch;
        let (scores, margin) = (&scores[..self.ffn.size], self.store.ahead_margin(layer));
        groups_of(scores, margin, self.layout.records_per_group() as u32, ahead);
        if !self.turn.has_begun(layer) {
            self.store.begin(layer);
        }
        self.store.read_ahead(layer, ahead)?;
        self.planning_ns += begin.elapsed().as_nanos() as u64;
        Ok(())
    }

    /// Computes the tokens at `range` of the call's, no more than there is scratch for; `ahead`: the next layer is theirs.
    pub(super) fn decode(&mut self, call: &mut FfnCall<'_, '_>, range: Range<usize>, ahead: bool) -> Result<()> {
        let (layer, threads, hidden) = (call.layer, call.threads, call.inputs.hidden());
        let span = range.start * hidden..range.end * hidden;
        let inputs = Inputs { values: &call.inputs.values[span.clone()], tokens: range.len(), ..call.inputs };
        if !matches!(self.turn, Turn::Chosen { layer: chosen, .. } if chosen == layer) {
            self.start(layer, inputs, threads, ahead)?;
        }
        self.turn = self.turn.behind();
        let records = self.records;
        let mut few = FewTokens {
            ffn: &self.ffn,
            element: element(self.records.format),
            records,
            threads,
            layer,
            inputs,
            params: &self.params[layer],
            store: &mut self.store,
            checks: self.checks.as_ref(),
            scratch: &mut self.scratch,
        };
        let output = &mut call.output[span];
        let mut touched = 0;
        let mut first = 0;
        loop {
            let rest = &few.scratch.wanted[first..];
            let end = first + rest.iter().position(|w| w.slot == NO_SLOT).unwrap_or(rest.len());
            few.activations(first..end)?;
            touched += few.add_down(first..end, output);
            if end == few.scratch.wanted.len() {
                break;
            }
            if first == end {
                // Every place is still being read to, for what nobody wants now.
                few.store.wait(1)?;
            }
            first = end;
            few.store.read_more(layer, &mut few.scratch.wanted[first..])?;
        }
        self.touched_bytes += touched * (records.layout.row_bytes() + records.scale_bytes()) as u64;
        Ok(())
    }
}

/// The way of a few tokens through a layer whose neurons are chosen.
struct FewTokens<'a> {
    ffn: &'a Ffn,
    element: Element,
    records: Records,
    threads: &'a Threads,
    layer: usize,
    inputs: Inputs<'a>,
    params: &'a NeuronParams,
    store: &'a mut Store,
    checks: Option<&'a GroupChecks>,
    scratch: &'a mut DecodeScratch,
}

impl FewTokens<'_> {
    /// Computes the activations of the neurons in these of the wanted groups, as the groups arrive.
    fn activations(&mut self, groups: Range<usize>) -> Result<()> {
        self.scratch.pending.clear();
        self.scratch.pending.extend(groups.map(|g| g as u32));
        // Once around without waiting: what is in memory is computed while the disk works.
        self.store.wait(0)?;
        loop {
            let DecodeScratch { pending, arrived, wanted, .. } = &mut *self.scratch;
            arrived.clear();
            let store = self.store.arrived();
            pending.retain(|&g| {
                let there = store.bytes(wanted[g as usize]).is_some();
                if there {
                    arrived.push(g);
                }
                !there
            });
            let left = pending.len();
            self.check()?;
            self.compute_arrived();
            if left == 0 {
                return Ok(());
            }
            self.store.wait((left / 4).clamp(1, BATCH_READS_MAX))?;
        }
    }

    /// Verifies what has arrived against its checksums, once.
    fn check(&mut self) -> Result<()> {
        let DecodeScratch { arrived, wanted, unchecked, .. } = &mut *self.scratch;
        let Some(checks) = self.checks else { return Ok(()) };
        unchecked.clear();
        unchecked.extend(arrived.iter().filter(|g| self.store.is_unchecked(wanted[**g as usize].slot)));
        let store = self.store.arrived();
        let checked = checks.each(self.threads, self.layer, unchecked.len(), &|i| {
            let entry = wanted[unchecked[i] as usize];
            (entry.group, store.bytes(entry).expect("it has arrived"))
        });
        if checked.is_err() {
            // What the disk gives next time may be whole.
            self.store.forget_all();
            return checked;
        }
        unchecked.iter().for_each(|g| self.store.set_checked(wanted[*g as usize].slot));
        Ok(())
    }

    /// Computes the neurons of the groups that have arrived.
    fn compute_arrived(&mut self) {
        let DecodeScratch { wanted, first_neuron, group_of, arrived, chosen, .. } = &mut *self.scratch;
        let (choice, ready) = (&chosen.choice, &mut chosen.ready);
        ready.clear();
        for &g in arrived.iter() {
            ready.extend(choice.entries_of(first_neuron[g as usize] as usize..first_neuron[g as usize + 1] as usize));
        }
        let (records, scales, store) = (self.records, self.params.scales(), self.store.arrived());
        let row = |place: usize, neuron: Position, vector: usize| {
            let group = store.bytes(wanted[group_of[place] as usize]).expect("it has arrived");
            records.row(group, scales, neuron, vector)
        };
        let Self { ffn, element, threads, params, inputs, .. } = *self;
        let (biases, input, hidden) = (params.biases(), inputs.values, inputs.hidden());
        Chosen { ffn, element, threads, biases, input, hidden, row: &row }.activations(chosen);
    }

    /// Adds the neurons of these of the wanted groups to `output`, in storage order; returns how many rows they all touched.
    fn add_down(&mut self, groups: Range<usize>, output: &mut [f32]) -> u64 {
        let DecodeScratch { wanted, first_neuron, group_of, chosen, .. } = &mut *self.scratch;
        let places = first_neuron[groups.start] as usize..first_neuron[groups.end] as usize;
        let entries = chosen.choice.entries_of(places);
        let count = entries.len() as u64;
        let (records, scales, store) = (self.records, self.params.scales(), self.store.arrived());
        let row = |place: usize, neuron: Position, vector: usize| {
            let group = store.bytes(wanted[group_of[place] as usize]).expect("it was computed");
            records.row(group, scales, neuron, vector)
        };
        let Self { ffn, element, threads, params, inputs, .. } = *self;
        let (biases, input, hidden) = (params.biases(), inputs.values, inputs.hidden());
        let neurons = Chosen { ffn, element, threads, biases, input, hidden, row: &row };
        let added = neurons.add_down(entries, chosen, output);
        // Gated: of those with a gate of zero the gate alone was looked at.
        count + added as u64 * (1 + u64::from(self.ffn.gated))
    }
}
