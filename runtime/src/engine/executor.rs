//! A step: rows in, logits out.

mod saved;

use std::sync::Arc;

use flashlm_formats::model::ModelSpec;
use flashlm_kernels::Threads;

use super::blocks::{Blocks, KV_BLOCK};
use super::limits::{check_context, check_ids};
use super::room::{Room, Working, parts};
use crate::buffers::Buffers;
use crate::disk_cost::ReadCost;
use crate::error::{Result, RuntimeError};
use crate::forward::attention::{Batch, TokenPlace};
use crate::forward::block::Pass;
use crate::forward::embed::Embedding;
use crate::forward::head::Head;
use crate::forward::kv::{KvMemory, SequencePlaces};
use crate::forward::positions::PositionTables;
use crate::forward::tables::TableSource;
use crate::forward::weights::ModelWeights;
use crate::neurons::counters::ReadCounters;
use crate::neurons::hook::FfnHook;
use crate::neurons::source::{Arithmetic, FfnSource};

/// A sequence of an [`Executor`]. Once it is closed, its id never stands for another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SequenceId {
    /// Its place among the sequences, which another one may have later.
    at: usize,
    /// Which of all that were ever opened.
    number: u64,
}

/// What a row is for. It decides how the row is computed, so that its bits depend on nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// A token of a prompt: those of one sequence that follow each other in a step are one piece, and meet the weights in matrix
    /// products.
    Prompt,
    /// A token that is decoded, or a draft that is verified: computed as if it were alone.
    Decode,
}

/// One token of a step. Its position is the next one of its sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Of which sequence.
    pub sequence: SequenceId,
    /// The token.
    pub token: u32,
    /// What for.
    pub work: Work,
    /// Whether its logits are to be computed.
    pub wants_logits: bool,
}

impl Row {
    /// A token that is decoded, and asked what comes after it.
    pub fn decode(sequence: SequenceId, token: u32) -> Self {
        Self { sequence, token, work: Work::Decode, wants_logits: true }
    }
}

struct Sequence {
    number: u64,
    blocks: Vec<usize>,
    /// Tokens fed.
    len: usize,
    /// Tokens it may have.
    context: usize,
}

/// A model and all that computing needs: runs steps of rows of its sequences.
pub struct Executor {
    spec: ModelSpec,
    weights: ModelWeights,
    ffn: Box<dyn FfnSource>,
    /// Rows of the vocabulary's matrices that are not among the weights.
    tables: Option<Box<dyn TableSource>>,
    threads: Arc<Threads>,
    room: Room,
    positions: PositionTables,
    kv: KvMemory,
    blocks: Blocks,
    /// By `SequenceId::at`; closed ones are `None`, and have no places.
    sequences: Vec<Option<Sequence>>,
    places: Vec<SequencePlaces>,
    /// Sequences opened so far.
    opened: u64,
    working: Working,
    last_logits: usize,
}

impl Executor {
    /// A model with room for sequences.
    pub fn new(
        spec: ModelSpec,
        weights: ModelWeights,
        ffn: Box<dyn FfnSource>,
        threads: impl Into<Arc<Threads>>,
        room: Room,
    ) -> Result<Self> {
        check_context(&spec, room.context)?;
        Ok(Self {
            positions: PositionTables::new(&mut Buffers::default(), &spec, room.context),
            kv: KvMemory::new(spec.attention(), spec.layers.len(), room.blocks() * KV_BLOCK, room.kv)?,
            blocks: Blocks::new(room.blocks()),
            sequences: Vec::new(),
            places: Vec::new(),
            opened: 0,
            working: Working::new(&mut Buffers::default(), &spec, &room),
            last_logits: 0,
            tables: None,
            room,
            spec,
            weights,
            ffn,
            threads: threads.into(),
        })
    }

    /// The same with a source of those rows of the vocabulary's matrices that are not among the weights.
    pub fn with_tables(mut self, tables: Option<Box<dyn TableSource>>) -> Self {
        self.tables = tables;
        self
    }

    /// The architecture.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Tokens that a sequence may have.
    pub fn context(&self) -> usize {
        self.room.context
    }

    /// Rows that are decoded together, at most.
    pub fn batch(&self) -> usize {
        self.room.batch()
    }

