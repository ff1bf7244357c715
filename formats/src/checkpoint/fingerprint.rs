//! What tells one checkpoint from another without reading all of it.

use std::os::unix::fs::FileExt;
use std::path::Path;

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::Checkpoint;
use crate::regular::open_regular;

impl Checkpoint {
    /// Names the checkpoint by its files: names, lengths, architecture, and pieces of the contents, 8 MiB of a file at most.
    pub fn fingerprint(&self) -> String {
        let mut text = self.spec().text();
        for file in self.files() {
            let sample = sample(&self.dir().join(&file.name), file.bytes);
            text += &format!("|{} {} {sample:016x}", file.name, file.bytes);
        }
        format!("{:016x}", xxh3_64(text.as_bytes()))
    }
}

/// Hash of pieces of a file, all over it: another training of the same model differs in every one of them. What cannot be read
/// counts as empty; whoever needs it says so.
fn sample(path: &Path, bytes: u64) -> u64 {
    const PIECES: u64 = 256;
    const PIECE_BYTES: u64 = 32 << 10;
    let mut hash = Xxh3::new();
    let Ok(file) = open_regular(path) else { return hash.digest() };
    let mut piece = vec![0; PIECE_BYTES as usize];
    let step = (bytes / PIECES).max(PIECE_BYTES);
    let mut at = 0;
    while at < bytes {
        let piece = &mut piece[..PIECE_BYTES.min(bytes - at) as usize];
        if file.read_exact_at(piece, at).is_err() {
            break;
        }
        hash.update(piece);
        at += step;
    }
    hash.digest()
}
