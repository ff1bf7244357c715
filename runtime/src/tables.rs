//! Rows of the vocabulary's matrices that are left on flash where memory is short.
//!
//! A token needs one row of the embedding, which is read when it comes, and every row of the head: those that are not in memory are
//! read through a small ring for every token, after the layers' reads were asked for and while layers are computed. What a row gives
//! does not depend on where it lay. Rows are verified against checksums that were taken when the whole section was verified against its own.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use flashlm_formats::bundle::{Bundle, TensorEntry};
use flashlm_formats::model::ModelSpec;
use flashlm_io::{DirectFile, Extent, SequentialReader, StreamOptions};
use flashlm_kernels::{Element, Matrix, Row, ScaleGroup, Threads, matvec, to_f32};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::budget::human_bytes;
use crate::error::{Result, RuntimeError};
use crate::forward::tables::TableSource;
use crate::neurons::counters::ReadCounters;
use crate::tensors::{BytesRange, element, scale_group};

/// Chunks of the ring that the head is read through, and about how long they are.
const CHUNKS: usize = 4;
const CHUNK_BYTES: usize = 256 << 10;
/// What reading whole steps of a disk adds to a chunk, at most.
const STEPS_BYTES: usize = 2 * 4096;
/// Rows that one task checks.
const ROWS_PER_TASK: usize = 64;

/// Rows that stay in memory, from the first on. Where embedding and head are one matrix the two are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TablePlan {
    /// Of the embedding.
    pub embedding: usize,
    /// Of the head.
    pub head: usize,
}

impl TablePlan {
    /// All rows.
    pub fn whole(spec: &ModelSpec) -> Self {
        Self { embedding: spec.vocab_size, head: spec.vocab_size }
    }

    /// What can be tried, the best first; `all`: also what reads for every token. The rows of a head that is cut are still to be
    /// chosen.
    pub(crate) fn choices(spec: &ModelSpec, all: bool) -> Vec<Self> {
        let whole = Self::whole(spec);
        match (all, spec.tied_head) {
            (false, _) => vec![whole],
            (true, true) => vec![whole, Self { embedding: 0, head: 0 }],
            (true, false) => vec![whole, Self { embedding: 0, ..whole }, Self { embedding: 0, head: 0 }],
        }
    }

    /// Whether rows of the head are left on flash.
    pub(crate) fn is_cut(&self, spec: &ModelSpec) -> bool {
        self.head < spec.vocab_size
    }

    /// The same with this many rows of the head in memory.
    pub(crate) fn with_head(self, spec: &ModelSpec, head: usize) -> Self {
        Self { embedding: if spec.tied_head { head } else { self.embedding }, head }
    }

    /// The tables that are cut: their tensor, and the rows of it that stay.
    pub(crate) fn cut<'a>(&self, bundle: &'a Bundle) -> Vec<(&'a TensorEntry, usize)> {
        let spec = bundle.spec();
        let tables = [("embed.tokens", self.embedding), ("head.weight", self.head)];
        let tables = tables.into_iter().take(if spec.tied_head { 1 } else { 2 });
        tables
            .filter(|(_, rows)| *rows < spec.vocab_size)
            .filter_map(|(name, rows)| Some((bundle.resident_tensor(name)?, rows)))
            .collect()
    }

    /// Bytes that are left on flash.
    pub(crate) fn left_out(&self, bundle: &Bundle) -> u64 {
        self.cut(bundle).into_iter().map(|(tensor, rows)| tensor.extent.bytes - (rows * row_bytes(tensor)) as u64).sum()
    }

    /// Bytes of the head that are left on flash.
    pub(crate) fn head_left_out(&self, bundle: &Bundle) -> u64 {
        let cut = self.cut(bundle);
        let head = if self.is_cut(bundle.spec()) { cut.last() } else { None };
        head.map_or(0, |(tensor, rows)| tensor.extent.bytes - (rows * row_bytes(tensor)) as u64)
    }

    /// Bytes of the buffers and checksums for what is left on flash.
    pub(crate) fn bytes(&self, bundle: &Bundle) -> u64 {
        let (spec, cut) = (bundle.spec(), self.cut(bundle));
        let sums: usize = cut.iter().map(|(_, rows)| (spec.vocab_size - rows) * size_of::<u32>()).sum();
        let embedding = cut.first().filter(|_| self.embedding < spec.vocab_size);
        let row = embedding.map(|(tensor, _)| buffer_bytes(1, row_bytes(tensor)) + ENGINE_BYTES);
        let head = cut.last().filter(|_| self.is_cut(spec)).map(|(tensor, _)| row_bytes(tensor));
        let ring = head.map(|bytes| CHUNKS * buffer_bytes(rows_per_chunk(bytes), bytes) + ENGINE_BYTES);
        (sums + row.unwrap_or(0) + ring.unwrap_or(0)) as u64
    }

    /// What is said of it, where `budget` does not hold the rest and `needed` would.
    pub(crate) fn describe(&self, spec: &ModelSpec, budget: u64, avoid: &str) -> String {
        let budget = human_bytes(budget);
        if self.is_cut(spec) {
            let share = 100.0 * (1.0 - self.head as f64 / spec.vocab_size as f64);
            format!("not all of the vocabulary fits in {budget}: {share:.0} % of it is read for every token; {avoid}")
        } else {
            format!("the embedding does not fit in {budget}: a row of it is read for every token; {avoid}")
        }
    }
}

