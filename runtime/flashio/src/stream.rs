//! Reads long extents in order as fast as the disk gives them: a ring of chunks, always full of reads ahead.

use std::sync::Arc;

use crate::{Completion, DirectFile, Engines, IoError, ReadBatch, ReadEngine, Slots};

/// A part of a file, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins.
    pub offset: u64,
    /// Its length.
    pub length: u64,
}

/// How a sequential reader is set up. It holds `chunk_bytes * chunks` of memory.
#[derive(Debug, Clone, Copy)]
pub struct StreamOptions {
    /// Bytes of a chunk.
    pub chunk_bytes: usize,
    /// Chunks read ahead, the one being looked at included.
    pub chunks: usize,
    /// Opens the engine that reads.
    pub engines: Engines,
}

impl Default for StreamOptions {
    fn default() -> Self {
        Self { chunk_bytes: 2 << 20, chunks: 8, engines: Engines::default() }
    }
}

/// The next bytes of an extent.
#[derive(Debug)]
pub struct Chunk<'a> {
    /// Which extent of the list.
    pub extent: usize,
    /// File offset of the first byte.
    pub offset: u64,
    /// The bytes.
    pub bytes: &'a [u8],
}

#[derive(Debug, Default)]
struct Place {
    extent: usize,
    offset: u64,
    /// Bytes read only for alignment in front of the wanted ones.
    lead: usize,
    length: usize,
    arrived: bool,
    error: Option<IoError>,
}

/// Hands out the bytes of a list of extents in order, reading ahead.
pub struct SequentialReader {
    engine: Box<dyn ReadEngine>,
    file: Arc<DirectFile>,
    chunk_bytes: u64,
    extents: Vec<Extent>,
    next_extent: usize,
    /// Bytes of `next_extent` already asked for.
    asked: u64,
    places: Vec<Place>,
    /// Chunks asked for and chunks released since the start.
    issued: u64,
    released: u64,
    lent: bool,
    batch: ReadBatch,
    done: Vec<Completion>,
}

impl SequentialReader {
    /// A reader with an empty list.
    pub fn new(file: Arc<DirectFile>, options: StreamOptions) -> Result<Self, IoError> {
        let unit = file.alignment().file_unit() as usize;
        let chunks = options.chunks.max(1);
        let chunk_bytes = options.chunk_bytes.max(1).next_multiple_of(unit);
        let slots = Slots::new(chunks, chunk_bytes, file.alignment())?;
        Ok(Self {
            engine: options.engines.open(Arc::clone(&file), slots, chunks)?,
            file,
            chunk_bytes: chunk_bytes as u64,
            extents: Vec::new(),
            next_extent: 0,
            asked: 0,
            places: (0..chunks).map(|_| Place::default()).collect(),
            issued: 0,
            released: 0,
            lent: false,
            batch: ReadBatch::new(),
            done: Vec::with_capacity(chunks),
        })
    }

    /// Begins a new list and starts reading it. What was not consumed of the last one is dropped.
    pub fn restart(&mut self, extents: &[Extent]) -> Result<(), IoError> {
        while self.engine.in_flight() > 0 {
            self.done.clear();
            self.engine.wait(self.engine.in_flight(), &mut self.done)?;
        }
        for extent in extents {
            if extent.offset.checked_add(extent.length).is_none_or(|end| end > self.file.len()) {
                return Err(IoError::BeyondEnd {
                    path: self.file.path().to_path_buf(),
                    offset: extent.offset,
                    length: extent.length,
                    file_length: self.file.len(),
                });
            }
        }
        self.extents.clear();
        self.extents.extend_from_slice(extents);
        (self.next_extent, self.asked, self.issued, self.released, self.lent) = (0, 0, 0, 0, false);
        self.fill()
    }

