//! What has been said on a sequence of an executor, and what was chosen but not said yet.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::engine::{BATCH_MAX, Executor, PIECE_TOKENS, Row, SequenceId, Work, in_pieces};
use crate::error::Result;
use crate::sampler::{Choice, Sampler};
use crate::speculate::{Speculation, SpeculationCounters};

/// A text on a sequence: its ids, and those that one step found ahead of time because they had been guessed.
///
/// Whoever stops in between has said nothing of those: [`Transcript::settle`] takes them back from the sequence and the sampler.
pub struct Transcript {
    sequence: SequenceId,
    /// Tokens that the sequence had before, of which nothing more is known.
    before: usize,
    ids: Vec<u32>,
    /// For each that is fed: whether it was computed in a longer piece of a prompt.
    in_piece: Vec<bool>,
    /// Tokens of a piece of a prompt that a saved session had: the next prompt begins with the rest of that piece.
    begun: usize,
    /// Whether the last of them is still to be fed, as far as anybody was told.
    is_last_unfed: bool,
    /// Chosen by the last step and not said.
    ahead: VecDeque<Choice>,
    /// What each token of the last step took.
    time: Duration,
    speculation: Option<Speculation>,
    counters: SpeculationCounters,
    rows: Vec<Row>,
}

impl Transcript {
    /// An empty text on a sequence of `executor`; with `speculation`, tokens are guessed.
    pub fn new(executor: &Executor, sequence: SequenceId, speculation: Option<Speculation>) -> Self {
        Self {
            sequence,
            before: executor.len(sequence),
            ids: Vec::with_capacity(executor.context() + 1),
            in_piece: Vec::with_capacity(executor.context()),
            begun: 0,
            is_last_unfed: false,
            ahead: VecDeque::with_capacity(BATCH_MAX),
            time: Duration::ZERO,
            speculation,
            counters: SpeculationCounters::default(),
            rows: Vec::with_capacity(BATCH_MAX),
        }
    }

    /// The ids said so far.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The sequence.
    pub fn sequence(&self) -> SequenceId {
        self.sequence
    }

    /// The last id, where it was said and not fed: what comes next begins with it.
    pub fn unfed(&self) -> Option<u32> {
        self.ids.last().copied().filter(|_| self.is_last_unfed)
    }

    /// Tokens of the sequence that belong to what was said.
    pub(crate) fn fed(&self) -> usize {
        self.before + self.ids.len() - usize::from(self.is_last_unfed)
    }

    /// Whether anything guesses.
    pub(crate) fn guesses(&self) -> bool {
        self.speculation.is_some()
    }

    /// Guesses from now on, or no longer.
    pub(crate) fn speculate(&mut self, speculation: Option<Speculation>) {
        self.speculation = speculation;
    }

    /// Takes back what was chosen and not said.
    pub(crate) fn settle(&mut self, executor: &mut Executor, sampler: &mut Sampler) {
        while let Some(choice) = self.ahead.pop_back() {
            sampler.take_back(choice);
        }
        executor.truncate(self.sequence, self.fed());
        self.in_piece.truncate(self.fed() - self.before);
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self, executor: &mut Executor) {
        self.ids.clear();
        self.in_piece.clear();
        self.begun = 0;
        self.ahead.clear();
        self.is_last_unfed = false;
        executor.truncate(self.sequence, self.before);
    }

    /// Forgets all but the first `count` ids.
    pub(crate) fn truncate(&mut self, executor: &mut Executor, sampler: &mut Sampler, count: usize) {
        self.settle(executor, sampler);
        if count >= self.ids.len() {
            return;
        }
        self.ids.truncate(count);
        self.in_piece.truncate(count);
        self.begun = 0;
        self.is_last_unfed = false;
        executor.truncate(self.sequence, self.before + count);
        sampler.see_only(&self.ids);
    }

    /// The rows that say `ids`; the last one's logits are wanted, or all of theirs.
    pub(crate) fn rows_of(&self, ids: &[u32], all: bool) -> Vec<Row> {
        let (sequence, unfed) = (self.sequence, self.unfed());
        let count = ids.len() + usize::from(unfed.is_some());
        let row = |(at, token)| {
            let wants_logits = if all { unfed.is_none() || at > 0 } else { at + 1 == count };
            Row { sequence, token, work: Work::Prompt, wants_logits }
        };
        unfed.into_iter().chain(ids.iter().copied()).enumerate().map(row).collect()
    }

