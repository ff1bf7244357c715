//! A session from a file.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::Metadata;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::{
    ARITHMETIC, CONVERSATION, IDS, KV, LENGTH_BYTES, Origin, PIECE_BYTES, SavedSession, SessionFileError, VERSION,
};
use crate::destination::SESSION_FORMAT;
use crate::regular::open_regular;
use crate::seal::{check_head, is_sealed};

/// Longest header that is read; real ones are under 1 KiB.
const HEADER_BYTES_MAX: u64 = 1 << 16;
/// Most tokens of a session: more than any model has positions.
const TOKENS_MAX: usize = 1 << 24;
/// Longest conversation: more than any context holds.
const CONVERSATION_BYTES_MAX: usize = 1 << 28;

/// A saved session whose header was checked against the file's length. Whether it is as it was written shows when all is read.
#[derive(Debug)]
pub struct SessionReader {
    path: PathBuf,
    file: File,
    session: SavedSession,
    head: Vec<u8>,
    /// Hashes of the tensors read so far.
    hashes: Vec<u64>,
}

impl SessionReader {
    /// Opens a saved session, and reads all but keys and values.
    ///
    /// # Errors
    /// With what is wrong with the file.
    pub fn open(path: &Path) -> Result<Self, SessionFileError> {
        let io = |source| SessionFileError::Io { path: path.to_owned(), source };
        let no = |what: String| SessionFileError::Header { path: path.to_owned(), what };
        let mut file = open_regular(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        let mut head = vec![0; LENGTH_BYTES];
        file.read_exact(&mut head).map_err(|_| no("it has no header".into()))?;
        let header_bytes = u64::from_le_bytes(*head.first_chunk().expect("it was read"));
        let limit = HEADER_BYTES_MAX.min(length.saturating_sub(LENGTH_BYTES as u64));
        if header_bytes > limit {
            return Err(no(format!("its header claims {header_bytes} bytes, {limit} may be one")));
        }
        head.resize(LENGTH_BYTES + header_bytes as usize, 0);
        file.read_exact(&mut head[LENGTH_BYTES..]).map_err(io)?;
        // Checks that the tensors lie one after another without holes and that their sizes fit their shapes.
        let metadata: Metadata =
            serde_json::from_slice(&head[LENGTH_BYTES..]).map_err(|error| no(error.to_string()))?;
        let (claimed, found) = (metadata.data_len() as u64, length - head.len() as u64);
        if claimed != found {
            return Err(mismatch(path, "bytes of data", claimed, found));
        }
        let texts = metadata.metadata().clone().unwrap_or_default();
        let text = |key: &str| texts.get(key).map(String::as_str).ok_or_else(|| no(format!("it says no {key}")));
        if text("format")? != SESSION_FORMAT || !is_sealed(&head) {
            return Err(no("it says that it is something else".into()));
        }
        let version = text("version")?.parse().map_err(|_| no("its version is no number".into()))?;
        if version > VERSION {
            return Err(SessionFileError::TooNew { path: path.to_owned(), found: version, newest: VERSION });
        }
        let origin = Origin {
            bundle: u64::from_str_radix(text("bundle")?, 16).map_err(|_| no("its bundle is no checksum".into()))?,
            kv: text("kv")?.to_owned(),
            predicted: text("predicted")?.parse().map_err(|_| no("`predicted` is neither true nor false".into()))?,
            instructions: text("instructions")?.to_owned(),
        };
        let mut at = 0;
        let mut shape = |name: &str, dtype: Dtype, sizes: usize| {
            let info = metadata.info(name).ok_or_else(|| no(format!("there is no {name}")))?;
            if info.dtype != dtype || info.shape.len() != sizes || info.data_offsets.0 != at {
                return Err(no(format!("its {name} is {:?} {:?} at {}", info.dtype, info.shape, info.data_offsets.0)));
            }
            at = info.data_offsets.1;
            Ok(info.shape.clone())
        };
        let (ids, computed) = (shape(IDS, Dtype::U32, 1)?[0], shape(ARITHMETIC, Dtype::U8, 1)?[0]);
        let has_conversation = metadata.info(CONVERSATION).is_some();
        let conversation = if has_conversation { shape(CONVERSATION, Dtype::U8, 1)?[0] } else { 0 };
        let kv = shape(KV, Dtype::U8, 3)?;
        if metadata.tensors().len() != 3 + usize::from(has_conversation) {
            return Err(no("it has other tensors".into()));
        }
        if ids > TOKENS_MAX || computed > ids {
            let expected = format!("at most {}", ids.min(TOKENS_MAX));
            return Err(mismatch(path, "tokens", expected, ids.max(computed)));
        }
        if computed + 1 < ids {
            return Err(mismatch(path, "tokens that were computed", format!("at least {}", ids - 1), computed));
        }
        if kv[1] != computed {
            return Err(mismatch(path, "tokens with keys and values", computed, kv[1]));
        }
        let mut session = SavedSession {
            origin,
            ids: Vec::new(),
            in_piece: Vec::new(),
            conversation: None,
            planes: kv[0],
            row_bytes: kv[2],
        };
        let mut hashes = Vec::new();
        let mut bytes = vec![0; ids * size_of::<u32>()];
        file.read_exact(&mut bytes).map_err(io)?;
        hashes.push(xxh3_64(&bytes));
        session.ids = bytes.as_chunks().0.iter().map(|id| u32::from_le_bytes(*id)).collect();
        bytes.resize(computed, 0);
        file.read_exact(&mut bytes).map_err(io)?;
        hashes.push(xxh3_64(&bytes));
        session.in_piece = bytes.iter().map(|piece| *piece == 1).collect();
        if has_conversation {
            if conversation > CONVERSATION_BYTES_MAX {
                let expected = format!("at most {CONVERSATION_BYTES_MAX}");
                return Err(mismatch(path, "bytes of the conversation", expected, conversation));
            }
            bytes.resize(conversation, 0);
            file.read_exact(&mut bytes).map_err(io)?;
            hashes.push(xxh3_64(&bytes));
            let text = String::from_utf8(bytes).map_err(|_| no("its conversation is no text".into()))?;
            session.conversation = Some(text);
        }
        Ok(Self { path: path.to_owned(), file, session, head, hashes })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it holds beside keys and values: claims, until these are read.
    pub fn session(&self) -> &SavedSession {
        &self.session
    }

    /// Reads keys and values: `each` is given rows with their plane, and the token of the first. Only now it is known whether the file
    /// is as it was written.
    ///
    /// # Errors
    /// With what is wrong with the file: then nothing of it can be used.
    pub fn read_kv(&mut self, each: &mut dyn FnMut(usize, usize, &[u8])) -> Result<(), SessionFileError> {
        let (rows, row_bytes) = (self.session.in_piece.len(), self.session.row_bytes);
        // Sizes of what has no bytes are claimed for nothing.
        let planes = if rows == 0 || row_bytes == 0 { 0 } else { self.session.planes };
        let at_once = (PIECE_BYTES / row_bytes.max(1)).clamp(1, rows.max(1));
        // No longer than a plane, which is in the file.
        let mut piece = vec![0; if planes == 0 { 0 } else { at_once * row_bytes }];
        let mut hash = Xxh3::new();
        for plane in 0..planes {
            for first in (0..rows).step_by(at_once) {
                let piece = &mut piece[..at_once.min(rows - first) * row_bytes];
                self.file.read_exact(piece).map_err(SessionFileError::io(&self.path))?;
                hash.update(piece);
                each(plane, first, piece);
            }
        }
        self.hashes.truncate(2 + usize::from(self.session.conversation.is_some()));
        self.hashes.push(hash.digest());
        let damaged = |source| SessionFileError::Damaged { path: self.path.clone(), source };
        check_head(&self.head, &self.hashes).map_err(damaged)
    }
}

fn mismatch(path: &Path, what: &'static str, expected: impl ToString, found: impl ToString) -> SessionFileError {
    let (expected, found) = (expected.to_string(), found.to_string());
    SessionFileError::Mismatch { path: path.to_owned(), what, expected, found }
}
