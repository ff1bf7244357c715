//! Which bundles were packed from a work directory. What is at the output is compared with that, never taken on trust.
//!
//! A record is an empty file, whose name says all: the bundle's identity, which covers all of its contents, and what it was made from. It is
//! made before the bundle gets its name, so that no interruption leaves a bundle that nobody knows.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use flashlm_formats::bundle::{bundle_identity, remove_trailing_bytes, verify};
use flashlm_formats::publish::sync_name;

use super::error::{PrepareError, io_error};
use super::event::{Event, Observer, Running, Task};
use super::work::Work;

/// What a bundle was made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Made {
    /// All of it.
    pub(super) packed: String,
    /// All but predictors and what was measured of them.
    pub(super) flash: String,
}

/// What is at the output.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum There {
    Nothing,
    /// A bundle that was packed from this work directory. Whether it still is whole was not looked at.
    Ours(Made),
    /// Another bundle.
    Other,
}

const BEFORE: &str = "bundle";

impl Made {
    fn name(&self, identity: u64) -> String {
        format!("{BEFORE}.{identity:016x}.{}.{}", self.packed, self.flash)
    }

    /// From a name, of the bundle with this identity.
    fn parse(name: &str, identity: u64) -> Option<Self> {
        let parts: Vec<&str> = name.split('.').collect();
        match parts[..] {
            [BEFORE, id, packed, flash] if id == format!("{identity:016x}") => {
                Some(Self { packed: packed.into(), flash: flash.into() })
            }
            _ => None,
        }
    }
}

/// Looks at the bundle at `output`, with the records in the work directory `dir`, which need not be there.
pub(super) fn look(dir: &Path, output: &Path) -> Result<There, PrepareError> {
    if output.metadata().map_or(0, |there| there.len()) == 0 {
        return Ok(There::Nothing);
    }
    let identity = bundle_identity(output).map_err(io_error("cannot read", output))?;
    let Some(identity) = identity else { return Ok(There::Other) };
    let names = dir.read_dir().into_iter().flatten().flatten().map(|entry| entry.file_name());
    let made = names.into_iter().find_map(|name| Made::parse(name.to_str()?, identity));
    Ok(made.map_or(There::Other, There::Ours))
}

/// Looks, and refuses a bundle that is not to be replaced.
///
/// # Errors
/// `OtherBundle`.
pub(super) fn look_and_refuse(dir: &Path, output: &Path, force: bool) -> Result<There, PrepareError> {
    match look(dir, output)? {
        There::Other if !force => {
            Err(PrepareError::OtherBundle { output: output.to_path_buf(), work: dir.to_path_buf() })
        }
        there => Ok(there),
    }
}

impl Work<'_> {
    /// Takes note of a bundle that is about to get the output's name, with these contents.
    pub(super) fn record_bundle(&self, identity: u64, made: &Made) -> Result<(), PrepareError> {
        let path = self.path(&made.name(identity));
        // Anew, if it is not there: what a link leads to is not ours.
        let file = match File::create_new(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                fs::remove_file(&path).and_then(|()| File::create_new(&path))
            }
            made => made,
        };
        file.and_then(|file| file.sync_all()).and_then(|()| sync_name(&path)).map_err(io_error("cannot write", &path))
    }

    /// Forgets all other bundles.
    pub(super) fn keep_record(&self, identity: u64, made: &Made) {
        let kept = made.name(identity);
        for entry in self.dir.read_dir().into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("bundle.") && name != kept {
                // Left there, it does no harm.
                _ = fs::remove_file(entry.path());
            }
        }
    }
}

/// Reads all of the bundle at `output`. Whether everything in it is as it was written; what is not is said. What only comes after
/// its end is cut off.
pub(super) fn is_whole(output: &Path, observer: &Observer<'_>) -> bool {
    let task = Running::begin(observer, Task::Verifying);
    let report = verify(output, &mut |done, total| task.at(done, total));
    drop(task);
    let why = match report {
        Ok(report) => match report.damages.first() {
            None if report.trailing_bytes == 0 => return true,
            None => match is_alone(output).then(|| remove_trailing_bytes(output)) {
                Some(Ok(bytes)) => {
                    let output = output.display();
                    let note = format!(
                        "{output}: {bytes} bytes after the end of the bundle belonged to nothing and are removed"
                    );
                    observer(Event::Note(&note));
                    return true;
                }
                Some(Err(error)) => error.to_string(),
                None => format!("{} bytes after its end belong to nothing", report.trailing_bytes),
            },
            Some(first) => format!("damaged in {} place(s), the first is {first}", report.damages.len()),
        },
        Err(error) => error.to_string(),
    };
    observer(Event::Note(&format!("{}: {why}: it is packed again", output.display())));
    false
}

/// Whether a file may be changed in place: no other name leads to it.
pub(super) fn is_alone(output: &Path) -> bool {
    output.symlink_metadata().is_ok_and(|there| there.is_file() && there.nlink() == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        let made = Made { packed: "12".into(), flash: "ab".into() };
        assert_eq!(Made::parse(&made.name(7), 7), Some(made.clone()));
        assert_eq!(Made::parse(&made.name(7), 8), None);
        for name in ["bundle", "bundle.0000000000000007.12", "x.0000000000000007.12.ab", "bundle.7.12.ab"] {
            assert_eq!(Made::parse(name, 7), None, "{name}");
        }
    }
}
