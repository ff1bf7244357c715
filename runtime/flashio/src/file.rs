//! Opening a file so that reads bypass the page cache, and learning what alignment that asks for.
//!
//! Knows nothing of engines. Where direct I/O is refused and not required, the file is read through the page
//! cache and told to forget what was read, and the reason can be announced.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::IoError;

/// Whether reads must, may or shall not bypass the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DirectIo {
    /// Fail where the file cannot be read directly.
    Required,
    /// Read directly where possible, through the page cache elsewhere.
    #[default]
    Optional,
    /// Read through the page cache.
    Disabled,
}

impl FromStr for DirectIo {
    type Err = IoError;
    fn from_str(word: &str) -> Result<Self, IoError> {
        match word {
            "required" => Ok(Self::Required),
            "optional" => Ok(Self::Optional),
            "disabled" => Ok(Self::Disabled),
            _ => Err(IoError::UnknownChoice { found: word.into(), expected: "required, optional, disabled" }),
        }
    }
}

impl fmt::Display for DirectIo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Required => "required",
            Self::Optional => "optional",
            Self::Disabled => "disabled",
        })
    }
}

/// How a file is really read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Past the page cache.
    Direct,
    /// Through the page cache.
    Buffered,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Direct => "direct",
            Self::Buffered => "buffered",
        })
    }
}

/// What a direct read must be a multiple of, in bytes. All 1 for buffered files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Alignment {
    /// File offsets.
    pub offset: usize,
    /// Addresses.
    pub memory: usize,
    /// Lengths.
    pub length: usize,
}

impl Alignment {
    /// No requirement.
    pub const NONE: Alignment = Alignment { offset: 1, memory: 1, length: 1 };

    /// The unit that offsets and lengths must share.
    pub fn file_unit(self) -> u64 {
        self.offset.max(self.length) as u64
    }
}

/// What tells one file from another, and from itself before a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileIdentity {
    /// Device number.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// Length in bytes.
    pub size: u64,
    /// Last modification, nanoseconds since 1970.
    pub modified_ns: i128,
}

/// A file open for positional reads.
#[derive(Debug)]
pub struct DirectFile {
    file: File,
    path: PathBuf,
    mode: Mode,
    reason: String,
    alignment: Alignment,
    identity: FileIdentity,
}

/// What opening directly came to.
enum Attempt {
    Direct(File, Alignment),
    Refused(String),
}

impl DirectFile {
    /// Opens a regular file for reading.
    pub fn open(path: &Path, direct: DirectIo) -> Result<Self, IoError> {
        let fail = |source| IoError::Open { path: path.to_path_buf(), source };
        let buffered = File::open(path).map_err(fail)?;
        let identity = identify(&buffered).map_err(fail)?;
        if !buffered.metadata().map_err(fail)?.is_file() {
            return Err(fail(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")));
        }
        let attempt = match direct {
            DirectIo::Disabled => Attempt::Refused("direct I/O is disabled".into()),
            DirectIo::Required | DirectIo::Optional => open_direct(path, identity.size),
        };
        let (file, mode, reason, alignment) = match attempt {
            Attempt::Direct(file, alignment) => {
                // The path could have been replaced between the two opens.
                same_file(path, identity, identify(&file).map_err(fail)?)?;
                (file, Mode::Direct, String::new(), alignment)
            }
            Attempt::Refused(reason) if direct == DirectIo::Required => {
                let filesystem = filesystem_name(&buffered);
                return Err(IoError::DirectRefused { path: path.to_path_buf(), filesystem, reason });
            }
            Attempt::Refused(reason) => {
                advise_random(&buffered);
                (buffered, Mode::Buffered, reason, Alignment::NONE)
            }
        };
        Ok(Self { file, path: path.to_path_buf(), mode, reason, alignment, identity })
    }

    /// How the file is read.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Why the file is read through the page cache; empty when it is not.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// What reads must be aligned to.
    pub fn alignment(&self) -> Alignment {
        self.alignment
    }

    /// Length in bytes at opening.
    pub fn len(&self) -> u64 {
        self.identity.size
    }

    /// Whether the file was empty at opening.
    pub fn is_empty(&self) -> bool {
        self.identity.size == 0
    }

    /// The path given to `open`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's identity at opening.
    pub fn identity(&self) -> FileIdentity {
        self.identity
    }

    /// Checks that neither the open file nor what its path names has changed since opening.
    pub fn check_unchanged(&self) -> Result<(), IoError> {
        let fail = |source| IoError::Open { path: self.path.clone(), source };
        same_file(&self.path, self.identity, identify(&self.file).map_err(fail)?)?;
        let named = File::open(&self.path).and_then(|file| identify(&file)).map_err(fail)?;
        same_file(&self.path, self.identity, named)
    }

    /// Length now, for error texts.
    pub(crate) fn length_now(&self) -> u64 {
        self.file.metadata().map(|m| m.len()).unwrap_or(0)
    }

    /// Keeps the page cache from growing with what was just read. Nothing to do for direct files.
    pub(crate) fn forget(&self, offset: u64, length: u64) {
        #[cfg(any(target_os = "linux", target_os = "android", target_os = "freebsd"))]
        if self.mode == Mode::Buffered {
            use rustix::fs::{Advice, fadvise};
            let _ = fadvise(&self.file, offset, std::num::NonZeroU64::new(length), Advice::DontNeed);
        }
        #[cfg(not(any(target_os = "linux", target_os = "android", target_os = "freebsd")))]
        let _ = (offset, length);
    }
}

impl AsFd for DirectFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn identify(file: &File) -> io::Result<FileIdentity> {
    let m = file.metadata()?;
    Ok(FileIdentity {
        device: m.dev(),
        inode: m.ino(),
        size: m.len(),
        modified_ns: i128::from(m.mtime()) * 1_000_000_000 + i128::from(m.mtime_nsec()),
    })
}

fn same_file(path: &Path, expected: FileIdentity, found: FileIdentity) -> Result<(), IoError> {
    let differs = |what, a: &dyn fmt::Display, b: &dyn fmt::Display| {
        Err(IoError::FileChanged { path: path.to_path_buf(), what, expected: a.to_string(), found: b.to_string() })
    };
    if expected.device != found.device {
        differs("device", &expected.device, &found.device)
    } else if expected.inode != found.inode {
        differs("inode", &expected.inode, &found.inode)
    } else if expected.size != found.size {
        differs("length", &expected.size, &found.size)
    } else if expected.modified_ns != found.modified_ns {
        differs("modification time", &expected.modified_ns, &found.modified_ns)
    } else {
        Ok(())
    }
}

#[cfg(any(target_os = "linux", target_os = "android", target_os = "freebsd"))]
fn advise_random(file: &File) {
    let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::Random);
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_os = "freebsd")))]
fn advise_random(_: &File) {}

