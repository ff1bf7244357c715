//! What to read: requests of one contiguous file extent each, cut into pieces that land in slots or nowhere.
//!
//! Which neighbours to merge into one request is the caller's decision.

/// A part of a request, in file order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    /// The next `bytes` bytes of the file go to the start of `slot`.
    Slot {
        /// Slot number.
        slot: u32,
        /// Bytes, at least 1 and at most a slot.
        bytes: u32,
    },
    /// The next `bytes` bytes are wanted by nobody; reading through them keeps the request in one piece.
    Gap {
        /// Bytes.
        bytes: u32,
    },
}

impl Piece {
    /// Length in bytes.
    pub fn bytes(self) -> u32 {
        match self {
            Piece::Slot { bytes, .. } | Piece::Gap { bytes } => bytes,
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Head {
    tag: u64,
    offset: u64,
    first_piece: usize,
}

/// A list of requests, built in place and reused: `clear` keeps the memory.
#[derive(Debug, Default, Clone)]
pub struct ReadBatch {
    heads: Vec<Head>,
    pieces: Vec<Piece>,
}

impl ReadBatch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty batch with room for this many requests and pieces: filling it up to that allocates nothing.
    pub fn with_capacity(requests: usize, pieces: usize) -> Self {
        Self { heads: Vec::with_capacity(requests), pieces: Vec::with_capacity(pieces) }
    }

    /// Removes all requests, keeping the memory.
    pub fn clear(&mut self) {
        self.heads.clear();
        self.pieces.clear();
    }

    /// Begins a request at a file offset; `tag` comes back in its completion. Pieces follow.
    pub fn begin(&mut self, tag: u64, offset: u64) {
        self.heads.push(Head { tag, offset, first_piece: self.pieces.len() });
    }

    /// Sends the next `bytes` bytes of the current request to the start of `slot`.
    pub fn slot(&mut self, slot: u32, bytes: u32) {
        debug_assert!(!self.heads.is_empty(), "a piece before `begin` is lost");
        self.pieces.push(Piece::Slot { slot, bytes });
    }

    /// Reads through `bytes` bytes that nobody wants.
    pub fn gap(&mut self, bytes: u32) {
        debug_assert!(!self.heads.is_empty(), "a piece before `begin` is lost");
        if bytes > 0 {
            self.pieces.push(Piece::Gap { bytes });
        }
    }

    /// A request for a single slot: `begin` and `slot` in one.
    pub fn read(&mut self, tag: u64, offset: u64, slot: u32, bytes: u32) {
        self.begin(tag, offset);
        self.slot(slot, bytes);
    }

    /// Number of requests.
    pub fn len(&self) -> usize {
        self.heads.len()
    }

    /// Whether there are no requests.
    pub fn is_empty(&self) -> bool {
        self.heads.is_empty()
    }

    /// The requests: tag, file offset, pieces.
    pub fn requests(&self) -> impl Iterator<Item = (u64, u64, &[Piece])> {
        self.heads.iter().enumerate().map(|(i, head)| {
            let end = self.heads.get(i + 1).map_or(self.pieces.len(), |next| next.first_piece);
            (head.tag, head.offset, &self.pieces[head.first_piece..end])
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_gives_its_requests_back() {
        let mut batch = ReadBatch::new();
        batch.read(7, 4096, 3, 100);
        batch.begin(8, 0);
        batch.slot(1, 10);
        batch.gap(0);
        batch.gap(5);
        batch.slot(2, 10);
        let all: Vec<_> = batch.requests().map(|(t, o, p)| (t, o, p.to_vec())).collect();
        assert_eq!(all[0], (7, 4096, vec![Piece::Slot { slot: 3, bytes: 100 }]));
        assert_eq!(all[1].2.iter().map(|p| p.bytes()).collect::<Vec<_>>(), [10, 5, 10]);
        batch.clear();
        assert!(batch.is_empty() && batch.requests().next().is_none());
    }
}
