//! A checkpoint's contents as one short name: all of its weights and everything that stands in its configuration.
//!
//! Reading all weights takes a while, so the hash of each file is kept, with what the file system says when a file is written to.

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::time::{SystemTime, UNIX_EPOCH};

use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::regular::open_regular;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use super::error::{PrepareError, io_error};
use super::event::{Running, Task};
use super::stamp::fingerprint;
use super::work::{SOURCE, Work, publish_sealed};

/// Bytes read at once.
const PIECE_BYTES: usize = 4 << 20;
/// A file that was written to so lately may be again without looking different.
const SETTLED_S: i64 = 2;

#[derive(Clone, Serialize, Deserialize, PartialEq)]
struct Stat {
    bytes: u64,
    inode: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

#[derive(Clone, Serialize, Deserialize, PartialEq)]
struct Kept {
    name: String,
    stat: Stat,
    hash: String,
}

/// Names all files that decide what the model is, by their names and contents.
pub(super) fn source_hash(checkpoint: &Checkpoint, work: &Work<'_>) -> Result<String, PrepareError> {
    let path = work.path(SOURCE);
    let kept: Vec<Kept> = work.read_sealed(&path).unwrap_or_default();
    let task = Running::begin(work.observer, Task::ReadingCheckpoint);
    let (mut done, total) = (0, checkpoint.files().iter().map(|file| file.bytes).sum());
    let mut files = Vec::new();
    for file in checkpoint.files() {
        let path = checkpoint.dir().join(&file.name);
        let metadata = path.metadata().map_err(io_error("cannot read", &path))?;
        let stat = Stat {
            bytes: metadata.len(),
            inode: metadata.ino(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        };
        let known = kept.iter().find(|kept| kept.name == file.name && kept.stat == stat);
        let hash = match known {
            Some(kept) => kept.hash.clone(),
            None => {
                let mut source = open_regular(&path).map_err(io_error("cannot read", &path))?;
                let (mut hash, mut piece) = (Xxh3::new(), vec![0; PIECE_BYTES]);
                loop {
                    let read = source.read(&mut piece).map_err(io_error("cannot read", &path))?;
                    if read == 0 {
                        break;
                    }
                    hash.update(&piece[..read]);
                    task.at(done + read as u64, total);
                    done += read as u64;
                }
                format!("{:016x}", hash.digest())
            }
        };
        files.push(Kept { name: file.name, stat, hash });
    }
    drop(task);
    checkpoint.drop_page_cache();
    checkpoint.check_unchanged()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs() as i64);
    let settled: Vec<Kept> = files.iter().filter(|file| file.stat.changed.0 + SETTLED_S < now).cloned().collect();
    if settled != kept {
        // What cannot be kept, as on a full disk, is read again the next time.
        _ = publish_sealed(&path, &settled, &[]);
    }
    let parts: Vec<&str> = files.iter().flat_map(|file| [file.name.as_str(), &file.hash]).collect();
    Ok(fingerprint(&parts))
}