/// macOS has no O_DIRECT: F_NOCACHE keeps reads out of the page cache and asks for no alignment, but is fastest
/// when page-aligned.
#[cfg(target_vendor = "apple")]
fn open_direct(path: &Path, _length: u64) -> Attempt {
    let opened = File::open(path).and_then(|file| {
        rustix::fs::fcntl_nocache(&file, true)?;
        Ok(file)
    });
    match opened {
        Ok(file) => Attempt::Direct(file, Alignment { offset: 4096, memory: 4096, length: 4096 }),
        Err(error) => Attempt::Refused(format!("F_NOCACHE failed: {error}")),
    }
}

#[cfg(not(any(target_vendor = "apple", target_os = "linux", target_os = "android", target_os = "freebsd")))]
fn open_direct(_path: &Path, _length: u64) -> Attempt {
    Attempt::Refused("flashlm knows no direct I/O on this platform".into())
}

#[cfg(any(target_os = "linux", target_os = "android", target_os = "freebsd"))]
fn open_direct(path: &Path, length: u64) -> Attempt {
    use std::os::unix::fs::OpenOptionsExt;
    let flag = rustix::fs::OFlags::DIRECT.bits() as i32;
    let file = match File::options().read(true).custom_flags(flag).open(path) {
        Ok(file) => file,
        Err(error) => return Attempt::Refused(format!("opening with O_DIRECT failed: {error}")),
    };
    let alignment = match stated_alignment(&file) {
        Some(alignment) if alignment.offset == 0 || alignment.memory == 0 => {
            return Attempt::Refused("the file system reports no direct I/O for this file".into());
        }
        stated => stated,
    };
    match probe_alignment(&file, length, alignment) {
        Ok(alignment) => Attempt::Direct(file, alignment),
        Err(error) => Attempt::Refused(format!("a direct read failed: {error}")),
    }
}

/// What the kernel states (Linux 6.1 and later); zeros where direct I/O is not supported.
#[cfg(target_os = "linux")]
fn stated_alignment(file: &File) -> Option<Alignment> {
    use rustix::fs::{AtFlags, StatxFlags, statx};
    let stat = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    if stat.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        return None;
    }
    // Reads may allow a finer offset than writes (Linux 6.14 and later); zero where that is not stated.
    let offset = match stat.stx_dio_read_offset_align {
        0 => stat.stx_dio_offset_align,
        read => read,
    } as usize;
    Some(Alignment { offset, memory: stat.stx_dio_mem_align as usize, length: offset })
}

