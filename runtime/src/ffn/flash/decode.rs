//! One token through one layer.

use std::ops::Range;
use std::time::Instant;

use flashlm_formats::bundle::FlashLayout;
use flashlm_formats::model::Ffn;
use flashlm_kernels::{Element, Threads};

use super::FlashFfn;
use super::store::{Store, Wanted};
use crate::error::Result;
use crate::ffn::checks::GroupChecks;
use crate::model::chosen::Chosen;
use crate::model::ffn::{FfnBiases, FfnCall, Records};
use crate::model::weights::element;

/// Reads waited for at a time, at most: enough to make computing them worth while, few enough to begin soon.
const BATCH_READS_MAX: usize = 32;

/// Lists that are made anew for every token.
pub(super) struct DecodeScratch {
    pub(super) scores: Vec<f32>,
    /// Chosen neurons, as storage positions, ascending.
    neurons: Vec<u32>,
    /// Their groups, ascending, each once; and for each group where its neurons begin in `neurons`.
    wanted: Vec<Wanted>,
    first_neuron: Vec<u32>,
    /// Place in `wanted` of each neuron's group.
    group_of: Vec<u32>,
    /// What enters the down projection's sum, for each neuron.
    activations: Vec<f32>,
    /// Groups, as places in `wanted`, whose bytes have not arrived, and those that just have.
    pending: Vec<u32>,
    arrived: Vec<u32>,
    /// Neurons, as places in `neurons`, to compute now, and their results.
    ready: Vec<u32>,
    results: Vec<f32>,
    /// Groups that the next layer, or a token of a prompt, will want.
    pub(super) ahead: Vec<u32>,
}

impl DecodeScratch {
    pub(super) fn new(ffn: &Ffn, layout: &FlashLayout) -> Self {
        let (neurons, groups) = (ffn.size, layout.groups());
        Self {
            scores: vec![0.0; neurons],
            neurons: Vec::with_capacity(neurons),
            wanted: Vec::with_capacity(groups),
            first_neuron: Vec::with_capacity(groups + 1),
            group_of: Vec::with_capacity(neurons),
            activations: vec![0.0; neurons],
            pending: Vec::with_capacity(groups),
            arrived: Vec::with_capacity(groups),
            ready: Vec::with_capacity(neurons),
            results: vec![0.0; neurons],
            ahead: Vec::with_capacity(groups),
        }
    }

    /// Takes the neurons with a score above zero.
    fn choose(&mut self, records_per_group: u32) {
        self.neurons.clear();
        self.neurons.extend(self.scores.iter().enumerate().filter(|(_, s)| **s > 0.0).map(|(n, _)| n as u32));
        self.wanted.clear();
        self.first_neuron.clear();
        self.group_of.clear();
        for (at, neuron) in self.neurons.iter().enumerate() {
            let group = neuron / records_per_group;
            if self.wanted.last().is_none_or(|last| last.group != group) {
                self.wanted.push(Wanted { group, slot: super::store::NONE });
                self.first_neuron.push(at as u32);
            }
            self.group_of.push(self.wanted.len() as u32 - 1);
        }
        self.first_neuron.push(self.neurons.len() as u32);
    }
}

/// What says which groups a layer will probably want.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Foresight {
    /// The layer's own predictor, on an input that is not quite its own.
    Own,
    /// A predictor of the layer's neurons that was trained on the input of the layer before it.
    Trained,
}

/// The groups of the neurons with a score above `margin`, ascending.
pub(super) fn groups_of(scores: &[f32], margin: f32, records_per_group: u32, groups: &mut Vec<u32>) {
    groups.clear();
    for (neuron, _) in scores.iter().enumerate().filter(|(_, score)| **score > margin) {
        let group = neuron as u32 / records_per_group;
        if groups.last() != Some(&group) {
            groups.push(group);
        }
    }
}

impl FlashFfn {
    /// Chooses the neurons of `layer` and starts reading those that are not in memory; `ahead`: those of the next layer, too.
    pub(super) fn start(&mut self, layer: usize, input: &[f32], threads: &Threads, ahead: bool) -> Result<()> {
        if let Some(foreseen) = self.foreseen.take() {
            self.read_ahead(foreseen)?;
        }
        let scratch = &mut self.scratch;
        match &mut self.predictors {
            Some(predictors) => {
                let own = &mut predictors[layer].own;
                own.scores(threads, input, &mut scratch.scores);
                self.touched_bytes += own.bytes();
            }
            None => scratch.scores.fill(1.0),
        }
        let begin = Instant::now();
        scratch.choose(self.layout.records_per_group() as u32);
        if self.begun_ahead != Some(layer) {
            self.store.begin(layer);
        }
        self.begun_ahead = None;
        self.store.look_up(layer, &mut scratch.wanted)?;
        self.manage_ns += begin.elapsed().as_nanos() as u64;
        let by = match &self.predictors {
            Some(predictors) if ahead && layer + 1 < predictors.len() => match &predictors[layer].ahead {
                Some(_) => Foresight::Trained,
                None if self.parallel => Foresight::Own,
                // Foreseen while attention runs.
                None => return Ok(()),
            },
            _ => return Ok(()),
        };
        if self.foresight(layer + 1, by, input, threads) { self.read_ahead(layer + 1) } else { Ok(()) }
    }

    /// Scores what `layer` will probably want, going by an input that is about its own. False where nothing can be said.
    pub(super) fn foresight(&mut self, layer: usize, by: Foresight, input: &[f32], threads: &Threads) -> bool {
        let (Some(predictors), true) = (&mut self.predictors, self.look_ahead) else { return false };
        let predictor = match by {
            Foresight::Own => predictors.get_mut(layer).map(|own| &mut own.own),
            Foresight::Trained => predictors[layer - 1].ahead.as_mut(),
        };
        let Some(predictor) = predictor else { return false };
        predictor.scores(threads, input, &mut self.scratch.scores);
        self.touched_bytes += predictor.bytes();
        true
    }