/// What an engine of few reads keeps beside its buffers.
const ENGINE_BYTES: usize = 64 << 10;

/// Bytes of a row's values.
fn row_bytes(tensor: &TensorEntry) -> usize {
    (tensor.extent.bytes / tensor.shape[0].max(1) as u64) as usize
}

/// Rows of the head that are read at a time.
fn rows_per_chunk(row_bytes: usize) -> usize {
    (CHUNK_BYTES / row_bytes).max(1)
}

/// Bytes of a buffer for this many rows.
fn buffer_bytes(rows: usize, row_bytes: usize) -> usize {
    rows * row_bytes + STEPS_BYTES
}

/// The checksum of a row.
fn row_sum(bytes: &[u8]) -> u32 {
    xxh3_64(bytes) as u32
}

/// A part of the resident section that is left on flash.
pub(crate) struct Cut {
    /// The row that is passing, as far as it has come.
    row: Xxh3,
    come: usize,
    /// Where it begins in the section, and how long it is.
    pub(crate) start: u64,
    pub(crate) bytes: u64,
    /// Bytes of a row.
    row_bytes: usize,
    /// Checksums of its rows, once the section was read.
    sums: Vec<u32>,
}

impl Cut {
    /// The parts that a plan leaves on flash, in the order of the file.
    pub(crate) fn of(bundle: &Bundle, tables: &TablePlan) -> Vec<Self> {
        let section = bundle.resident().extent.offset;
        let mut cuts: Vec<Self> = tables
            .cut(bundle)
            .into_iter()
            .map(|(tensor, rows)| {
                let (row_bytes, kept) = (row_bytes(tensor), (rows * row_bytes(tensor)) as u64);
                let left = tensor.shape[0] - rows;
                let start = tensor.extent.offset - section + kept;
                let sums = Vec::with_capacity(left);
                let bytes = tensor.extent.bytes - kept;
                Self { row: Xxh3::new(), come: 0, start, bytes, row_bytes, sums }
            })
            .collect();
        cuts.sort_by_key(|cut| cut.start);
        cuts
    }

    /// The next bytes of the part go by.
    pub(crate) fn pass(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (part, rest) = bytes.split_at(bytes.len().min(self.row_bytes - self.come));
            self.row.update(part);
            self.come += part.len();
            if self.come == self.row_bytes {
                self.sums.push(self.row.digest() as u32);
                self.row.reset();
                self.come = 0;
            }
            bytes = rest;
        }
    }
}

/// Rows of one table that are on flash.
struct Rows {
    path: PathBuf,
    /// Where row 0 of the whole table lies in the file.
    offset: u64,
    first: usize,
    count: usize,
    cols: usize,
    row_bytes: usize,
    element: Element,
    scales: Option<(BytesRange, ScaleGroup)>,
    /// Checksums of the rows from `first` on; empty where nothing is verified.
    sums: Arc<[u32]>,
}

