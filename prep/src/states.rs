//! The hidden states between two layers, in a file: `[tokens, hidden]`, f32 in the machine's byte order, and the XXH3-64 of that.
//!
//! A file that is visible under its name is complete. These are scratch files of one recording, not a format. What need not outlive
//! the process has no name: nothing can leave it behind, and nobody can put something else in its place.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use flashlm_formats::publish::{NewFile, create_directory};
use flashlm_formats::regular::open_regular;
use xxhash_rust::xxh3::Xxh3;

/// The file of hidden states could not be used.
#[derive(Debug, thiserror::Error)]
pub enum StatesError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
    /// The file has another length than the recording needs.
    #[error("{} has {found} bytes, expected {expected}; delete the recording's directory and record again", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Bytes needed.
        expected: u64,
        /// Bytes there.
        found: u64,
    },
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> StatesError + '_ {
    move |source| StatesError::Io { path: path.to_path_buf(), source }
}

/// Bytes of the checksum after the states.
const SUM_BYTES: u64 = 8;
/// Bytes read at once to check it.
const PIECE_BYTES: usize = 1 << 20;

/// The states that enter a layer.
pub struct HiddenStates {
    file: Kept,
    path: PathBuf,
    hidden: usize,
}

enum Kept {
    New(NewFile, Box<Xxh3>, u64),
    /// Opened by its name, or without one.
    Open(File),
}

impl HiddenStates {
    fn path(dir: &Path, layer: usize) -> PathBuf {
        dir.join(format!("layer-{layer:03}.f32"))
    }

    fn file(&self) -> &File {
        match &self.file {
            Kept::New(new, ..) => new.file(),
            Kept::Open(file) => file,
        }
    }

    /// Whether the states that enter `layer` are there.
    pub fn exists(dir: &Path, layer: usize) -> bool {
        Self::path(dir, layer).is_file()
    }

    /// Whether the states that enter `layer` are as they were written.
    pub fn is_whole(dir: &Path, layer: usize, tokens: usize, hidden: usize) -> bool {
        let whole = || -> Result<bool, StatesError> {
            let states = Self::open(dir, layer, tokens, hidden)?;
            let end = (tokens * hidden * 4) as u64;
            let mut sum = [0; SUM_BYTES as usize];
            states.file().read_exact_at(&mut sum, end).map_err(io(&states.path))?;
            Ok(sum == hash_of(states.file(), end).map_err(io(&states.path))?.to_le_bytes())
        };
        whole().unwrap_or(false)
    }

    /// Deletes the states that enter `layer`.
    pub fn delete(dir: &Path, layer: usize) -> Result<PathBuf, StatesError> {
        let path = Self::path(dir, layer);
        fs::remove_file(&path).map_err(io(&path))?;
        Ok(path)
    }

    /// Begins the states that enter `layer`.
    pub fn create(dir: &Path, layer: usize, tokens: usize, hidden: usize) -> Result<Self, StatesError> {
        create_directory(dir).map_err(io(dir))?;
        let path = Self::path(dir, layer);
        let new = NewFile::create(&path).map_err(io(&path))?;
        new.file().set_len((tokens * hidden * 4) as u64 + SUM_BYTES).map_err(io(&path))?;
        Ok(Self { file: Kept::New(new, Box::default(), 0), path, hidden })
    }

    /// Begins states without a name, in a file in `dir` that goes away with this value, or with the process.
    pub fn temporary(dir: &Path, tokens: usize, hidden: usize) -> Result<Self, StatesError> {
        create_directory(dir).map_err(io(dir))?;
        let file = tempfile::tempfile_in(dir).map_err(io(dir))?;
        file.set_len((tokens * hidden * 4) as u64).map_err(io(dir))?;
        Ok(Self { file: Kept::Open(file), path: dir.join("scratch file"), hidden })
    }

    /// Opens the states that enter `layer`.
    pub fn open(dir: &Path, layer: usize, tokens: usize, hidden: usize) -> Result<Self, StatesError> {
        let path = Self::path(dir, layer);
        let file = open_regular(&path).map_err(io(&path))?;
        let (expected, found) = ((tokens * hidden * 4) as u64 + SUM_BYTES, file.metadata().map_err(io(&path))?.len());
        if expected != found {
            return Err(StatesError::Length { path, expected, found });
        }
        Ok(Self { file: Kept::Open(file), path, hidden })
    }

    /// Reads states from `token` on.
    pub fn read(&self, token: usize, states: &mut [f32]) -> Result<(), StatesError> {
        let offset = (token * self.hidden * 4) as u64;
        self.file().read_exact_at(bytemuck::cast_slice_mut(states), offset).map_err(io(&self.path))
    }

    /// Writes states from `token` on.
    pub fn write(&mut self, token: usize, states: &[f32]) -> Result<(), StatesError> {
        let (offset, bytes) = ((token * self.hidden * 4) as u64, bytemuck::cast_slice(states));
        if let Kept::New(_, hash, end) = &mut self.file {
            // Mostly they come one after another; else all is read again in the end.
            if *end == offset {
                hash.update(bytes);
                *end += bytes.len() as u64;
            } else {
                *end = u64::MAX;
            }
        }
        self.file().write_all_at(bytes, offset).map_err(io(&self.path))
    }

    /// Makes complete states visible.
    pub fn publish(self) -> Result<(), StatesError> {
        match self.file {
            Kept::New(mut new, hash, end) => {
                let all = |file: &File| -> std::io::Result<()> {
                    let bytes = file.metadata()?.len() - SUM_BYTES;
                    let sum = if end == bytes { hash.digest() } else { hash_of(file, bytes)? };
                    file.write_all_at(&sum.to_le_bytes(), bytes)
                };
                all(new.file()).and_then(|()| new.publish()).map_err(io(&self.path))
            }
            Kept::Open(_) => Ok(()),
        }
    }

    /// Deletes them.
    pub fn remove(self) -> Result<(), StatesError> {
        fs::remove_file(&self.path).map_err(io(&self.path))
    }
}

/// The checksum of the first `bytes` of a file.
fn hash_of(file: &File, bytes: u64) -> std::io::Result<u64> {
    let (mut hash, mut piece) = (Xxh3::new(), vec![0; PIECE_BYTES]);
    for at in (0..bytes).step_by(PIECE_BYTES) {
        let piece = &mut piece[..PIECE_BYTES.min((bytes - at) as usize)];
        file.read_exact_at(piece, at)?;
        hash.update(piece);
    }
    Ok(hash.digest())
}

/// Deletes the directory of states.
pub fn remove_dir(dir: &Path) -> Result<(), StatesError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(io(dir)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_whole_in_whatever_order_they_were_written() {
        let dir = tempfile::tempdir().unwrap();
        for (layer, order) in [[0, 1, 2], [2, 0, 1], [0, 2, 2], [1, 1, 1]].into_iter().enumerate() {
            let mut states = HiddenStates::create(dir.path(), layer, 3, 2).unwrap();
            order.iter().for_each(|&token| states.write(token, &[token as f32, 1.0]).unwrap());
            states.publish().unwrap();
            assert!(HiddenStates::is_whole(dir.path(), layer, 3, 2), "{order:?}");
            let path = HiddenStates::path(dir.path(), layer);
            let whole = fs::read(&path).unwrap();
            for at in 0..whole.len() {
                let mut damaged = whole.clone();
                damaged[at] ^= 1;
                fs::write(&path, damaged).unwrap();
                assert!(!HiddenStates::is_whole(dir.path(), layer, 3, 2), "byte {at}");
            }
        }
    }
}
