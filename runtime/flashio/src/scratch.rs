//! A large file to measure a disk with, that nobody else sees and nothing can leave behind.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rand_xoshiro::SplitMix64;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

use crate::IoError;

/// A file of incompressible bytes, really written. Where the system can read it without one (Linux) it has no name, so that it
/// goes away with the process, whatever ends that.
#[derive(Debug)]
pub struct ScratchFile {
    path: PathBuf,
    /// Keeps what `path` names alive.
    _file: Kept,
}

#[derive(Debug)]
enum Kept {
    #[cfg(target_os = "linux")]
    Nameless(#[expect(dead_code, reason = "held for its descriptor")] File),
    #[cfg(not(target_os = "linux"))]
    Named(#[expect(dead_code, reason = "removed when dropped")] tempfile::NamedTempFile),
}

impl ScratchFile {
    /// Writes `bytes` bytes to a new file in `folder`, calling `progress` with the bytes written so far.
    pub fn create(folder: &Path, bytes: u64, progress: &mut dyn FnMut(u64)) -> Result<Self, IoError> {
        let fail = |source| IoError::Write { path: folder.join("a scratch file"), source };
        #[cfg(target_os = "linux")]
        {
            use std::os::fd::AsRawFd;
            let file = tempfile::tempfile_in(folder).map_err(fail)?;
            write_noise(&file, bytes, progress).map_err(fail)?;
            let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
            Ok(Self { path, _file: Kept::Nameless(file) })
        }
        #[cfg(not(target_os = "linux"))]
        {
            let file = tempfile::Builder::new().prefix(".flashlm-scratch-").tempfile_in(folder).map_err(fail)?;
            write_noise(file.as_file(), bytes, progress).map_err(fail)?;
            Ok(Self { path: file.path().to_owned(), _file: Kept::Named(file) })
        }
    }

    /// What opens it, in this process.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn write_noise(mut file: &File, bytes: u64, progress: &mut dyn FnMut(u64)) -> io::Result<()> {
    let mut random = SplitMix64::seed_from_u64(1);
    let mut block = vec![0u8; 4 << 20];
    let mut written = 0;
    while written < bytes {
        for word in block.chunks_exact_mut(8) {
            word.copy_from_slice(&random.next_u64().to_le_bytes());
        }
        let step = (bytes - written).min(block.len() as u64);
        file.write_all(&block[..step as usize])?;
        written += step;
        progress(written);
    }
    file.sync_all()?;
    #[cfg(any(target_os = "linux", target_os = "android", target_os = "freebsd"))]
    rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scratch_file_has_its_length_and_no_name() {
        let folder = tempfile::tempdir().unwrap();
        let scratch = ScratchFile::create(folder.path(), (5 << 20) + 3, &mut |_| {}).unwrap();
        let other = ScratchFile::create(folder.path(), 1, &mut |_| {}).unwrap();
        assert_eq!(std::fs::metadata(scratch.path()).unwrap().len(), (5 << 20) + 3);
        assert_eq!(std::fs::read(other.path()).unwrap().len(), 1);
        if cfg!(target_os = "linux") {
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "killed now, it would leave nothing");
        }
        drop((scratch, other));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
