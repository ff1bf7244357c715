//! The work directory: what earlier runs left, and what it was made from.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use flashlm_formats::destination::{DestinationError, Directory, DirectoryKind, WORK_MARK};
use flashlm_formats::publish::{create_directory, publish_bytes, sync_name};
use flashlm_formats::regular::{open_regular, read_regular};
use flashlm_formats::seal;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use super::error::{PrepareError, io_error};
use super::event::{Event, Observer};
use super::graph::StageKind;
use super::stamp::Stamp;

/// Name of the file in a stage's directory that says what the stage is made from.
const MADE_FROM: &str = "made-from";
/// Name of the file in a stage's directory that says that the stage is whole, where one file does.
const WHOLE: &str = "whole";
/// Directories inside stages: the hidden states of an interrupted recording.
const STATES: &str = "states";
/// Stages that are never resumed: whatever is in them is removed unread.
pub(super) const THRESHOLDS_SCRATCH: &str = "thresholds.scratch";
/// The file with the hashes of the checkpoint's files.
pub(super) const SOURCE: &str = "source";
/// What is here beside stages, each by its beginning: files.
const BESIDE_STAGES: [&str; 3] = [SOURCE, "bundle.", "own-text.flashlm"];

/// Most bytes that a stamp, and that anything sealed may have: a report of millions of layers has less.
const STAMP_BYTES_MAX: u64 = 64 << 10;
const SEALED_BYTES_MAX: u64 = 256 << 20;
/// Bytes read at once.
const PIECE_BYTES: usize = 1 << 20;

/// Intermediate files of one bundle, for this process alone.
pub(super) struct Work<'a> {
    pub(super) dir: PathBuf,
    pub(super) observer: &'a Observer<'a>,
    /// Whether it was not there before this run.
    is_new: bool,
    _taken: Directory,
}

/// A preparation that ended before its first stage has nothing to resume from.
impl Drop for Work<'_> {
    fn drop(&mut self) {
        let Some(entries) = self.is_new.then(|| self.dir.read_dir().ok()).flatten() else { return };
        let entries: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        let is_beginning = |path: &PathBuf| path.file_name().is_some_and(|name| name == SOURCE || name == WORK_MARK);
        if entries.iter().all(is_beginning) {
            // What cannot be removed does no harm.
            entries.iter().for_each(|path| _ = fs::remove_file(path));
            _ = fs::remove_dir(&self.dir);
        }
    }
}

impl<'a> Work<'a> {
    /// Uses `dir`, which need not be there; a directory of anything else is refused.
    pub(super) fn open(dir: &Path, inputs: &[PathBuf], observer: &'a Observer<'a>) -> Result<Self, DestinationError> {
        let is_new = !dir.exists();
        let taken = Directory::take(dir, DirectoryKind::Work, inputs)?;
        let work = Work { dir: dir.to_owned(), observer, is_new, _taken: taken };
        match work.no_file() {
            Some(path) => Err(DestinationError::NoFileInside { path, maker: "`flashlm-prep prepare`" }),
            None => Ok(work),
        }
    }

