//! Regular files only, read by position, remembered as they were when opened.
//!
//! Everything that the checkpoint reader touches goes through here, so devices, pipes and oversized "small" files are
//! refused in one place. Knows no format.

use std::fs::{File, FileType, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::error::CheckpointError;
use super::foreign::Foreign;
use crate::page_cache::{Advice, advise};

/// What a file was like at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    bytes: u64,
    modified_s: i64,
    modified_ns: i64,
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self { bytes: metadata.len(), modified_s: metadata.mtime(), modified_ns: metadata.mtime_nsec() }
    }
}

/// A regular file, open for positional reads.
#[derive(Debug)]
pub(crate) struct SourceFile {
    pub(crate) path: PathBuf,
    pub(crate) name: String,
    pub(crate) file: File,
    stamp: Stamp,
}

impl SourceFile {
    /// Open `dir/name`. Links are followed, as the Hugging Face cache consists of them; what they lead to must be a file.
    pub(crate) fn open(dir: &Path, name: &str) -> Result<Self, CheckpointError> {
        let path = dir.join(name);
        let failed = |action, source: io::Error| match source.raw_os_error() {
            Some(code) if code == rustix::io::Errno::MFILE.raw_os_error() => {
                let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
                CheckpointError::TooManyOpenFiles { path: path.clone(), limit }
            }
            _ => CheckpointError::Io { action, path: path.clone(), source },
        };
        let check = |metadata: &Metadata| match irregular(metadata.file_type()) {
            Some(kind) => Err(CheckpointError::NotRegular { path: path.clone(), kind }),
            None => Ok(()),
        };
        // Looked at before it is opened, because opening a device may already do something; and again afterwards, because
        // only the open file cannot be exchanged. O_NONBLOCK keeps a pipe put there in between from blocking us.
        check(&std::fs::metadata(&path).map_err(|e| failed("open", e))?)?;
        let nonblocking = rustix::fs::OFlags::NONBLOCK.bits() as i32;
        let file =
            OpenOptions::new().read(true).custom_flags(nonblocking).open(&path).map_err(|e| failed("open", e))?;
        let metadata = file.metadata().map_err(|e| failed("open", e))?;
        check(&metadata)?;
        Ok(Self { name: name.to_owned(), file, stamp: Stamp::of(&metadata), path })
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.stamp.bytes
    }

    /// Fill `buffer` from `offset`. The end of the file inside the buffer means that the file shrank.
    pub(crate) fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), CheckpointError> {
        self.file.read_exact_at(buffer, offset).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => CheckpointError::Changed {
                path: self.path.clone(),
                change: format!("it ends before byte {offset} + {}", buffer.len()),
            },
            _ => CheckpointError::Io { action: "read", path: self.path.clone(), source },
        })
    }

    /// The whole of a small file.
    pub(crate) fn read_all(&self, limit: u64) -> Result<Vec<u8>, CheckpointError> {
        if self.bytes() > limit {
            return Err(CheckpointError::TooLarge { path: self.path.clone(), bytes: self.bytes(), limit });
        }
        let mut content = vec![0; self.bytes() as usize];
        self.read_exact_at(&mut content, 0)?;
        Ok(content)
    }

    /// The first bytes of the file, at most `N`.
    pub(crate) fn head<const N: usize>(&self) -> Result<Vec<u8>, CheckpointError> {
        let mut head = vec![0; (N as u64).min(self.bytes()) as usize];
        self.read_exact_at(&mut head, 0)?;
        Ok(head)
    }

    /// An error if length or modification time are no longer what they were.
    pub(crate) fn check_unchanged(&self) -> Result<(), CheckpointError> {
        let metadata = self.file.metadata().map_err(|source| CheckpointError::Io {
            action: "look at",
            path: self.path.clone(),
            source,
        })?;
        let now = Stamp::of(&metadata);
        let change = if now.bytes != self.stamp.bytes {
            format!("from {} to {} bytes", self.stamp.bytes, now.bytes)
        } else if now != self.stamp {
            "it was written to".to_owned()
        } else {
            return Ok(());
        };
        Err(CheckpointError::Changed { path: self.path.clone(), change })
    }

    /// Tell the kernel how `len` bytes from `offset` (0: to the end) will be used. Advice that is not taken costs only speed.
    pub(crate) fn advise(&self, offset: u64, len: u64, advice: Advice) {
        advise(&self.file, offset, len, advice);
    }
}

fn irregular(kind: FileType) -> Option<&'static str> {
    if kind.is_file() {
        None
    } else if kind.is_dir() {
        Some("a directory")
    } else if kind.is_fifo() {
        Some("a pipe")
    } else if kind.is_socket() {
        Some("a socket")
    } else {
        Some("a device")
    }
}

/// Open and read `dir/name` if it exists: a JSON or text file of at most `limit` bytes.
pub(crate) fn read_small(dir: &Path, name: &str, limit: u64) -> Result<Option<(SourceFile, Vec<u8>)>, CheckpointError> {
    let file = match SourceFile::open(dir, name) {
        Ok(file) => file,
        Err(CheckpointError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if let Some(found @ (Foreign::Empty | Foreign::GitLfsPointer | Foreign::Html)) = sniff(&file.head::<SNIFF_BYTES>()?)
    {
        return Err(CheckpointError::Foreign { path: file.path, expected: "a text file", found });
    }
    let content = file.read_all(limit)?;
    Ok(Some((file, content)))
}

/// As many bytes as [`sniff`] looks at.
pub(crate) const SNIFF_BYTES: usize = 264;

/// What a file is that is neither safetensors nor a PyTorch zip archive, by its first bytes.
pub(crate) fn sniff(head: &[u8]) -> Option<Foreign> {
    // The long 0x1950a86a20f9469cfc6c opens every torch.save file from before 1.6.
    const LEGACY_TORCH: &[u8] = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";
    let text = head.trim_ascii_start();
    let page = [&b"<!doctype"[..], b"<html", b"<?xml"]
        .iter()
        .any(|tag| text.get(..tag.len()).is_some_and(|start| start.eq_ignore_ascii_case(tag)));
    Some(match head {
        [] => Foreign::Empty,
        // Safetensors: a length below 2^48, then JSON. The length's bytes may look like anything below.
        [_, _, _, _, _, _, 0, 0, b'{', ..] => return None,
        _ if head.starts_with(b"version https://git-lfs") => Foreign::GitLfsPointer,
        _ if page => Foreign::Html,
        _ if head.starts_with(b"GGUF") => Foreign::Gguf,
        _ if head.starts_with(b"PK\x03\x04") => Foreign::Zip,
        [0x80, _, rest @ ..] if rest.starts_with(LEGACY_TORCH) => Foreign::LegacyTorch,
        // A bare pickle: the tar-based format was older still.
        [0x80, 2..=5, ..] => Foreign::LegacyTorch,
        // And that is what it looks like: a tar archive.
        _ if head.get(257..262) == Some(b"ustar") => Foreign::LegacyTorch,
        _ if head.starts_with(b"\x89HDF") => Foreign::TensorFlow,
        _ if head.starts_with(b"\x1f\x8b") => Foreign::Gzip,
        _ => return None,
    })
}