    /// The next chunk, or `None` at the end. Never crosses from one extent into the next. The chunk before it is
    /// given back for reading ahead. After an error the reader must be restarted.
    #[expect(clippy::should_implement_trait, reason = "it lends from itself, which Iterator cannot")]
    pub fn next(&mut self) -> Result<Option<Chunk<'_>>, IoError> {
        self.release()?;
        if self.released == self.issued {
            return Ok(None);
        }
        let slot = (self.released % self.places.len() as u64) as usize;
        while !self.places[slot].arrived {
            self.take_in(1)?;
        }
        if let Some(error) = self.places[slot].error.take() {
            return Err(error);
        }
        self.lent = true;
        let place = &self.places[slot];
        let bytes = self.engine.slots().slot(slot as u32).and_then(|b| b.get(place.lead..place.lead + place.length));
        // Arrived without an error, so the slot is ready and full.
        Ok(bytes.map(|bytes| Chunk { extent: place.extent, offset: place.offset, bytes }))
    }

    /// Gives the last chunk back early, so that its memory is read into while the caller does something else.
    pub fn release(&mut self) -> Result<(), IoError> {
        if !self.lent {
            return Ok(());
        }
        self.lent = false;
        self.released += 1;
        self.fill()
    }

    /// The engine below, for its counters and description.
    pub fn engine(&self) -> &dyn ReadEngine {
        &*self.engine
    }

    /// Bytes of buffer that the reader holds.
    pub fn buffer_bytes(&self) -> usize {
        self.engine.slots().arena_bytes()
    }

    /// Reads one extent into `out`.
    pub fn read_into(&mut self, offset: u64, out: &mut [u8]) -> Result<(), IoError> {
        self.restart(&[Extent { offset, length: out.len() as u64 }])?;
        let mut at = 0;
        while let Some(chunk) = self.next()? {
            out[at..at + chunk.bytes.len()].copy_from_slice(chunk.bytes);
            at += chunk.bytes.len();
        }
        Ok(())
    }

    /// Asks for chunks while there is room for them.
    fn fill(&mut self) -> Result<(), IoError> {
        let unit = self.file.alignment().file_unit();
        self.batch.clear();
        while self.issued - self.released < self.places.len() as u64 {
            let Some(extent) = self.extents.get(self.next_extent) else { break };
            if self.asked == extent.length {
                (self.next_extent, self.asked) = (self.next_extent + 1, 0);
                continue;
            }
            let offset = extent.offset + self.asked;
            let start = offset / unit * unit;
            let wanted = (extent.length - self.asked).min(self.chunk_bytes - (offset - start));
            // Rounded outwards, but not past the end of the file.
            let end = (offset + wanted).next_multiple_of(unit).min(self.file.len());
            let slot = (self.issued % self.places.len() as u64) as usize;
            self.places[slot] = Place {
                extent: self.next_extent,
                offset,
                lead: (offset - start) as usize,
                length: wanted as usize,
                ..Place::default()
            };
            self.batch.read(slot as u64, start, slot as u32, (end - start) as u32);
            self.asked += wanted;
            self.issued += 1;
        }
        if self.batch.is_empty() { self.take_in(0) } else { self.engine.submit(&self.batch) }
    }

    /// Notes which chunks have arrived.
    fn take_in(&mut self, at_least: usize) -> Result<(), IoError> {
        self.done.clear();
        let outcome = self.engine.wait(at_least, &mut self.done);
        for completion in self.done.drain(..) {
            let place = &mut self.places[completion.tag as usize];
            place.arrived = true;
            place.error = completion.result.err();
        }
        outcome.map(|_| ())
    }
}

/// Reads one extent of a file into memory, for sections that are loaded once.
pub fn read_extent_into(file: &Arc<DirectFile>, offset: u64, out: &mut [u8]) -> Result<(), IoError> {
    let chunk_bytes = out.len().clamp(4096, 2 << 20);
    let chunks = out.len().div_ceil(chunk_bytes).clamp(1, 8);
    let options = StreamOptions { chunk_bytes, chunks, ..StreamOptions::default() };
    SequentialReader::new(Arc::clone(file), options)?.read_into(offset, out)
}