    /// A new sequence of up to `context` tokens: memory for all of them is taken now.
    ///
    /// # Errors
    /// `ContextOutOfRange` and `ContextFull` where the model, or this executor, has no such contexts; `NoRoomForSequence` where other
    /// sequences have the memory.
    pub fn open(&mut self, context: usize) -> Result<SequenceId> {
        check_context(&self.spec, context)?;
        if context > self.room.context {
            let model_max = self.spec.max_positions;
            return Err(RuntimeError::ContextFull { wanted: context, context: self.room.context, model_max });
        }
        let free = self.blocks.free_tokens();
        let blocks = self.blocks.take(context).ok_or(RuntimeError::NoRoomForSequence { wanted: context, free })?;
        let places = Blocks::places(&blocks);
        self.opened += 1;
        let number = self.opened;
        let sequence = Some(Sequence { number, blocks, len: 0, context });
        let at = self.sequences.iter().position(Option::is_none).unwrap_or(self.sequences.len());
        if at == self.sequences.len() {
            self.sequences.push(sequence);
            self.places.push(places);
        } else {
            (self.sequences[at], self.places[at]) = (sequence, places);
        }
        Ok(SequenceId { at, number })
    }

    /// Ends a sequence: its memory is free. Closing it again does nothing.
    pub fn close(&mut self, sequence: SequenceId) {
        if let Some(opened) = self.opened_mut(sequence) {
            let blocks = std::mem::take(&mut opened.blocks);
            self.sequences[sequence.at] = None;
            self.places[sequence.at] = SequencePlaces::default();
            self.blocks.give_back(blocks);
        }
    }

    fn opened_mut(&mut self, id: SequenceId) -> Option<&mut Sequence> {
        self.sequences.get_mut(id.at)?.as_mut().filter(|sequence| sequence.number == id.number)
    }

    fn opened(&self, id: SequenceId) -> Option<&Sequence> {
        self.sequences.get(id.at)?.as_ref().filter(|sequence| sequence.number == id.number)
    }

    /// Tokens fed to a sequence; none to one that was closed.
    pub fn len(&self, sequence: SequenceId) -> usize {
        self.opened(sequence).map_or(0, |sequence| sequence.len)
    }

    /// Forgets the tokens of a sequence from `len` on.
    pub fn truncate(&mut self, sequence: SequenceId, len: usize) {
        if let Some(sequence) = self.opened_mut(sequence) {
            sequence.len = sequence.len.min(len);
        }
    }

    /// What has been read from flash so far.
    pub fn read_counters(&self) -> ReadCounters {
        let tables = self.tables.as_ref().map_or_else(ReadCounters::default, |tables| tables.read_counters());
        self.ffn.read_counters().and(tables)
    }

    /// What reads are seen to cost, where plans follow that.
    pub fn read_cost(&self) -> Option<ReadCost> {
        self.ffn.read_cost()
    }

    /// How often reads of each size, in bytes, were asked for so far.
    pub fn read_sizes(&self) -> Vec<(u64, u64)> {
        self.ffn.read_sizes()
    }

    /// The logits that were computed last, `[vocab]`.
    pub fn last_logits(&mut self) -> &mut [f32] {
        self.working.head.logits_mut(self.last_logits)
    }

    /// Computes `rows`, in their order: any mix of pieces of prompts and rows that are decoded, of any sequences. `each` is given the
    /// logits of the rows that want them, with the row's place in `rows`.
    ///
    /// What a row's logits are depends on the tokens of its sequence and on what it is for, not on the rows beside it. After an error
    /// the rows that `each` was not given may or may not have been fed; truncate their sequences.
    pub fn step(&mut self, rows: &[Row], each: &mut dyn FnMut(usize, &mut [f32]) -> Result<()>) -> Result<()> {
        self.step_observed(rows, None, each)
    }

    /// As [`Executor::step`]; `hook` sees what goes through the FFN of every block.
    pub fn step_observed(
        &mut self,
        rows: &[Row],
        mut hook: Option<&mut dyn FfnHook>,
        each: &mut dyn FnMut(usize, &mut [f32]) -> Result<()>,
    ) -> Result<()> {
        self.check(rows)?;
        let mut at = 0;
        while let Some(first) = rows.get(at) {
            let belongs = |row: &&Row| match first.work {
                Work::Prompt => row.work == Work::Prompt && row.sequence == first.sequence,
                Work::Decode => row.work == Work::Decode,
            };
            let count = rows[at..].iter().take_while(belongs).count();
            match first.work {
                Work::Prompt => {
                    for part in parts(count, self.room.scratch()) {
                        let part = at + part.start..at + part.end;
                        let arithmetic = Arithmetic::of_piece(part.len());
                        self.together(&rows[part.clone()], part.start, arithmetic, &mut hook, each)?;
                    }
                }
                Work::Decode => {
                    let batch = self.room.batch();
                    for (chunk, rows) in rows[at..at + count].chunks(batch).enumerate() {
                        self.together(rows, at + chunk * batch, Arithmetic::Each, &mut hook, each)?;
                    }
                }
            }
            at += count;
        }
        Ok(())
    }