impl Rows {
    fn extent(&self, row: usize, count: usize) -> Extent {
        let length = (count * self.row_bytes) as u64;
        Extent { offset: self.offset + (row * self.row_bytes) as u64, length }
    }

    /// Holds rows from `row` on against their checksums.
    fn check(&self, threads: Option<&Threads>, row: usize, bytes: &[u8]) -> Result<()> {
        if self.sums.is_empty() {
            return Ok(());
        }
        let rows = bytes.len() / self.row_bytes;
        let is_bad =
            |i: usize| row_sum(&bytes[i * self.row_bytes..][..self.row_bytes]) != self.sums[row - self.first + i];
        let first_bad = AtomicUsize::new(usize::MAX);
        let task = |task: usize| {
            let range = task * ROWS_PER_TASK..rows.min((task + 1) * ROWS_PER_TASK);
            if let Some(bad) = range.into_iter().find(|i| is_bad(*i)) {
                first_bad.fetch_min(bad, Ordering::Relaxed);
            }
        };
        match threads {
            Some(threads) => threads.run(rows.div_ceil(ROWS_PER_TASK), &task),
            None => (0..rows.div_ceil(ROWS_PER_TASK)).for_each(task),
        }
        match first_bad.into_inner() {
            usize::MAX => Ok(()),
            bad => Err(RuntimeError::Checksum {
                path: self.path.clone(),
                part: format!("row {} of the vocabulary's matrix (resident section)", row + bad),
                expected: self.sums[row - self.first + bad].into(),
                found: row_sum(&bytes[bad * self.row_bytes..][..self.row_bytes]).into(),
            }),
        }
    }

    fn row_scales(&self, row: usize) -> Option<(&[u8], ScaleGroup)> {
        self.scales.as_ref().map(|(scales, group)| {
            let bytes = group.scale_bytes(self.cols);
            (&scales.get()[row * bytes..], *group)
        })
    }

    fn matrix<'a>(&'a self, row: usize, bytes: &'a [u8]) -> Matrix<'a> {
        let rows = bytes.len() / self.row_bytes;
        let matrix = Matrix::new(self.element, bytes, rows, self.cols).expect("whole rows were read");
        match self.row_scales(row) {
            None => matrix,
            Some((scales, group)) => {
                let stride = group.scale_bytes(self.cols);
                matrix.with_scales(&scales[..rows * stride], stride, group).expect("every row has its scales")
            }
        }
    }
}

/// The rows of a bundle's tables that are on flash.
pub(crate) struct TablesOnFlash {
    /// The head's rows and the ring they come through, with what is read in turn.
    head: Option<(Rows, SequentialReader, Vec<Extent>)>,
    rows_per_chunk: usize,
    /// Whether the ring must start again.
    broken: bool,
    /// The embedding's rows and a reader of one.
    embedding: Option<(Rows, SequentialReader)>,
}

