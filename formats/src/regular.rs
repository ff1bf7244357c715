//! Opening files that must be files: no pipe, no device, no directory under their name.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Opens a regular file for reading. A pipe or device under that name is neither waited for nor touched.
///
/// # Errors
/// What the system says; `IsADirectory`, or `InvalidInput` for what is no file.
pub fn open_regular(path: &Path) -> io::Result<File> {
    open(OpenOptions::new().read(true), path)
}

/// Opens a regular file for reading and writing, as [`open_regular`] does for reading.
///
/// # Errors
/// As [`open_regular`].
pub fn open_regular_for_change(path: &Path) -> io::Result<File> {
    open(OpenOptions::new().read(true).write(true), path)
}

fn open(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    // Opening a device may already do something, so the name is looked at first; what was opened is looked at as well, since
    // only that cannot be exchanged. O_NONBLOCK keeps a pipe put there in between from blocking.
    refuse(&path.metadata()?)?;
    let flag = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let file = options.custom_flags(flag).open(path)?;
    refuse(&file.metadata()?)?;
    Ok(file)
}

/// The contents of a regular file of at most `bytes_max` bytes.
///
/// # Errors
/// As [`open_regular`], and `FileTooLarge`.
pub fn read_regular(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let file = open_regular(path)?;
    let bytes = file.metadata()?.len();
    if bytes > bytes_max {
        let what = format!("it has {bytes} bytes, and {bytes_max} are the most it can have");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, what));
    }
    let mut contents = Vec::new();
    // Files in /proc state no length, and others may grow.
    file.take(bytes_max).read_to_end(&mut contents)?;
    Ok(contents)
}

fn refuse(metadata: &std::fs::Metadata) -> io::Result<()> {
    if metadata.is_file() {
        Ok(())
    } else if metadata.is_dir() {
        Err(io::Error::new(io::ErrorKind::IsADirectory, "it is a directory"))
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidInput, "it is a pipe or a device, not a file"))
    }
}
