//! A large file to measure a disk with, gone when dropped.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::IoError;

/// A file of incompressible bytes, really written, removed on drop (also when the program panics).
#[derive(Debug)]
pub struct ScratchFile {
    path: PathBuf,
}

impl ScratchFile {
    /// Writes `bytes` bytes to a new file in `folder`, calling `progress` with the bytes written so far.
    pub fn create(folder: &Path, bytes: u64, progress: &mut dyn FnMut(u64)) -> Result<Self, IoError> {
        let path = folder.join(format!(".flashlm-scratch-{}", std::process::id()));
        let fail = |source| IoError::Write { path: path.clone(), source };
        let file = OpenOptions::new().write(true).create_new(true).open(&path).map_err(fail)?;
        // From here on, dropping `scratch` removes the file.
        let scratch = Self { path: path.clone() };
        write_noise(file, bytes, progress).map_err(fail)?;
        Ok(scratch)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ScratchFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn write_noise(mut file: File, bytes: u64, progress: &mut dyn FnMut(u64)) -> io::Result<()> {
    let mut random = SplitMix(1);
    let mut block = vec![0u8; 4 << 20];
    let mut written = 0;
    while written < bytes {
        for word in block.chunks_exact_mut(8) {
            word.copy_from_slice(&random.next().to_le_bytes());
        }
        let step = (bytes - written).min(block.len() as u64);
        file.write_all(&block[..step as usize])?;
        written += step;
        progress(written);
    }
    file.sync_all()?;
    #[cfg(any(target_os = "linux", target_os = "android", target_os = "freebsd"))]
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    Ok(())
}

/// Splitmix64: small, seeded, good enough to scatter offsets and defeat compression.
pub(crate) struct SplitMix(pub(crate) u64);

impl SplitMix {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scratch_file_has_its_length_and_goes_away_even_in_a_panic() {
        let folder = tempfile::tempdir().unwrap();
        let outcome = std::panic::catch_unwind(|| {
            let scratch = ScratchFile::create(folder.path(), (5 << 20) + 3, &mut |_| {}).unwrap();
            assert_eq!(std::fs::metadata(scratch.path()).unwrap().len(), (5 << 20) + 3);
            // A second one would overwrite the first.
            assert!(matches!(ScratchFile::create(folder.path(), 1, &mut |_| {}), Err(IoError::Write { .. })));
            assert!(scratch.path().exists());
            panic!("on purpose");
        });
        assert!(outcome.is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
