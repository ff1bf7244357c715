//! Pairs of a row and a token that selected it.

/// The tokens that selected each row of a matrix.
#[derive(Clone, Copy, Debug)]
pub struct RowTokens<'a> {
    /// Where the tokens of each row begin among `tokens`, and where those of the last row end.
    pub starts: &'a [u32],
    /// Row by row.
    pub tokens: &'a [u16],
}

impl RowTokens<'_> {
    /// Those of one row.
    pub(crate) fn of_row(&self, row: usize) -> &[u16] {
        &self.tokens[self.starts[row] as usize..self.starts[row + 1] as usize]
    }
}