    /// A directory, pipe or device in place of a file. None of these was made here, so it is neither read nor removed, and the
    /// first file of that name would end the work in its middle.
    fn no_file(&self) -> Option<PathBuf> {
        let inside = |dir: &Path| dir.read_dir().into_iter().flatten().flatten().map(|entry| entry.path());
        let named = |path: &Path, name: &str| path.file_name().is_some_and(|found| found == name);
        let mut wrong = Vec::new();
        for path in inside(&self.dir) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let Ok(there) = path.metadata() else { continue };
            let is_stage = !BESIDE_STAGES.iter().any(|beside| name.starts_with(beside));
            match there.is_dir() && is_stage {
                true if name == THRESHOLDS_SCRATCH => {}
                true => wrong.extend(inside(&path).flat_map(|file| match named(&file, STATES) && file.is_dir() {
                    true => inside(&file).filter(|file| is_no_file(file)).collect(),
                    false => Vec::from_iter(is_no_file(&file).then_some(file)),
                })),
                false => wrong.extend(is_no_file(&path).then_some(path)),
            }
        }
        // Always the same one is named.
        wrong.into_iter().min()
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// An error if one of `files` lies in a directory that is emptied here, by whatever spelling, link or mount. The text that the model
    /// wrote may be given as a text.
    pub(super) fn refuse_inside<'f>(
        &self,
        files: impl IntoIterator<Item = (&'f PathBuf, bool)>,
    ) -> Result<(), PrepareError> {
        let identity = |path: &Path| path.metadata().ok().map(|found| (found.dev(), found.ino()));
        let emptied = |with_own_text: bool| -> Result<Vec<_>, PrepareError> {
            let mut emptied = Vec::new();
            for entry in fs::read_dir(&self.dir).map_err(io_error("cannot look at", &self.dir))? {
                let entry = entry.map_err(io_error("cannot look at", &self.dir))?;
                if with_own_text || entry.file_name() != StageKind::OwnText.directory() {
                    emptied.extend(identity(&entry.path()).filter(|_| entry.path().is_dir()));
                }
            }
            Ok(emptied)
        };
        let dir = self.dir.canonicalize().map_err(io_error("cannot look at", &self.dir))?;
        for (file, is_output) in files {
            let parent = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let inside = |path: &Path| path.canonicalize().ok()?.strip_prefix(&dir).ok().map(Path::to_owned);
            let named_so = inside(file).or_else(|| inside(parent)).is_some_and(|inside| {
                inside
                    .components()
                    .next()
                    .is_some_and(|first| is_output || first.as_os_str() != StageKind::OwnText.directory())
            });
            let emptied = emptied(is_output)?;
            let real = file.canonicalize().or_else(|_| parent.canonicalize()).unwrap_or_default();
            let mounted = real.ancestors().any(|above| identity(above).is_some_and(|found| emptied.contains(&found)));
            if named_so || mounted {
                return Err(PrepareError::InsideWork { file: file.clone(), work: self.dir.clone() });
            }
        }
        Ok(())
    }

    /// What a stage says that it was made from.
    fn stamp(&self, name: &str) -> Option<String> {
        String::from_utf8(read_regular(&self.path(name).join(MADE_FROM), STAMP_BYTES_MAX).ok()?).ok()
    }

    /// The directory of a stage. What other inputs left in it is removed.
    pub(super) fn stage(&self, kind: StageKind, made_from: &Stamp) -> Result<PathBuf, PrepareError> {
        let name = kind.directory();
        let dir = self.path(name);
        let found = self.stamp(name);
        if found.as_deref().is_some_and(|found| made_from.is(found)) {
            return Ok(dir);
        }
        if dir.exists() {
            let why = made_from.changed(found.as_deref().unwrap_or_default());
            (self.observer)(Event::MadeAgain { stage: name, why: &why });
        }
        // What a link leads to is somebody else's; the link itself is not.
        if dir.is_symlink() {
            fs::remove_file(&dir).map_err(io_error("cannot remove", &dir))?;
        }
        // The stamp first: half a directory must not be taken for a whole one.
        let stamp = dir.join(MADE_FROM);
        if fs::remove_file(&stamp).is_ok() {
            sync_name(&stamp).map_err(io_error("cannot empty", &dir))?;
        }
        self.clear(name)?;
        create_directory(&dir).map_err(io_error("cannot make", &dir))?;
        publish(&stamp, made_from.to_string().as_bytes())?;
        Ok(dir)
    }

    /// Removes a file or directory, if it is there.
    pub(super) fn clear(&self, name: &str) -> Result<(), PrepareError> {
        let path = self.path(name);
        let is_directory = path.symlink_metadata().is_ok_and(|found| found.is_dir());
        let removed = if is_directory { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        // Durably: a mark that came back after a loss of power would speak for what is written from now on.
        match removed.and_then(|()| sync_name(&path)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("cannot remove", &path)(error)),
            _ => Ok(()),
        }
    }