    /// How many of so many rows of a prompt are computed before the others: they end a piece that was begun.
    pub(crate) fn rows_of_begun(&self, rows: usize) -> usize {
        if self.begun == 0 { 0 } else { rows.min(PIECE_TOKENS - self.begun) }
    }

    /// The text is the beginning of a saved session, which the sequence has in memory.
    pub(crate) fn resume(&mut self, ids: &[u32], in_piece: &[bool], sampler: &mut Sampler) {
        self.ids.extend_from_slice(ids);
        self.in_piece.extend_from_slice(in_piece);
        self.is_last_unfed = in_piece.len() < ids.len();
        ids.iter().for_each(|id| sampler.observe(*id));
    }

    /// The next prompt ends a piece of which the text so far has the beginning.
    pub(crate) fn end_piece(&mut self) {
        self.begun = self.in_piece.len() % PIECE_TOKENS;
    }

    /// For each token that is fed: whether it was computed in a longer piece of a prompt.
    pub(crate) fn in_piece(&self) -> &[bool] {
        &self.in_piece
    }

    /// `ids` were said and fed.
    pub(crate) fn said(&mut self, ids: &[u32], sampler: &mut Sampler) {
        let rows = ids.len() + usize::from(self.is_last_unfed);
        let first = self.rows_of_begun(rows);
        self.in_piece.extend(in_pieces(first).chain(in_pieces(rows - first)));
        self.begun = 0;
        self.is_last_unfed = false;
        self.ids.extend_from_slice(ids);
        ids.iter().for_each(|id| sampler.observe(*id));
    }

    /// `id` was said, and nobody asked what comes after it.
    pub(super) fn say(&mut self, id: u32) {
        self.ids.push(id);
        self.is_last_unfed = true;
    }

    /// The next token after what was said, with what it took. `most` tokens may still come; `ends` those after which none does.
    pub(super) fn next(
        &mut self,
        executor: &mut Executor,
        sampler: &mut Sampler,
        most: usize,
        ends: &dyn Fn(u32) -> bool,
    ) -> Result<(u32, Duration)> {
        if self.ahead.is_empty() {
            self.step(executor, sampler, most, ends)?;
        }
        let id = self.ahead.pop_front().expect("a step chooses one token at least").id;
        self.is_last_unfed = false;
        Ok((id, self.time))
    }

    fn step(
        &mut self,
        executor: &mut Executor,
        sampler: &mut Sampler,
        most: usize,
        ends: &dyn Fn(u32) -> bool,
    ) -> Result<()> {
        let begin = Instant::now();
        let (sequence, fed) = (self.sequence, self.fed());
        let Self { ids, ahead, rows, speculation, .. } = self;
        let room = executor.batch().min(executor.context() - fed).min(most).saturating_sub(1);
        let drafted: &[u32] = match speculation {
            Some(speculation) => speculation.guess(ids, room, sampler)?,
            None => &[],
        };
        rows.clear();
        rows.extend(ids.last().into_iter().chain(drafted).map(|id| Row::decode(sequence, *id)));
        let guessing = begin.elapsed();
        // A row whose guess was refuted says nothing of the text.
        let mut is_text = true;
        executor.step(rows, &mut |at, logits| {
            if is_text {
                let choice = sampler.choose_for_now(logits);
                is_text = rows.get(at + 1).is_some_and(|next| next.token == choice.id) && !ends(choice.id);
                ahead.push_back(choice);
            }
            Ok(())
        })?;
        // The last token chosen is not fed.
        executor.truncate(sequence, fed + ahead.len());
        self.in_piece.extend(std::iter::repeat_n(false, ahead.len()));
        let (computed, chosen, time) = (rows.len() - 1, ahead.len(), begin.elapsed());
        self.time = time / chosen.max(1) as u32;
        self.counters.steps += 1;
        self.counters.rows += rows.len() as u64;
        self.counters.drafted += computed as u64;
        self.counters.accepted += chosen.saturating_sub(1) as u64;
        if let Some(speculation) = speculation {
            speculation.learn(&mut ahead.iter().map(|choice| choice.id), computed, time - guessing);
            self.counters.draft_ns += guessing.as_nanos() as u64;
        }
        Ok(())
    }

    /// What speculation did so far.
    pub fn counters(&self) -> SpeculationCounters {
        self.counters
    }
}
