//! Read-only memory maps of files, for the few places where scattered access beats positional reads.
//!
//! This is the only module of the crate with `unsafe`. It knows nothing of what the files hold. Large sequential reads do
//! not belong here: mapped pages count towards a memory limit and cost a fault each.
#![expect(unsafe_code, reason = "opening a memory map is unsafe; it happens here and nowhere else in the crate")]

use std::fs::File;
use std::io;
use std::ops::Deref;

/// A whole file, mapped read-only.
pub struct FileMap(memmap2::Mmap);

impl FileMap {
    /// Map the whole of `file`, which must hold exactly `expected_bytes`.
    ///
    /// Should another process truncate the file while the map is in use, reading the lost pages ends this process with
    /// SIGBUS; so keep maps short-lived and read files from a directory that nobody rewrites.
    ///
    /// # Errors
    /// Whatever the system reports, and `InvalidData` when the file's length is not `expected_bytes`.
    pub fn open(file: &File, expected_bytes: u64) -> io::Result<Self> {
        // SAFETY: the map is private to this process and read-only; the caller promises by the contract above that the file
        // is not truncated or rewritten while it is read, and no reference outlives `self`.
        let map = unsafe { memmap2::Mmap::map(file)? };
        if map.len() as u64 != expected_bytes {
            let message = format!("the file was {expected_bytes} bytes long and now is {}", map.len());
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        Ok(Self(map))
    }
}

impl Deref for FileMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn maps_the_bytes_and_notices_another_length() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"flash").unwrap();
        assert_eq!(&FileMap::open(&file, 5).unwrap()[..], b"flash");
        assert!(FileMap::open(&file, 6).is_err());
    }
}
