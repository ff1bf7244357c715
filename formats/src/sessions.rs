//! Saved sessions: the ids of a text, and their keys and values, so that they need not be computed again.
//!
//! A safetensors file with a seal. `ids` are the tokens; `arithmetic` says how each of those that were computed was: 0 alone, 1 in a
//! piece of a prompt, which decides its bits. `conversation`, where there is one, is text of the runtime's. `kv` has their keys and values, `[planes, tokens, row bytes]`: what a plane is, the
//! runtime knows. The metadata say which bundle they belong to and how they were computed.

mod reader;
mod writer;

use std::path::{Path, PathBuf};

pub use reader::SessionReader;
pub use writer::write_session;

use crate::seal::SealBroken;

/// The version this build writes and reads.
const VERSION: u32 = 2;
/// Tensors.
const IDS: &str = "ids";
const ARITHMETIC: &str = "arithmetic";
const CONVERSATION: &str = "conversation";
const KV: &str = "kv";
/// Bytes of the length that precedes a safetensors header.
const LENGTH_BYTES: usize = 8;
/// Bytes of keys and values that are read or written at once.
const PIECE_BYTES: usize = 1 << 18;

/// What a session was computed with: all of it decides bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Which bundle: what its sections hash to.
    pub bundle: u64,
    /// How keys and values are stored, such as `f16`.
    pub kv: String,
    /// Whether predictors chose the neurons.
    pub predicted: bool,
    /// The instruction set.
    pub instructions: String,
}

/// What a saved session holds, keys and values apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedSession {
    /// What it was computed with.
    pub origin: Origin,
    /// The text.
    pub ids: Vec<u32>,
    /// For each of the first tokens, as far as they were computed: whether in a piece of a prompt.
    pub in_piece: Vec<bool>,
    /// The conversation that the text is of, as the runtime writes it down.
    pub conversation: Option<String>,
    /// Parts of which each has a row for every token, and the bytes of a row.
    pub planes: usize,
    /// See `planes`.
    pub row_bytes: usize,
}

impl SavedSession {
    /// Bytes of a plane.
    fn plane_bytes(&self) -> usize {
        self.in_piece.len() * self.row_bytes
    }
}

/// What can be wrong with a saved session.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionFileError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The header is not what a saved session has.
    #[error("{} is not a saved session: {what}; remove it, or give another --session", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A length or a number is not what it should be.
    #[error("{}: {what}: expected {expected}, found {found}; remove it, and the session begins anew", path.display())]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// Which.
        what: &'static str,
        /// What would be right.
        expected: String,
        /// What is there.
        found: String,
    },
    /// Written by a later version of flashlm.
    #[error("{}: session version {found} is newer than {newest}, the newest that this build reads", path.display())]
    TooNew {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest known one.
        newest: u32,
    },
    /// It is not as it was written.
    #[error("{}: {source}; remove it, and the session begins anew", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The two checksums.
        source: SealBroken,
    },
}

impl SessionFileError {
    fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_owned(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::destination::{Destination, FileKind};

    fn saved() -> SavedSession {
        let origin = Origin { bundle: 7, kv: "f16".into(), predicted: true, instructions: "plain".into() };
        let (ids, in_piece) = (vec![2, 9, 4, 9], vec![true, true, false]);
        SavedSession { origin, ids, in_piece, conversation: None, planes: 5, row_bytes: 6 }
    }

    fn row(plane: usize, at: usize) -> Vec<u8> {
        (0..6).map(|byte| (plane * 31 + at * 7 + byte) as u8).collect()
    }

    fn write(path: &Path) {
        write_with(path, None);
    }

    fn write_with(path: &Path, conversation: Option<&str>) {
        let destination = Destination::take(path, FileKind::Session, &[]).unwrap();
        let saved = SavedSession { conversation: conversation.map(str::to_owned), ..saved() };
        write_session(destination, &saved, &mut |plane, write| (0..3).try_for_each(|at| write(&row(plane, at))))
            .unwrap();
    }

    fn read(path: &Path) -> Result<(SavedSession, Vec<u8>), SessionFileError> {
        let mut reader = SessionReader::open(path)?;
        let mut all = Vec::new();
        reader.read_kv(&mut |plane, first, bytes| {
            assert_eq!(all.len(), plane * 18 + first * 6);
            all.extend_from_slice(bytes);
        })?;
        Ok((reader.session().clone(), all))
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("session");
        write(&path);
        // In place of itself, too.
        write(&path);
        let (found, kv) = read(&path).unwrap();
        assert_eq!(found, saved());
        let expected: Vec<u8> = (0..5).flat_map(|plane| (0..3).flat_map(move |at| row(plane, at))).collect();
        assert_eq!(kv, expected);
    }

    #[test]
    fn a_conversation_is_kept_beside_the_text() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("session");
        for text in ["", "{\"said\": \"é\"}"] {
            write_with(&path, Some(text));
            let (found, kv) = read(&path).unwrap();
            assert_eq!((found.conversation.as_deref(), kv.len()), (Some(text), 90));
            let good = std::fs::read(&path).unwrap();
            for at in 0..good.len() {
                let mut damaged = good.clone();
                damaged[at] ^= 1;
                std::fs::write(&path, &damaged).unwrap();
                assert!(read(&path).is_err(), "byte {at}");
            }
            std::fs::write(&path, &good).unwrap();
        }
    }

