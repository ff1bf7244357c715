//! What speculation did.

use serde::Serialize;

use crate::neurons::counters::ReadCounters;

/// Steps that decoded, and what was guessed for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpeculationCounters {
    /// Steps.
    pub steps: u64,
    /// Their rows: one of the text each, and the guesses.
    pub rows: u64,
    /// Guesses that were computed, and those of them that came true.
    pub drafted: u64,
    /// See `drafted`.
    pub accepted: u64,
    /// Nanoseconds spent on guessing.
    pub draft_ns: u64,
}

/// The same under the names that `--json` has everywhere.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct SpeculationFigures {
    /// Guesses that were computed.
    pub drafted: u64,
    /// Those of them that came true.
    pub accepted: u64,
    /// Steps that decoded.
    pub steps: u64,
    /// Their rows, on average.
    pub rows_per_step: f64,
    /// Guesses that came true and the token after them, on average.
    pub tokens_per_step: f64,
    /// Distinct neurons that a step wanted, over those that a row of it did, on average; none where all are computed.
    pub neuron_union: Option<f64>,
    /// Bytes read from flash by a step.
    pub bytes_read_per_step: f64,
    /// Guessing, by token of the text.
    pub draft_ms_per_token: f64,
}

impl SpeculationCounters {
    /// What was added since `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            steps: self.steps - before.steps,
            rows: self.rows - before.rows,
            drafted: self.drafted - before.drafted,
            accepted: self.accepted - before.accepted,
            draft_ns: self.draft_ns - before.draft_ns,
        }
    }

    /// Both together.
    pub fn and(self, other: Self) -> Self {
        Self {
            steps: self.steps + other.steps,
            rows: self.rows + other.rows,
            drafted: self.drafted + other.drafted,
            accepted: self.accepted + other.accepted,
            draft_ns: self.draft_ns + other.draft_ns,
        }
    }

    /// The figures, with what the steps read.
    pub fn figures(self, reads: ReadCounters) -> SpeculationFigures {
        let mean = |count: u64, of: u64| count as f64 / of.max(1) as f64;
        let tokens = self.steps + self.accepted;
        let of_row = mean(reads.row_neurons, self.rows);
        SpeculationFigures {
            drafted: self.drafted,
            accepted: self.accepted,
            steps: self.steps,
            rows_per_step: mean(self.rows, self.steps),
            tokens_per_step: mean(tokens, self.steps),
            neuron_union: (of_row > 0.0).then(|| mean(reads.step_neurons, self.steps) / of_row),
            bytes_read_per_step: mean(reads.bytes, self.steps),
            draft_ms_per_token: mean(self.draft_ns, tokens) / 1e6,
        }
    }
}
