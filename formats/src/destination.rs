//! File ownership: what a command's output may replace.
//!
//! A command that writes takes its destination before it works. It replaces nothing but what it writes itself, known by its contents and
//! not by its name; and never a file that it reads, known by device and inode and not by its spelling.

mod directory;
mod kind;

use std::fs::{File, Metadata};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

pub use directory::{Directory, DirectoryKind, WORK_MARK};
pub use kind::{
    FileKind, LOGITS_FORMAT, MANUAL_MARK, ORDERS_FORMAT, PREDICTORS_FORMAT, REPORT_DATA_FORMAT, REPORT_MARK,
    SESSION_FORMAT, THRESHOLDS_FORMAT,
};

use crate::publish::{NewFile, is_same, temporary_path};

/// Why nothing is written there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DestinationError {
    /// It would destroy what the command reads.
    #[error("{} is {}, which this command reads: give the output another name", path.display(), input.display())]
    Input {
        /// The destination.
        path: PathBuf,
        /// The input, as it was given.
        input: PathBuf,
    },
    /// Another kind of file has that name.
    #[error(
        "{} is there and is not {what}, so it is left alone: give the output another name, or remove it yourself",
        path.display()
    )]
    Stranger {
        /// The destination.
        path: PathBuf,
        /// What would be replaced.
        what: &'static str,
    },
    /// A pipe or a device has that name: a file in its place would take it from everybody.
    #[error("cannot write {}: it is a pipe or a device, and no file is put in its place", path.display())]
    NoFile {
        /// The destination.
        path: PathBuf,
    },
    /// A file of this kind is there, and replacing it has to be asked for.
    #[error("{} exists already; remove it, or allow it to be overwritten (--force)", path.display())]
    Exists {
        /// The destination.
        path: PathBuf,
    },
    /// A directory has the name of a file.
    #[error("cannot write {}: it is a directory, and the output is a file: give it a name in it", path.display())]
    IsDirectory {
        /// The destination.
        path: PathBuf,
    },
    /// A file has the name of a directory.
    #[error("cannot write into {}: it is a file, and the output is a directory: give another name", path.display())]
    IsFile {
        /// The destination.
        path: PathBuf,
    },
    /// The directory is somebody else's.
    #[error(
        "{} is not {what}: {entry:?} is in it, which {maker} did not write; give a new or an empty directory",
        path.display()
    )]
    StrangeDirectory {
        /// The directory.
        path: PathBuf,
        /// What it would have to be.
        what: &'static str,
        /// Who makes such.
        maker: &'static str,
        /// What is in it.
        entry: String,
    },
    /// Something that is no file has the name of a file that the command writes there.
    #[error(
        "{} is a directory, a pipe or a device, where {maker} writes a file of that name: move it away, or give another directory",
        path.display()
    )]
    NoFileInside {
        /// What is there.
        path: PathBuf,
        /// Who writes there.
        maker: &'static str,
    },
    /// Another process has it.
    #[error("{} is in use: another process is writing it; wait for it to end, or give another name", path.display())]
    Busy {
        /// The destination.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot write {}: {source}", path.display())]
    Io {
        /// The destination.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
}

impl DestinationError {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| match source.kind() {
            io::ErrorKind::ResourceBusy => Self::Busy { path: path.to_owned() },
            _ => Self::Io { path: path.to_owned(), source },
        }
    }
}

/// What is at a destination that may be written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum There {
    /// Nothing that could be lost: no file, or an empty one.
    Nothing,
    /// A file of the kind that is to be written.
    Own,
}