    /// What [`publish_sealed`] wrote, if it is there and it and the files that it speaks for are as they were. What is not is told, and
    /// gone.
    pub(super) fn read_sealed<T: DeserializeOwned>(&self, path: &Path) -> Option<T> {
        read_sealed(path, self.observer)
    }

    /// Whether [`seal_whole`] said that a directory is whole, and its files still are as they were.
    pub(super) fn is_whole(&self, dir: &Path) -> bool {
        self.read_sealed::<()>(&dir.join(WHOLE)).is_some()
    }

    /// Bytes of files in a directory here.
    pub(super) fn bytes(&self, name: &str) -> u64 {
        let (mut bytes, mut dirs) = (0, vec![self.path(name)]);
        while let Some(dir) = dirs.pop() {
            let Ok(entries) = dir.read_dir() else { continue };
            for entry in entries.flatten() {
                match entry.metadata() {
                    Ok(metadata) if metadata.is_dir() => dirs.push(entry.path()),
                    Ok(metadata) => bytes += metadata.len(),
                    Err(_) => {}
                }
            }
        }
        bytes
    }
}

/// What a sealed file holds.
#[derive(Serialize, Deserialize)]
struct Sealed<T> {
    /// Files beside it that it speaks for, with their checksums.
    files: BTreeMap<String, String>,
    value: T,
}

/// Writes a file whole: it is there complete, or not at all.
pub(super) fn publish(path: &Path, bytes: &[u8]) -> Result<(), PrepareError> {
    publish_bytes(path, bytes).map_err(io_error("cannot write", path))
}

/// Writes JSON with a seal. It also speaks for `files` in the same directory, which are there.
pub(super) fn publish_sealed(path: &Path, value: &impl Serialize, files: &[PathBuf]) -> Result<(), PrepareError> {
    let sum = |file: &PathBuf| -> Result<(String, String), PrepareError> {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok((name, sum_of(file).map_err(io_error("cannot read", file))?))
    };
    let sealed = Sealed { files: files.iter().map(sum).collect::<Result<_, _>>()?, value };
    publish(path, &seal::seal_text(&serde_json::to_string_pretty(&sealed).expect("plain data serialises")))
}

fn read_sealed<T: DeserializeOwned>(path: &Path, observer: &Observer<'_>) -> Option<T> {
    let bytes = match read_regular(path, SEALED_BYTES_MAX) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        read => read.map_err(|error| error.to_string()),
    };
    let sealed = bytes.and_then(|bytes| {
        let text = seal::check_text(&bytes).map_err(|error| error.to_string())?;
        let sealed: Sealed<T> = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        for (name, sum) in &sealed.files {
            match sum_of(&path.with_file_name(name)) {
                Ok(found) if found == *sum => {}
                Ok(_) => return Err(format!("{name} is not as it was written")),
                Err(error) => return Err(format!("cannot read {name}: {error}")),
            }
        }
        Ok(sealed.value)
    });
    match sealed {
        Ok(value) => Some(value),
        Err(error) => {
            observer(Event::Note(&format!("{}: {error}: it is made again", path.display())));
            _ = fs::remove_file(path);
            None
        }
    }
}

/// Says of a stage's directory that these files are the whole of it.
pub(super) fn seal_whole(dir: &Path, files: &[PathBuf]) -> Result<(), PrepareError> {
    publish_sealed(&dir.join(WHOLE), &(), files)
}

fn sum_of(file: &Path) -> io::Result<String> {
    let (mut file, mut hash, mut piece) = (open_regular(file)?, Xxh3::new(), vec![0; PIECE_BYTES]);
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(format!("{:016x}", hash.digest())),
            read => hash.update(&piece[..read]),
        }
    }
}