    /// Starts reading what `layer` will want by the scores of its foresight.
    pub(super) fn read_ahead(&mut self, layer: usize) -> Result<()> {
        let begin = Instant::now();
        let DecodeScratch { scores, ahead, .. } = &mut self.scratch;
        groups_of(scores, self.store.ahead_margin(layer), self.layout.records_per_group() as u32, ahead);
        if self.begun_ahead != Some(layer) {
            self.store.begin(layer);
            self.begun_ahead = Some(layer);
        }
        self.store.read_ahead(layer, ahead)?;
        self.manage_ns += begin.elapsed().as_nanos() as u64;
        Ok(())
    }

    /// Computes one token, whose input and output stand at `range` of the call's; `ahead`: the next layer is this token's.
    pub(super) fn decode(&mut self, call: &mut FfnCall<'_>, range: Range<usize>, ahead: bool) -> Result<()> {
        let (layer, threads) = (call.layer, call.threads);
        let input = &call.input[range.clone()];
        if self.started.take() != Some(layer) {
            self.start(layer, input, threads, ahead)?;
        }
        let records = self.records;
        let mut token = Token {
            ffn: &self.ffn,
            element: element(self.records.format),
            records,
            threads,
            layer,
            input,
            biases: call.biases,
            scales: call.scales,
            store: &mut self.store,
            checks: self.checks.as_ref(),
            scratch: &mut self.scratch,
        };
        let output = &mut call.output[range];
        let mut touched = 0;
        let mut first = 0;
        loop {
            let rest = &token.scratch.wanted[first..];
            let end = first + rest.iter().position(|w| w.slot == super::store::NONE).unwrap_or(rest.len());
            token.activations(first..end)?;
            touched += token.add_down(first..end, output);
            if end == token.scratch.wanted.len() {
                break;
            }
            if first == end {
                // Every place is still being read to, in vain.
                token.store.wait(1)?;
            }
            first = end;
            token.store.read_more(layer, &mut token.scratch.wanted[first..])?;
        }
        self.touched_bytes += touched * (records.layout.row_bytes() + records.scale_bytes()) as u64;
        Ok(())
    }
}

/// A token's way through a layer whose neurons are chosen.
struct Token<'a> {
    ffn: &'a Ffn,
    element: Element,
    records: Records,
    threads: &'a Threads,
    layer: usize,
    input: &'a [f32],
    biases: FfnBiases<'a>,
    scales: &'a [u8],
    store: &'a mut Store,
    checks: Option<&'a GroupChecks>,
    scratch: &'a mut DecodeScratch,
}

impl Token<'_> {
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

    /// Holds what has arrived against its checksums, once.
    fn check(&mut self) -> Result<()> {
        let DecodeScratch { arrived, wanted, ready, .. } = &mut *self.scratch;
        let Some(checks) = self.checks else { return Ok(()) };
        ready.clear();
        ready.extend(arrived.iter().filter(|g| self.store.is_unchecked(wanted[**g as usize].slot)));
        let store = self.store.arrived();
        let checked = checks.each(self.threads, self.layer, ready.len(), &|i| {
            let entry = wanted[ready[i] as usize];
            (entry.group as usize, store.bytes(entry).expect("it has arrived"))
        });
        if checked.is_err() {
            // What the disk gives next time may be whole.
            self.store.forget_all();
            return checked;
        }
        ready.iter().for_each(|g| self.store.set_checked(wanted[*g as usize].slot));
        Ok(())
    }

    /// Computes the neurons of the groups that have arrived.
    fn compute_arrived(&mut self) {
        let DecodeScratch { neurons, wanted, first_neuron, group_of, activations, arrived, ready, results, .. } =
            &mut *self.scratch;
        ready.clear();
        for &g in arrived.iter() {
            ready.extend(first_neuron[g as usize]..first_neuron[g as usize + 1]);
        }
        let (records, scales, store) = (self.records, self.scales, self.store.arrived());
        let row = |at: usize, vector: usize| {
            let group = store.bytes(wanted[group_of[at] as usize]).expect("it has arrived");
            records.row(group, scales, neurons[at] as usize, vector)
        };
        let Self { ffn, element, threads, biases, input, .. } = *self;
        Chosen { ffn, element, threads, biases, input, neurons, row: &row }.activations(ready, results, activations);
    }

    /// Adds the neurons of these of the wanted groups to `output`, in storage order; returns how many rows they all touched.
    fn add_down(&mut self, groups: Range<usize>, output: &mut [f32]) -> u64 {
        let DecodeScratch { neurons, wanted, first_neuron, group_of, activations, ready, results, .. } =
            &mut *self.scratch;
        let places = first_neuron[groups.start]..first_neuron[groups.end];
        let chosen = places.len() as u64;
        let (records, scales, store) = (self.records, self.scales, self.store.arrived());
        let row = |at: usize, vector: usize| {
            let group = store.bytes(wanted[group_of[at] as usize]).expect("it was computed");
            records.row(group, scales, neurons[at] as usize, vector)
        };
        let Self { ffn, element, threads, biases, input, .. } = *self;
        let neurons = Chosen { ffn, element, threads, biases, input, neurons, row: &row };
        let added = neurons.add_down(places, activations, ready, results, output);
        // Gated: of the shut ones the gate alone was looked at.
        chosen + added as u64 * (1 + u64::from(self.ffn.gated))
    }
}