/// Looks whether a file of this kind may be put at `path` by a command that reads `inputs`, files or directories.
///
/// # Errors
/// All but `Exists` and `Busy`.
pub fn check_file(path: &Path, kind: FileKind, inputs: &[PathBuf]) -> Result<There, DestinationError> {
    let failed = DestinationError::io;
    refuse_temporary_name(path, inputs)?;
    let there = match path.metadata() {
        Ok(there) => there,
        Err(error) if error.kind() == io::ErrorKind::NotFound && path.symlink_metadata().is_err() => {
            return Ok(There::Nothing);
        }
        // A link that leads nowhere is somebody's, too.
        Err(error) => return Err(failed(path)(error)),
    };
    if there.is_dir() {
        return Err(DestinationError::IsDirectory { path: path.to_owned() });
    }
    if let Some(input) = input_that_is(&there, inputs) {
        return Err(DestinationError::Input { path: path.to_owned(), input });
    }
    if !there.is_file() {
        return Err(DestinationError::NoFile { path: path.to_owned() });
    }
    if there.len() == 0 {
        return Ok(There::Nothing);
    }
    if kind.is(path).map_err(failed(path))? {
        return Ok(There::Own);
    }
    Err(DestinationError::Stranger { path: path.to_owned(), what: kind.name() })
}

/// As [`check_file`], for files that are replaced only where that is asked for.
///
/// # Errors
/// As [`check_file`], and `Exists`.
pub fn check_new_file(path: &Path, kind: FileKind, inputs: &[PathBuf], force: bool) -> Result<(), DestinationError> {
    match check_file(path, kind, inputs)? {
        There::Nothing if force || path.symlink_metadata().is_err() => Ok(()),
        There::Own if force => Ok(()),
        _ => Err(DestinationError::Exists { path: path.to_owned() }),
    }
}

/// The first of `inputs` that is this very file.
fn input_that_is(file: &Metadata, inputs: &[PathBuf]) -> Option<PathBuf> {
    inputs.iter().find(|input| input.metadata().is_ok_and(|input| is_same(&input, file))).cloned()
}

/// A file has another name until it is whole: an input must not have that one. A hard link to an input may: it is the link that is removed.
fn refuse_temporary_name(path: &Path, inputs: &[PathBuf]) -> Result<(), DestinationError> {
    use std::os::unix::fs::MetadataExt;
    let temporary = temporary_path(path);
    let Ok(there) = temporary.symlink_metadata() else { return Ok(()) };
    let Some(input) = input_that_is(&there, inputs) else { return Ok(()) };
    let is_its_name = || temporary.canonicalize().ok() == input.canonicalize().ok();
    if there.nlink() == 1 || is_its_name() {
        return Err(DestinationError::Input { path: temporary, input });
    }
    Ok(())
}

/// The destination of a command that writes one file: for this process alone, from before the work until it is published.
#[derive(Debug)]
pub struct Destination {
    new: NewFile,
    path: PathBuf,
    kind: FileKind,
    inputs: Vec<PathBuf>,
}

impl Destination {
    /// Takes `path`, in place of a file of this kind if one is there, for a command that reads `inputs`.
    ///
    /// # Errors
    /// As [`check_file`], and `Busy`.
    pub fn take(path: &Path, kind: FileKind, inputs: &[PathBuf]) -> Result<Self, DestinationError> {
        check_file(path, kind, inputs)?;
        let new = NewFile::create(path).map_err(DestinationError::io(path))?;
        Ok(Self { new, path: path.to_owned(), kind, inputs: inputs.to_vec() })
    }

    /// The file, for writing.
    pub fn file(&self) -> &File {
        self.new.file()
    }

    /// What the system has against writing it.
    pub fn failed(&self, error: io::Error) -> DestinationError {
        DestinationError::io(&self.path)(error)
    }

    /// Gives what was written its name, durably.
    ///
    /// # Errors
    /// As [`Destination::take`]: something else may have got the name meanwhile.
    pub fn publish(mut self) -> Result<(), DestinationError> {
        check_file(&self.path, self.kind, &self.inputs)?;
        self.new.publish().map_err(DestinationError::io(&self.path))
    }

