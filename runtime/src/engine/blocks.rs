//! Memory for keys and values in blocks: a sequence takes what it may need when it is opened, never while it is decoded.

use std::ops::Range;

use crate::forward::kv::SequencePlaces;

/// Tokens of a block.
pub const KV_BLOCK: usize = 16;

/// Which blocks nobody has.
pub(super) struct Blocks {
    /// Ascending.
    free: Vec<usize>,
}

impl Blocks {
    /// All of `count` blocks.
    pub(super) fn new(count: usize) -> Self {
        Self { free: (0..count).collect() }
    }

    /// Blocks that `tokens` tokens need.
    pub(super) fn needed(tokens: usize) -> usize {
        tokens.div_ceil(KV_BLOCK)
    }

    /// Tokens that the free blocks have room for.
    pub(super) fn free_tokens(&self) -> usize {
        self.free.len() * KV_BLOCK
    }

    /// The first free blocks for `tokens` tokens; `None` if there are fewer.
    pub(super) fn take(&mut self, tokens: usize) -> Option<Vec<usize>> {
        let needed = Self::needed(tokens);
        (needed <= self.free.len()).then(|| self.free.drain(..needed).collect())
    }

    /// Takes blocks back.
    pub(super) fn give_back(&mut self, blocks: Vec<usize>) {
        self.free.extend(blocks);
        self.free.sort_unstable();
    }

    /// The places of the tokens in `blocks`.
    pub(super) fn places(blocks: &[usize]) -> SequencePlaces {
        let range = |block: &usize| -> Range<usize> { block * KV_BLOCK..(block + 1) * KV_BLOCK };
        SequencePlaces::new(blocks.iter().map(range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_lent_and_come_back() {
        let mut blocks = Blocks::new(4);
        let a = blocks.take(17).unwrap();
        let b = blocks.take(1).unwrap();
        assert_eq!((a.len(), b.len(), blocks.free_tokens()), (2, 1, KV_BLOCK));
        assert!(blocks.take(KV_BLOCK + 1).is_none());
        blocks.give_back(a);
        let c = blocks.take(3 * KV_BLOCK).unwrap();
        assert_eq!(c, [0, 1, 3]);
        // What lies side by side is one.
        assert_eq!(Blocks::places(&c), SequencePlaces::new([0..2 * KV_BLOCK, 3 * KV_BLOCK..4 * KV_BLOCK]));
    }
}
