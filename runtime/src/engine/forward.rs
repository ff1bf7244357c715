//! An executor with a single sequence: feeds tokens, gives logits.

use flashlm_formats::model::ModelSpec;

use super::executor::{Executor, Row, SequenceId, Work};
use crate::disk_cost::ReadCost;
use crate::error::Result;
use crate::neurons::counters::ReadCounters;
use crate::neurons::hook::FfnHook;

/// A model with one sequence.
pub struct Forward {
    executor: Executor,
    sequence: SequenceId,
    /// Rows of a prompt: made once, as long as the longest.
    rows: Vec<Row>,
}

impl Forward {
    /// The only sequence of `executor`, with all the room that it has for one.
    pub fn new(mut executor: Executor) -> Result<Self> {
        let sequence = executor.open(executor.context())?;
        Ok(Self { executor, sequence, rows: Vec::new() })
    }

    /// The executor alone, without sequences.
    pub fn into_executor(mut self) -> Executor {
        self.executor.close(self.sequence);
        self.executor
    }

    /// The executor and the sequence.
    pub fn parts(&mut self) -> (&mut Executor, SequenceId) {
        (&mut self.executor, self.sequence)
    }

    /// The architecture.
    pub fn spec(&self) -> &ModelSpec {
        self.executor.spec()
    }

    /// Tokens fed.
    pub fn len(&self) -> usize {
        self.executor.len(self.sequence)
    }

    /// Whether no token has been fed.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens there is room for.
    pub fn context(&self) -> usize {
        self.executor.context()
    }

    /// Forgets all tokens from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.executor.truncate(self.sequence, len);
    }

    /// What has been read from flash so far.
    pub fn read_counters(&self) -> ReadCounters {
        self.executor.read_counters()
    }

    /// What reads are seen to cost, where plans follow that.
    pub fn read_cost(&self) -> Option<ReadCost> {
        self.executor.read_cost()
    }

    /// How often reads of each size, in bytes, were asked for so far.
    pub fn read_sizes(&self) -> Vec<(u64, u64)> {
        self.executor.read_sizes()
    }

    /// Feeds tokens as a piece of a prompt and gives the logits of the last one, `[vocab]`.
    pub fn feed(&mut self, ids: &[u32]) -> Result<&mut [f32]> {
        self.step(ids, |at| at + 1 == ids.len(), None, &mut |_, _| Ok(()))?;
        Ok(self.executor.last_logits())
    }

    /// As [`Forward::feed`], without the logits; `hook` sees what goes through the FFN of every block.
    pub fn feed_observed(&mut self, ids: &[u32], hook: &mut dyn FfnHook) -> Result<()> {
        self.step(ids, |_| false, Some(hook), &mut |_, _| Ok(()))
    }

    /// Feeds tokens and hands the logits of each one to `each`, with its place in `ids`.
    pub fn feed_all(&mut self, ids: &[u32], each: &mut dyn FnMut(usize, &[f32]) -> Result<()>) -> Result<()> {
        self.step(ids, |_| true, None, &mut |at, logits| each(at, logits))
    }

    fn step(
        &mut self,
        ids: &[u32],
        wants_logits: impl Fn(usize) -> bool,
        hook: Option<&mut dyn FfnHook>,
        each: &mut dyn FnMut(usize, &mut [f32]) -> Result<()>,
    ) -> Result<()> {
        let (sequence, work) = (self.sequence, Work::Prompt);
        let rows = ids.iter().enumerate();
        self.rows.clear();
        self.rows.extend(rows.map(|(at, &token)| Row { sequence, token, work, wants_logits: wants_logits(at) }));
        self.executor.step_observed(&self.rows, hook, each)
    }
}