impl TablesOnFlash {
    /// What `tables` leaves on flash of `bundle`, which `file` is; `cuts` were read. `scales` gives the scales of a tensor.
    pub(crate) fn new(
        bundle: &Bundle,
        file: &Arc<DirectFile>,
        reads: StreamOptions,
        verify: bool,
        tables: &TablePlan,
        cuts: Vec<Cut>,
        scales: impl Fn(&TensorEntry) -> Option<BytesRange>,
    ) -> Result<Self> {
        let spec = bundle.spec();
        let section = bundle.resident().extent.offset;
        let sums: Vec<(u64, Arc<[u32]>)> = cuts.into_iter().map(|cut| (cut.start, cut.sums.into())).collect();
        let rows = |name: &str, first: usize| {
            let tensor = bundle.resident_tensor(name).ok_or_else(|| RuntimeError::MissingTensor(name.into()))?;
            let row_bytes = row_bytes(tensor);
            let start = tensor.extent.offset - section + (first * row_bytes) as u64;
            let sums = sums.iter().find(|(cut, _)| *cut == start && verify).map(|(_, sums)| Arc::clone(sums));
            Ok::<_, RuntimeError>(Rows {
                path: bundle.path().to_path_buf(),
                offset: tensor.extent.offset,
                first,
                count: spec.vocab_size - first,
                cols: spec.embed_size,
                row_bytes,
                element: element(tensor.format),
                scales: scales(tensor).zip(scale_group(tensor.format)),
                sums: sums.unwrap_or_default(),
            })
        };
        let head_name = if spec.tied_head { "embed.tokens" } else { "head.weight" };
        let mut rows_per_chunk = 1;
        let head = if tables.is_cut(spec) {
            let rows = rows(head_name, tables.head)?;
            rows_per_chunk = self::rows_per_chunk(rows.row_bytes);
            let firsts = (rows.first..rows.first + rows.count).step_by(rows_per_chunk);
            let end = rows.first + rows.count;
            let extents: Vec<Extent> =
                firsts.map(|first| rows.extent(first, rows_per_chunk.min(end - first))).collect();
            let chunk_bytes = buffer_bytes(rows_per_chunk, rows.row_bytes);
            let mut reader =
                SequentialReader::new(Arc::clone(file), StreamOptions { chunk_bytes, chunks: CHUNKS, ..reads })?;
            reader.restart(&extents)?;
            Some((rows, reader, extents))
        } else {
            None
        };
        let embedding = if tables.embedding < spec.vocab_size {
            let rows = rows("embed.tokens", tables.embedding)?;
            let chunk_bytes = buffer_bytes(1, rows.row_bytes);
            let reader = SequentialReader::new(Arc::clone(file), StreamOptions { chunk_bytes, chunks: 1, ..reads })?;
            Some((rows, reader))
        } else {
            None
        };
        Ok(Self { head, rows_per_chunk, broken: false, embedding })
    }

    fn head_logits(&mut self, threads: &Threads, input: &[f32], logits: &mut [f32]) -> Result<()> {
        let Some((rows, reader, extents)) = &mut self.head else { return Ok(()) };
        if std::mem::replace(&mut self.broken, true) {
            reader.restart(extents).map_err(RuntimeError::ReadVocabulary)?;
        }
        for at in 0..extents.len() {
            let first = rows.first + at * self.rows_per_chunk;
            let chunk = reader.next().map_err(RuntimeError::ReadVocabulary)?.expect("the list has every row");
            rows.check(Some(threads), first, chunk.bytes)?;
            let matrix = rows.matrix(first, chunk.bytes);
            matvec(threads, matrix, input, &mut logits[first..first + matrix.rows()]);
        }
        // The first rows of the next token are read while its layers are computed.
        reader.restart(extents).map_err(RuntimeError::ReadVocabulary)?;
        self.broken = false;
        Ok(())
    }
}

impl TableSource for TablesOnFlash {
    fn embedding(&mut self, id: u32, out: &mut [f32]) -> Result<()> {
        let (rows, reader) = self.embedding.as_mut().expect("asked for rows that are not in memory");
        let row = id as usize;
        reader.restart(&[rows.extent(row, 1)]).map_err(RuntimeError::ReadVocabulary)?;
        let chunk = reader.next().map_err(RuntimeError::ReadVocabulary)?.expect("one extent is one chunk");
        rows.check(None, row, chunk.bytes)?;
        match rows.row_scales(row) {
            None => to_f32(rows.element, chunk.bytes, out),
            Some((scales, group)) => {
                let scales = &scales[..group.scale_bytes(rows.cols)];
                to_f32(rows.element, Row::quantised(chunk.bytes, scales, group), out);
            }
        }
        Ok(())
    }

    fn logits(&mut self, threads: &Threads, input: &[f32], logits: &mut [f32]) -> Result<()> {
        self.head_logits(threads, input, logits)
    }

    fn read_counters(&self) -> ReadCounters {
        let readers = [self.head.as_ref().map(|head| &head.1), self.embedding.as_ref().map(|embedding| &embedding.1)];
        readers.into_iter().flatten().fold(ReadCounters::default(), |sum, reader| {
            let flashlm_io::Counters { bytes, reads, retries, wait_ns, .. } = reader.engine().counters();
            sum.and(ReadCounters { bytes, reads, retries, wait_ns, ..ReadCounters::default() })
        })
    }
}