    #[test]
    fn a_file_that_is_not_whole_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("session");
        write(&path);
        let good = std::fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut damaged = good.clone();
            damaged[at] ^= 1;
            std::fs::write(&path, &damaged).unwrap();
            assert!(read(&path).is_err(), "byte {at}");
            std::fs::write(&path, &good[..at]).unwrap();
            assert!(read(&path).is_err(), "{at} bytes");
        }
        std::fs::write(&path, [&good[..], b"x"].concat()).unwrap();
        assert!(read(&path).is_err(), "one byte more");
    }

    /// A header that says anything, sealed.
    fn claiming(path: &Path, change: &dyn Fn(&mut serde_json::Value), data: usize) -> String {
        _ = std::fs::remove_file(path);
        write(path);
        let good = std::fs::read(path).unwrap();
        let length = u64::from_le_bytes(*good.first_chunk().unwrap()) as usize;
        let mut header: serde_json::Value = serde_json::from_slice(&good[8..8 + length]).unwrap();
        header["__metadata__"]["seal"] = crate::seal::SEAL.1.into();
        change(&mut header);
        let header = header.to_string();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.bytes());
        file.extend(&good[8 + length..]);
        file.resize(8 + header.len() + data, 0);
        if serde_json::from_str::<safetensors::tensor::Metadata>(&header).is_ok() {
            crate::seal::seal(&mut file);
        }
        std::fs::write(path, &file).unwrap();
        read(path).expect_err("it is no session").to_string()
    }

    #[test]
    fn claims_are_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("session");
        const DATA: usize = 16 + 3 + 90;
        let said = |change: &dyn Fn(&mut serde_json::Value)| claiming(&path, change, DATA);
        let set = |tensor: &'static str, shape: serde_json::Value| {
            move |header: &mut serde_json::Value| header[tensor]["shape"] = shape.clone()
        };
        let meta = |key: &'static str, value: &'static str| {
            move |header: &mut serde_json::Value| header["__metadata__"][key] = value.into()
        };
        assert!(said(&meta("version", "3")).contains("newer than 2"));
        assert!(said(&meta("format", "other")).contains("not a saved session"));
        assert!(said(&meta("bundle", "zz")).contains("not a saved session"));
        assert!(said(&meta("predicted", "perhaps")).contains("not a saved session"));
        for shape in
            [serde_json::json!([1_u64 << 60, 3, 6]), [5, 4, 6].into(), [15, 1, 6].into(), [90].as_slice().into()]
        {
            let told = said(&set("kv", shape.clone()));
            assert!(told.contains("expected") || told.contains("not a saved session"), "{shape}: {told}");
        }
        // More tokens computed than there are.
        let more = |header: &mut serde_json::Value| {
            header["ids"] = serde_json::json!({"dtype": "U32", "shape": [2], "data_offsets": [0, 8]});
            header["arithmetic"] = serde_json::json!({"dtype": "U8", "shape": [3], "data_offsets": [8, 11]});
            header["kv"] = serde_json::json!({"dtype": "U8", "shape": [5, 3, 6], "data_offsets": [11, 101]});
        };
        assert!(claiming(&path, &more, 101).contains("expected at most 2"));
        let gone = |header: &mut serde_json::Value| _ = header.as_object_mut().unwrap().remove("kv");
        assert!(claiming(&path, &gone, 19).contains("no kv"));
    }
}