    fn check(&self, rows: &[Row]) -> Result<()> {
        if rows.is_empty() {
            return Err(RuntimeError::EmptyPrompt);
        }
        for (at, row) in rows.iter().enumerate() {
            check_ids(&self.spec, &[row.token])?;
            let Some(sequence) = self.opened(row.sequence) else {
                return Err(RuntimeError::ClosedSequence);
            };
            let is_last = rows.get(at + 1).is_none_or(|next| next.sequence != row.sequence);
            // Once for each run of rows of a sequence; a batch has few.
            if is_last {
                let of_sequence = rows[..=at].iter().filter(|other| other.sequence == row.sequence).count();
                let (wanted, context) = (sequence.len + of_sequence, sequence.context);
                if wanted > context {
                    let model_max = self.spec.max_positions;
                    return Err(RuntimeError::ContextFull { wanted, context, model_max });
                }
            }
        }
        Ok(())
    }

    /// Runs rows through all blocks together; `first` is the place of the first one in the step.
    fn together(
        &mut self,
        rows: &[Row],
        first: usize,
        arithmetic: Arithmetic,
        hook: &mut Option<&mut dyn FfnHook>,
        each: &mut dyn FnMut(usize, &mut [f32]) -> Result<()>,
    ) -> Result<()> {
        let hidden = self.spec.hidden_size;
        self.working.tokens.clear();
        for row in rows {
            let sequence = row.sequence.at;
            let fed = self.sequences[sequence].as_mut().expect("checked");
            // Until the blocks are through, rows are counted here.
            self.working.tokens.push(TokenPlace { sequence, position: fed.len });
            fed.len += 1;
        }
        let result = self.blocks_of(rows, arithmetic, hook);
        if result.is_err() {
            for token in &self.working.tokens {
                let fed = self.sequences[token.sequence].as_mut().expect("checked");
                fed.len = fed.len.min(token.position);
            }
            return result;
        }
        let batch = self.room.batch();
        let mut next = 0;
        loop {
            self.working.wanting.clear();
            while next < rows.len() && self.working.wanting.len() < batch {
                if rows[next].wants_logits {
                    let to = self.working.wanting.len() * hidden;
                    self.working.wanting_states[to..to + hidden]
                        .copy_from_slice(&self.working.states[next * hidden..][..hidden]);
                    self.working.wanting.push(next);
                }
                next += 1;
            }
            if self.working.wanting.is_empty() {
                return Ok(());
            }
            let head = Head { spec: &self.spec, weights: &self.weights.outer, threads: &self.threads };
            let (tokens, wanting) = (&self.working.tokens, &self.working.wanting);
            let position = |i: usize| tokens[wanting[i]].position + 1;
            let states = &self.working.wanting_states[..wanting.len() * hidden];
            head.logits_of_each(states, &position, &mut self.working.head, self.tables.as_deref_mut())?;
            for (i, row) in self.working.wanting.iter().enumerate() {
                self.last_logits = i;
                each(first + row, self.working.head.logits_mut(i))?;
            }
        }
    }

    /// Embeds the rows, whose places are in `tokens`, and runs their states through all blocks.
    fn blocks_of(&mut self, rows: &[Row], arithmetic: Arithmetic, hook: &mut Option<&mut dyn FfnHook>) -> Result<()> {
        let hidden = self.spec.hidden_size;
        let states = &mut self.working.states[..rows.len() * hidden];
        let embedding = Embedding { spec: &self.spec, weights: &self.weights.outer, threads: &self.threads };
        for ((row, token), state) in rows.iter().zip(&self.working.tokens).zip(states.chunks_exact_mut(hidden)) {
            let tables = self.tables.as_deref_mut().map(|tables| tables as &mut dyn TableSource);
            embedding.token(row.token, token.position, state, &mut self.working.embed, tables)?;
        }
        let batch = Batch { tokens: &self.working.tokens, sequences: &self.places, arithmetic };
        for (layer, weights) in self.weights.layers.iter().enumerate() {
            let mut pass = Pass {
                spec: &self.spec,
                threads: &self.threads,
                positions: &self.positions,
                batch: &batch,
                kv: &mut self.kv,
                ffn: &mut *self.ffn,
                scratch: &mut self.working.block,
                hook: hook.as_deref_mut(),
            };
            pass.run(weights, layer, states)?;
        }
        Ok(())
    }
}