    /// Writes `bytes` as the whole of the file.
    ///
    /// # Errors
    /// As [`Destination::publish`].
    pub fn publish_bytes(self, bytes: &[u8]) -> Result<(), DestinationError> {
        self.file().write_all(bytes).map_err(DestinationError::io(&self.path))?;
        self.publish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const BUNDLE: &[u8] = b"\x89FLM\r\n\x1a\nand more";

    #[test]
    fn only_what_is_of_the_kind_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let look = |kind| check_file(&path, kind, &[]);
        assert_eq!(look(FileKind::Bundle).unwrap(), There::Nothing);
        fs::write(&path, "").unwrap();
        assert_eq!(look(FileKind::Bundle).unwrap(), There::Nothing);
        let report = format!("<!DOCTYPE html>\n<html>\n<head>{REPORT_MARK}");
        let logits =
            format!("\u{80}\0\0\0\0\0\0\0{{\"__metadata__\":{{\"format\":\"{LOGITS_FORMAT}\"}},\"logits\":{{}}}}");
        let thresholds = format!("{{\n  \"format\": \"{THRESHOLDS_FORMAT}\",\n  \"version\": 1\n}}\n");
        let kinds = [
            (FileKind::Bundle, BUNDLE),
            (FileKind::Report, report.as_bytes()),
            (FileKind::Logits, &logits.as_bytes()[1..]),
            (FileKind::Thresholds, thresholds.as_bytes()),
            (FileKind::Manual, MANUAL_MARK.as_bytes()),
        ];
        for (kind, bytes) in kinds {
            fs::write(&path, bytes).unwrap();
            for (other, _) in kinds {
                match look(other) {
                    Ok(there) => assert!(there == There::Own && other == kind, "{other:?} in the place of {kind:?}"),
                    Err(error) => {
                        assert!(matches!(error, DestinationError::Stranger { .. }) && other != kind, "{error}")
                    }
                }
            }
            // A page or a text that speaks of it is another's.
            fs::write(&path, [b"My notes: ", bytes].concat()).unwrap();
            assert!(look(kind).is_err(), "{kind:?}");
        }
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("nowhere", &path).unwrap();
        assert!(look(FileKind::Bundle).is_err(), "a link that leads nowhere");
        assert!(matches!(check_file(dir.path(), FileKind::Bundle, &[]), Err(DestinationError::IsDirectory { .. })));
        assert!(check_file(Path::new("/dev/null"), FileKind::Bundle, &[]).is_err());
    }

    #[test]
    fn an_input_is_known_by_whatever_name() {
        let dir = tempfile::tempdir().unwrap();
        let input = dir.path().join("in");
        fs::write(&input, BUNDLE).unwrap();
        let (soft, hard) = (dir.path().join("soft"), dir.path().join("hard"));
        std::os::unix::fs::symlink(&input, &soft).unwrap();
        fs::hard_link(&input, &hard).unwrap();
        for path in [&input, &soft, &hard, &dir.path().join("./in")] {
            let refused = check_new_file(path, FileKind::Bundle, std::slice::from_ref(&input), true).unwrap_err();
            assert!(matches!(refused, DestinationError::Input { .. }), "{refused}");
        }
        // An input whose name is the temporary one of the output.
        let partial = dir.path().join("x.partial");
        fs::rename(&hard, &partial).unwrap();
        let out = dir.path().join("x");
        assert!(matches!(
            check_file(&out, FileKind::Bundle, std::slice::from_ref(&partial)),
            Err(DestinationError::Input { .. })
        ));
        // A hard link to an input there is a leftover or a trap: its name goes, the input stays.
        Destination::take(&out, FileKind::Bundle, std::slice::from_ref(&input)).unwrap().publish_bytes(BUNDLE).unwrap();
        assert_eq!(fs::read(&input).unwrap(), BUNDLE);
        assert!(matches!(check_new_file(&out, FileKind::Bundle, &[], false), Err(DestinationError::Exists { .. })));
        check_new_file(&out, FileKind::Bundle, &[], true).unwrap();
    }

    #[test]
    fn a_destination_is_one_process_own_and_is_looked_at_again_in_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let first = Destination::take(&path, FileKind::Report, &[]).unwrap();
        assert!(matches!(Destination::take(&path, FileKind::Report, &[]), Err(DestinationError::Busy { .. })));
        fs::write(&path, "put there meanwhile").unwrap();
        assert!(matches!(first.publish_bytes(b"x"), Err(DestinationError::Stranger { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"put there meanwhile");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
