//! The hidden states between two layers, in a file: `[tokens, hidden]`, f32 in the machine's byte order.
//!
//! A file that is visible under its name is complete. These are scratch files of one recording, not a format.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use flashlm_formats::publish::{NewFile, create_directory};

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

/// The states that enter a layer.
pub struct HiddenStates {
    file: Kept,
    path: PathBuf,
    hidden: usize,
}

enum Kept {
    New(NewFile),
    Old(File),
}

impl HiddenStates {
    fn path(dir: &Path, layer: usize) -> PathBuf {
        dir.join(format!("layer-{layer:03}.f32"))
    }

    fn file(&self) -> &File {
        match &self.file {
            Kept::New(new) => new.file(),
            Kept::Old(file) => file,
        }
    }

    /// Whether the states that enter `layer` are there.
    pub fn exists(dir: &Path, layer: usize) -> bool {
        Self::path(dir, layer).is_file()
    }

    /// Begins the states that enter `layer`.
    pub fn create(dir: &Path, layer: usize, tokens: usize, hidden: usize) -> Result<Self, StatesError> {
        create_directory(dir).map_err(io(dir))?;
        let path = Self::path(dir, layer);
        let new = NewFile::create(&path).map_err(io(&path))?;
        new.file().set_len((tokens * hidden * 4) as u64).map_err(io(&path))?;
        Ok(Self { file: Kept::New(new), path, hidden })
    }

    /// Opens the states that enter `layer`.
    pub fn open(dir: &Path, layer: usize, tokens: usize, hidden: usize) -> Result<Self, StatesError> {
        let path = Self::path(dir, layer);
        let file = File::open(&path).map_err(io(&path))?;
        let (expected, found) = ((tokens * hidden * 4) as u64, file.metadata().map_err(io(&path))?.len());
        if expected != found {
            return Err(StatesError::Length { path, expected, found });
        }
        Ok(Self { file: Kept::Old(file), path, hidden })
    }

    /// Reads states from `token` on.
    pub fn read(&self, token: usize, states: &mut [f32]) -> Result<(), StatesError> {
        let offset = (token * self.hidden * 4) as u64;
        self.file().read_exact_at(bytemuck::cast_slice_mut(states), offset).map_err(io(&self.path))
    }

    /// Writes states from `token` on.
    pub fn write(&mut self, token: usize, states: &[f32]) -> Result<(), StatesError> {
        let offset = (token * self.hidden * 4) as u64;
        self.file().write_all_at(bytemuck::cast_slice(states), offset).map_err(io(&self.path))
    }

    /// Makes complete states visible.
    pub fn publish(self) -> Result<(), StatesError> {
        match self.file {
            Kept::New(mut new) => new.publish().map_err(io(&self.path)),
            Kept::Old(_) => Ok(()),
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
