//! The hidden states between two layers, in a file: `[tokens, hidden]`, f32 in the machine's byte order, and the XXH3-64 of that.
//!
//! A file that is visible under its name is complete. These are scratch files of one recording, not a format. What need not outlive
//! the process has no name: nothing can leave it behind, and nobody can put something else in its place.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use flashlm_formats::publish::{NewFile, create_directory};
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
    /// States were not written one behind the other.
    #[error("{}: states from byte {found} on where those from {expected} on are to come", path.display())]
    Order {
        /// The file.
        path: PathBuf,
        /// The next byte.
        expected: u64,
        /// Where states were to be written.
        found: u64,
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

/// Bytes of the checksum behind the states.
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
            let (mut hash, mut piece, end) = (Xxh3::new(), vec![0; PIECE_BYTES], (tokens * hidden * 4) as u64);
            let read = |piece: &mut [u8], at| states.file().read_exact_at(piece, at).map_err(io(&states.path));
            for at in (0..end).step_by(PIECE_BYTES) {
                let piece = &mut piece[..PIECE_BYTES.min((end - at) as usize)];
                read(piece, at)?;
                hash.update(piece);
            }
            let mut sum = [0; SUM_BYTES as usize];
            read(&mut sum, end)?;
            Ok(sum == hash.digest().to_le_bytes())
        };
        whole().unwrap_or(false)
    }

    /// Deletes the states that enter `layer`.
    pub fn delete(dir: &Path, layer: usize) -> Result<PathBuf, StatesError> {
        let path = Self::path(dir, layer);
        fs::remove_file(&path).map_err(io(&path))?;
        Ok(path)
    }

    /// Begins the states that enter `layer`, to be written one behind the other.
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
        let file = File::open(&path).map_err(io(&path))?;
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
            if *end != offset {
                return Err(StatesError::Order { path: self.path.clone(), expected: *end, found: offset });
            }
            hash.update(bytes);
            *end += bytes.len() as u64;
        }
        self.file().write_all_at(bytes, offset).map_err(io(&self.path))
    }

    /// Makes complete states visible.
    pub fn publish(self) -> Result<(), StatesError> {
        match self.file {
            Kept::New(mut new, hash, end) => {
                new.file().write_all_at(&hash.digest().to_le_bytes(), end).map_err(io(&self.path))?;
                new.publish().map_err(io(&self.path))
            }
            Kept::Open(_) => Ok(()),
        }
    }

    /// Deletes them.
    pub fn remove(self) -> Result<(), StatesError> {
        fs::remove_file(&self.path).map_err(io(&self.path))
    }
}

/// Deletes the directory of states.
pub fn remove_dir(dir: &Path) -> Result<(), StatesError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(io(dir)),
    }
}