fn is_no_file(path: &Path) -> bool {
    path.metadata().is_ok_and(|there| !there.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made_from(what: &str) -> Stamp {
        Stamp::new(&[what], vec![("--seed", what.into())])
    }

    #[test]
    fn a_stage_is_kept_for_the_same_inputs_and_emptied_for_others() {
        let dir = tempfile::tempdir().unwrap();
        let work = Work::open(&dir.path().join("work"), &[], &|_| ()).unwrap();
        let stage = work.stage(StageKind::Orders, &made_from("a")).unwrap();
        fs::write(stage.join("x"), "1").unwrap();
        assert!(work.stage(StageKind::Orders, &made_from("a")).unwrap().join("x").exists());
        assert!(!work.stage(StageKind::Orders, &made_from("b")).unwrap().join("x").exists());
        // Without a stamp nothing is trusted.
        fs::write(stage.join("x"), "1").unwrap();
        fs::remove_file(stage.join(MADE_FROM)).unwrap();
        assert!(!work.stage(StageKind::Orders, &made_from("b")).unwrap().join("x").exists());
        assert_eq!(work.bytes("orders"), made_from("b").to_string().len() as u64);
    }

    #[test]
    fn what_is_no_file_is_found_wherever_a_file_belongs() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("work");
        let first = Work::open(&root, &[], &|_| ()).unwrap();
        let refused = |path: &Path| match Work::open(&root, &[], &|_| ()).err() {
            Some(DestinationError::NoFileInside { path: named, .. }) => named == path,
            _ => false,
        };
        for dir in ["recording/states", "predictors", "thresholds.scratch/x"] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        drop(first);
        assert!(Work::open(&root, &[], &|_| ()).is_ok());
        for name in ["source", "bundle.0", "predictors/made-from", "recording/states/layer-000.f32"] {
            let path = root.join(name);
            fs::create_dir_all(&path).unwrap();
            assert!(refused(&path), "{name}, a directory");
            fs::remove_dir(&path).unwrap();
            assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
            assert!(refused(&path), "{name}, a pipe");
            fs::remove_file(&path).unwrap();
        }
        assert!(Work::open(&root, &[], &|_| ()).is_ok());
    }

    #[test]
    fn sealed_files_speak_for_others_and_are_gone_when_one_is_not_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("report"), dir.path().join("predictor"));
        let make = || {
            fs::write(&other, "0123").unwrap();
            publish_sealed(&path, &vec![0.1, 0.25], std::slice::from_ref(&other)).unwrap();
        };
        let read = || read_sealed::<Vec<f64>>(&path, &|_| ());
        assert_eq!(read(), None);
        make();
        assert_eq!(read(), Some(vec![0.1, 0.25]));
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            fs::write(&path, damaged).unwrap();
            assert_eq!((read(), path.exists()), (None, false), "byte {at}");
            fs::write(&path, &whole[..at]).unwrap();
            assert_eq!(read(), None, "cut at {at}");
        }
        make();
        fs::write(&other, "0124").unwrap();
        assert_eq!(read(), None);
        make();
        fs::remove_file(&other).unwrap();
        assert_eq!(read(), None);
    }

    #[test]
    fn nothing_that_is_read_may_lie_where_things_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let work = Work::open(&dir.path().join("work"), &[], &|_| ()).unwrap();
        for name in ["own-text", "predictors"] {
            fs::create_dir(work.path(name)).unwrap();
            fs::write(work.path(name).join("x"), "").unwrap();
        }
        let refused = |file: PathBuf| work.refuse_inside([(&file, false)]).is_err();
        assert!(!refused(dir.path().join("x")) && !refused(work.path("own-text").join("x")));
        assert!(refused(work.path("predictors").join("x")) && refused(work.path("predictors").join("new")));
        // An output may lie in none of them: the text's directory is emptied, too.
        assert!(work.refuse_inside([(&work.path("own-text").join("x"), true)]).is_err());
        // By another name for the same directory, as a mount gives one: here a stage that is a link.
        let others = dir.path().join("others");
        fs::create_dir(&others).unwrap();
        fs::write(others.join("made-from"), "mine").unwrap();
        std::os::unix::fs::symlink(&others, work.path("orders")).unwrap();
        assert!(refused(others.join("made-from")));
        // And what such a link leads to is left alone where the stage is made again.
        work.stage(StageKind::Orders, &made_from("new")).unwrap();
        assert_eq!(fs::read(others.join("made-from")).unwrap(), b"mine");
        assert!(work.path("orders").symlink_metadata().unwrap().is_dir());
    }
}