#[cfg(any(target_os = "android", target_os = "freebsd"))]
fn stated_alignment(_: &File) -> Option<Alignment> {
    None
}

/// Reads one block at the stated alignment, or the smallest of the usual ones that works.
#[cfg(any(target_os = "linux", target_os = "android", target_os = "freebsd"))]
fn probe_alignment(file: &File, length: u64, stated: Option<Alignment>) -> io::Result<Alignment> {
    use rustix::io::{Errno, pread};
    let mut memory = crate::AlignedMemory::new(256 << 10).map_err(io::Error::other)?;
    let usual = [512usize, 1024, 2048, 4096, 8192, 16384, 65536].map(|n| Alignment { offset: n, memory: n, length: n });
    let candidates = match &stated {
        Some(alignment) => std::slice::from_ref(alignment),
        None => &usual[..],
    };
    let mut last = Errno::INVAL;
    for &alignment in candidates {
        let unit = alignment.offset;
        if !unit.is_power_of_two() || !alignment.memory.is_power_of_two() || unit + alignment.memory > memory.len() {
            continue;
        }
        // An odd multiple of the unit in file and memory, so that a coarser requirement shows.
        let offset = if length >= 2 * unit as u64 { unit } else { 0 };
        let buffer = &mut memory.as_mut_slice()[alignment.memory..alignment.memory + unit];
        match pread(file, buffer, offset as u64) {
            Ok(_) => return Ok(alignment),
            Err(errno) => last = errno,
        }
    }
    Err(last.into())
}

/// The filesystem's name where it is a well-known one, else its magic number.
#[cfg(target_os = "linux")]
fn filesystem_name(file: &File) -> String {
    let Ok(stat) = rustix::fs::fstatfs(file) else { return "an unknown filesystem".into() };
    let magic = stat.f_type as u32;
    match magic {
        0xEF53 => "ext4",
        0x5846_5342 => "xfs",
        0x9123_683E => "btrfs",
        0x0102_1994 => "tmpfs",
        0x794C_7630 => "overlayfs",
        0x6969 => "nfs",
        0x2FC1_2FC1 => "zfs",
        0xF2F5_2010 => "f2fs",
        0x6573_5546 => "fuse",
        0x0102_1997 => "9p",
        0x4244_4900..=0x4244_49FF => "bdevfs",
        _ => return format!("filesystem type {magic:#x}"),
    }
    .into()
}

#[cfg(not(target_os = "linux"))]
fn filesystem_name(_: &File) -> String {
    "this filesystem".into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file_of(bytes: usize) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&vec![1; bytes]).unwrap();
        file.as_file().sync_all().unwrap();
        file
    }

    #[test]
    fn words_and_choices_match() {
        for choice in [DirectIo::Required, DirectIo::Optional, DirectIo::Disabled] {
            assert_eq!(choice.to_string().parse::<DirectIo>().unwrap(), choice);
        }
        assert!(matches!("maybe".parse::<DirectIo>(), Err(IoError::UnknownChoice { .. })));
    }

    #[test]
    fn disabled_reads_through_the_page_cache_and_says_so() {
        let scratch = file_of(10_000);
        let file = DirectFile::open(scratch.path(), DirectIo::Disabled).unwrap();
        assert_eq!((file.mode(), file.alignment(), file.len()), (Mode::Buffered, Alignment::NONE, 10_000));
        assert!(file.reason().contains("disabled"));
    }

    #[test]
    fn a_missing_file_and_a_directory_are_typed_errors() {
        let folder = tempfile::tempdir().unwrap();
        for path in [folder.path().join("absent"), folder.path().to_path_buf()] {
            assert!(matches!(DirectFile::open(&path, DirectIo::Optional), Err(IoError::Open { .. })), "{path:?}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn required_explains_a_refusal() {
        // procfs has no direct I/O anywhere.
        let error = DirectFile::open(Path::new("/proc/self/maps"), DirectIo::Required).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, IoError::DirectRefused { .. }), "{text}");
        assert!(text.contains("0x9fa0") && text.contains("optional"), "{text}");
    }

    #[test]
    fn changes_are_noticed() {
        let scratch = file_of(10_000);
        let file = DirectFile::open(scratch.path(), DirectIo::Optional).unwrap();
        file.check_unchanged().unwrap();
        scratch.as_file().set_len(9_000).unwrap();
        assert!(matches!(file.check_unchanged(), Err(IoError::FileChanged { what: "length", .. })));

        let scratch = file_of(10_000);
        let file = DirectFile::open(scratch.path(), DirectIo::Optional).unwrap();
        let other = file_of(10_000);
        std::fs::rename(other.path(), scratch.path()).unwrap();
        assert!(matches!(file.check_unchanged(), Err(IoError::FileChanged { what: "inode", .. })));
    }
}
