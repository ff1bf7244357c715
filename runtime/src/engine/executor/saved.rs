//! Keys and values of a sequence as bytes, to be kept and given back.

use super::{Executor, SequenceId};

impl Executor {
    /// Planes of keys and values, each with a row for every token, and the bytes of a row.
    pub fn kv_shape(&self) -> (usize, usize) {
        (self.kv.planes(), self.kv.row_bytes())
    }

    /// Hands the rows of a sequence's first `tokens` tokens in a plane to `each`, in order, some at a time.
    ///
    /// # Errors
    /// What `each` said.
    pub fn kv_rows<E>(
        &self,
        sequence: SequenceId,
        plane: usize,
        tokens: usize,
        each: &mut dyn FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut places = self.places[sequence.at].of(0..tokens.min(self.len(sequence)));
        places.try_for_each(|(_, places)| each(self.kv.rows(plane, places)))
    }

    /// Puts rows of a plane into the memory of a sequence, for its tokens from `first` on. What does not fit is left out. They count
    /// from [`Executor::resume`] on.
    pub fn put_kv_rows(&mut self, sequence: SequenceId, plane: usize, first: usize, rows: &[u8]) {
        let Some(context) = self.opened(sequence).map(|opened| opened.context) else { return };
        let row_bytes = self.kv.row_bytes();
        for (at, row) in (first..context).zip(rows.chunks_exact(row_bytes)) {
            let place = self.places[sequence.at].place(at);
            self.kv.rows_mut(plane, place..place + 1).copy_from_slice(row);
        }
    }

    /// A sequence has so many tokens, whose rows were put into its memory.
    pub fn resume(&mut self, sequence: SequenceId, tokens: usize) {
        if let Some(sequence) = self.opened_mut(sequence) {
            sequence.len = tokens.min(sequence.context);
        }
    }
}
