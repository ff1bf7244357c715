//! A session in a file: what was said need not be computed again.
//!
//! Keys and values are taken over only where this session would have computed them to the same bits: with the same bundle, and, in a
//! prompt, in the same kind of products. So the text is what it is without the file.

use std::path::Path;

use flashlm_formats::bundle::{Bundle, Section};
use flashlm_formats::destination::Destination;
use flashlm_formats::sessions::{Origin, SavedSession, SessionReader, write_session};
use xxhash_rust::xxh3::Xxh3;

use super::session::Session;
use crate::engine::{check_ids, in_pieces, resumable};
use crate::error::{Result, RuntimeError};
use crate::forward::kv::KvDtype;

/// What the sessions of a bundle are computed with.
pub(super) fn origin(bundle: &Bundle, kv: KvDtype, predicted: bool) -> Origin {
    let mut hash = Xxh3::new();
    for section in Section::ALL {
        hash.update(&bundle.section(section).map_or(0, |section| section.checksum).to_le_bytes());
    }
    Origin {
        bundle: hash.digest(),
        kv: kv.name().to_owned(),
        predicted,
        instructions: flashlm_kernels::instruction_set().to_string(),
    }
}

/// Opens a saved session that was computed as `ours` are.
///
/// # Errors
/// `SavedSession` with what is wrong with the file; `OtherSession` where it was computed otherwise.
pub(super) fn open(path: &Path, ours: &Origin) -> Result<SessionReader> {
    let reader = SessionReader::open(path)?;
    let theirs = &reader.session().origin;
    let computes = |origin: &Origin| if origin.predicted { "predicted neurons" } else { "every neuron" }.to_owned();
    let (found, expected) = match theirs {
        _ if theirs.bundle != ours.bundle => ("another bundle".to_owned(), "this one".to_owned()),
        _ if theirs.predicted != ours.predicted => (computes(theirs), computes(ours)),
        _ if theirs.kv != ours.kv => (format!("--kv {}", theirs.kv), format!("--kv {}", ours.kv)),
        _ if theirs.instructions != ours.instructions => (theirs.instructions.clone(), ours.instructions.clone()),
        _ => return Ok(reader),
    };
    Err(other(path, &found, &expected))
}

fn other(path: &Path, found: &str, expected: &str) -> RuntimeError {
    RuntimeError::OtherSession { path: path.to_owned(), difference: format!("{found}, and this run has {expected}") }
}

impl Session<'_> {
    /// Begins with what `ids` and a saved session have in common, as far as it is computed alike: so many of `ids` have been said then.
    ///
    /// # Errors
    /// As [`Session::restore`].
    pub fn resume(&mut self, path: &Path, ids: &[u32]) -> Result<usize> {
        let reader = open(path, self.model.origin())?;
        let saved = reader.session();
        let would_be = ids.iter().zip(in_pieces(ids.len()));
        let pairs = saved.ids.iter().zip(&saved.in_piece).zip(would_be);
        let equal = pairs.take_while(|((id, piece), (ours, would_be))| id == ours && *piece == would_be).count();
        let count = resumable(equal, ids.len());
        self.take_over(reader, count, count)?;
        self.transcript.end_piece();
        Ok(count)
    }

    /// Begins with all of a saved session: what is said next goes on after it.
    ///
    /// # Errors
    /// `SavedSession` with what is wrong with the file, `OtherSession` where it was computed otherwise, `ContextFull`,
    /// `TokenOutOfRange`: then nothing has been said.
    pub fn restore(&mut self, path: &Path) -> Result<usize> {
        let reader = open(path, self.model.origin())?;
        let (said, fed) = (reader.session().ids.len(), reader.session().in_piece.len());
        let (context, model_max) = (self.context(), self.model.spec().max_positions);
        if said > context {
            return Err(RuntimeError::ContextFull { wanted: said, context, model_max });
        }
        let conversation = reader.session().conversation.clone();
        self.take_over(reader, said, fed)?;
        self.conversation = conversation;
        Ok(said)
    }

    /// Begins with the first ids of a saved session, of which so many are fed.
    fn take_over(&mut self, mut reader: SessionReader, said: usize, fed: usize) -> Result<()> {
        if said > 0 {
            check_ids(self.model.spec(), &reader.session().ids[..said])?;
        }
        self.clear();
        let model = self.model;
        let mut executor = model.executor();
        let sequence = self.transcript.sequence();
        let (planes, row_bytes) = executor.kv_shape();
        let SavedSession { planes: theirs, row_bytes: of_theirs, .. } = *reader.session();
        if fed > 0 && (planes, row_bytes) != (theirs, of_theirs) {
            let (found, expected) =
                (format!("{theirs} rows of {of_theirs} bytes a token"), format!("{planes} of {row_bytes}"));
            return Err(other(reader.path(), &found, &expected));
        }
        reader.read_kv(&mut |plane, first, rows| {
            let wanted = fed.saturating_sub(first) * row_bytes;
            executor.put_kv_rows(sequence, plane, first, &rows[..rows.len().min(wanted)]);
        })?;
        let SavedSession { ids, in_piece, .. } = reader.session();
        executor.resume(sequence, fed);
        self.transcript.resume(&ids[..said], &in_piece[..fed], &mut self.sampler);
        self.stream.prompt(&ids[..said]);
        self.written = None;
        Ok(())
    }

    /// Writes what was said, with its keys and values; gives the bytes of these.
    ///
    /// # Errors
    /// What the destination has against it.
    pub fn save(&mut self, destination: Destination) -> Result<u64> {
        let model = self.model;
        let mut executor = model.executor();
        self.transcript.settle(&mut executor, &mut self.sampler);
        let sequence = self.transcript.sequence();
        let (planes, row_bytes) = executor.kv_shape();
        let (ids, in_piece) = (self.transcript.ids().to_vec(), self.transcript.in_piece().to_vec());
        let tokens = in_piece.len();
        let (origin, conversation) = (self.model.origin().clone(), self.conversation.clone());
        let saved = SavedSession { origin, ids, in_piece, conversation, planes, row_bytes };
        write_session(destination, &saved, &mut |plane, write| executor.kv_rows(sequence, plane, tokens, write))?;
        Ok((planes * row_bytes * tokens) as u64)
    }
}
