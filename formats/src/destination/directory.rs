//! Directories that commands write into.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::kind::{
    ORDERS_FORMAT, PREDICTORS_FORMAT, REPORT_DATA_FORMAT, contains, head, is_json_of, safetensors_header,
};
use super::{DestinationError, input_that_is};
use crate::publish::{create_directory, lock, sync_name};

/// What a command writes as a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirectoryKind {
    /// What `flashlm-prep record` writes.
    Recording,
    /// What `flashlm-prep train` and `import-predictors` write.
    Predictors,
    /// What `flashlm-prep order` writes.
    Orders,
    /// What `flashlm-prep report --data` writes.
    ReportData,
    /// Intermediate files of `flashlm-prep prepare`, which removes much of what is in it.
    Work,
}

/// A file that says that a work directory is one.
pub const WORK_MARK: &str = ".flashlm-work";
/// What is in it, for people.
const WORK_MARK_TEXT: &[u8] = b"Intermediate files of `flashlm-prep prepare`, which removes what it does not need.\n";

/// Whose an entry of a directory is.
#[derive(PartialEq)]
enum Entry {
    /// It says of the whole directory what it is.
    Mark,
    /// A file of the kind.
    Own,
    /// A file that is not.
    Strange,
    /// No file, under the name of one of ours: it would stop the command in the middle of its work.
    NoFile,
}

impl DirectoryKind {
    const fn name(self) -> &'static str {
        match self {
            Self::Recording => "a recording",
            Self::Predictors => "a directory of predictors",
            Self::Orders => "a directory of orders",
            Self::ReportData => "a directory of a report's charts",
            Self::Work => "a work directory",
        }
    }

    const fn maker(self) -> &'static str {
        match self {
            Self::Recording => "`flashlm-prep record`",
            Self::Predictors => "`flashlm-prep train`",
            Self::Orders => "`flashlm-prep order`",
            Self::ReportData => "`flashlm-prep report --data`",
            Self::Work => "`flashlm-prep prepare`",
        }
    }

    /// What an entry called `name` is.
    fn entry(self, name: &str, path: &Path) -> Entry {
        let of = |yes: bool, kind: Entry| if yes { kind } else { Entry::Strange };
        let is_partial = name.ends_with(".partial");
        if !self.has_name(name.strip_suffix(".partial").unwrap_or(name)) {
            return Entry::Strange;
        }
        if name != "states" && path.metadata().is_ok_and(|there| !there.is_file()) {
            return Entry::NoFile;
        }
        // Files have this name while they are written, by one of our processes at a time.
        if is_partial {
            return Entry::Own;
        }
        let json = |format| is_json_of(&head(path).unwrap_or_default(), format);
        match (self, name) {
            (Self::Work, _) => Entry::Mark,
            (Self::Recording, "recording.json") => of(json("flashlm-recording"), Entry::Mark),
            (Self::Predictors, "predictors.json") => of(json(PREDICTORS_FORMAT), Entry::Mark),
            (Self::Orders, "orders.json") => of(json(ORDERS_FORMAT), Entry::Mark),
            (Self::ReportData, "report.json") => of(json(REPORT_DATA_FORMAT), Entry::Mark),
            // Pictures and tables say nothing of who made them: `report.json` is there before them.
            (Self::ReportData, _) => Entry::Strange,
            (Self::Recording, "states") => of(is_our_states(path), Entry::Own),
            (_, name) if name.ends_with(".json") => of(is_list_of_figures(path), Entry::Own),
            _ => of(is_our_safetensors(path), Entry::Own),
        }
    }

    /// Whether files of the kind may be called so.
    fn has_name(self, name: &str) -> bool {
        let numbered = |before: &str, behind: &str| {
            let number = name.strip_prefix(before).and_then(|rest| rest.strip_suffix(behind));
            number.is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
        };
        match self {
            Self::Recording => {
                ["recording.json", "tokens.safetensors", "states"].contains(&name) || numbered("layer-", ".safetensors")
            }
            Self::Predictors => {
                ["predictors.json", "timings.json", "training.json", "sweep.json"].contains(&name)
                    || numbered("predictor-", ".safetensors")
            }
            Self::Orders => name == "orders.json" || numbered("layer-", ".order.safetensors"),
            Self::ReportData => name == "report.json" || name.ends_with(".svg") || name.ends_with(".csv"),
            Self::Work => name == WORK_MARK,
        }
    }
}

/// Hidden states between layers, which `record` removes at its end: a directory, no link to one, with files of their names only.
fn is_our_states(path: &Path) -> bool {
    let is_state = |name: &str| {
        let name = name.strip_suffix(".partial").unwrap_or(name);
        let number = name.strip_prefix("layer-").and_then(|rest| rest.strip_suffix(".f32"));
        number.is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
    };
    path.symlink_metadata().is_ok_and(|found| found.is_dir())
        && fs::read_dir(path).is_ok_and(|mut entries| {
            entries.all(|entry| {
                entry.is_ok_and(|entry| {
                    entry.file_type().is_ok_and(|kind| kind.is_file())
                        && entry.file_name().to_str().is_some_and(is_state)
                })
            })
        })
}

/// `timings.json`, `training.json` and `sweep.json` hold lists.
fn is_list_of_figures(path: &Path) -> bool {
    let head = head(path).unwrap_or_default();
    head.starts_with(b"[") && contains(&head, b"\"layer\":")
}

/// Files of ours are sealed, or say their format.
fn is_our_safetensors(path: &Path) -> bool {
    let head = head(path).unwrap_or_default();
    let says = |text: &[u8]| safetensors_header(&head).is_some_and(|header| contains(header, text));
    says(b"\"seal\":\"") || says(b"\"format\":\"flashlm-") || says(b"\"format\": \"flashlm-")
}

/// A directory that this process alone writes into.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    kind: DirectoryKind,
    /// Whether it was not there before.
    made: bool,
    _lock: File,
}

impl Drop for Directory {
    fn drop(&mut self) {
        // A command that gave up before it wrote anything leaves nothing. What is not empty stays.
        if self.made {
            if self.kind == DirectoryKind::Work && holds_only_the_mark(&self.path) {
                let _ = fs::remove_file(self.path.join(WORK_MARK));
            }
            let _ = fs::remove_dir(&self.path);
        }
    }
}

impl Directory {
    /// Looks whether a command that reads `inputs` may write into the directory `path`: one that is not there or empty, or of this
    /// kind.
    ///
    /// # Errors
    /// All but `Busy`.
    pub fn check(path: &Path, kind: DirectoryKind, inputs: &[PathBuf]) -> Result<(), DestinationError> {
        let failed = DestinationError::io;
        let there = match path.metadata() {
            Ok(there) => there,
            Err(error) if error.kind() == io::ErrorKind::NotFound && path.symlink_metadata().is_err() => return Ok(()),
            Err(error) => return Err(failed(path)(error)),
        };
        if !there.is_dir() {
            return Err(DestinationError::IsFile { path: path.to_owned() });
        }
        if let Some(input) = input_that_is(&there, inputs) {
            return Err(DestinationError::Input { path: path.to_owned(), input });
        }
        let (mut marked, mut stranger): (bool, Option<String>) = (false, None);
        for entry in fs::read_dir(path).map_err(failed(path))? {
            let entry = entry.map_err(failed(path))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            // The root of a file system of one's own is empty but for this.
            if name == "lost+found" {
                continue;
            }
            match kind.entry(&name, &entry.path()) {
                // The one thing that is removed whole.
                Entry::Strange if kind == DirectoryKind::Recording && name == "states" => {
                    let (what, maker) = (kind.name(), kind.maker());
                    let entry = "states".to_owned();
                    return Err(DestinationError::StrangeDirectory { path: path.to_owned(), what, maker, entry });
                }
                Entry::NoFile => {
                    return Err(DestinationError::NoFileInside { path: entry.path(), maker: kind.maker() });
                }
                Entry::Mark => marked = true,
                Entry::Own => {}
                // Always the same one is named.
                Entry::Strange => {
                    if stranger.as_ref().is_none_or(|other| name < *other) {
                        stranger = Some(name);
                    }
                }
            }
        }
        match stranger.filter(|_| !marked) {
            None => Ok(()),
            Some(entry) => {
                let (what, maker) = (kind.name(), kind.maker());
                Err(DestinationError::StrangeDirectory { path: path.to_owned(), what, maker, entry })
            }
        }
    }

    /// Takes the directory for this process alone, until dropped. It is made if it is not there.
    ///
    /// # Errors
    /// As [`Directory::check`], and `Busy`.
    pub fn take(path: &Path, kind: DirectoryKind, inputs: &[PathBuf]) -> Result<Self, DestinationError> {
        let failed = DestinationError::io;
        Self::check(path, kind, inputs)?;
        let made = !path.exists();
        create_directory(path).map_err(failed(path))?;
        let directory = File::open(path).map_err(failed(path))?;
        lock(&directory, path).map_err(failed(path))?;
        if kind == DirectoryKind::Work {
            mark(path).map_err(failed(path))?;
        }
        Ok(Self { path: path.to_owned(), kind, made, _lock: directory })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn holds_only_the_mark(dir: &Path) -> bool {
    fs::read_dir(dir)
        .is_ok_and(|mut entries| entries.all(|entry| entry.is_ok_and(|entry| entry.file_name() == WORK_MARK)))
}

/// Marks a work directory, durably and before anything is put into it: what is not marked is not touched.
fn mark(dir: &Path) -> io::Result<()> {
    let path = dir.join(WORK_MARK);
    match File::create_new(&path) {
        Ok(mut file) => {
            io::Write::write_all(&mut file, WORK_MARK_TEXT)?;
            file.sync_all()?;
            sync_name(&path)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_of_others_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let kinds = [
            DirectoryKind::Recording,
            DirectoryKind::Predictors,
            DirectoryKind::Orders,
            DirectoryKind::ReportData,
            DirectoryKind::Work,
        ];
        for kind in kinds {
            Directory::check(&path, kind, &[]).unwrap();
            drop(Directory::take(&path, kind, &[]).unwrap());
            // One that was never filled is gone with its owner, and one that was is not.
            assert!(!path.exists(), "{kind:?}");
            let taken = Directory::take(&path, kind, &[]).unwrap();
            fs::write(path.join("source"), "x").unwrap();
            drop(taken);
            assert!(path.join("source").exists() && path.join(WORK_MARK).exists() == (kind == DirectoryKind::Work));
            fs::remove_dir_all(&path).unwrap();
            for name in ["notes.txt", "orders", "layer-x.safetensors", "model.safetensors.partial"] {
                fs::create_dir(&path).unwrap();
                fs::write(path.join(name), "mine").unwrap();
                let refused = Directory::take(&path, kind, &[]).unwrap_err();
                assert!(matches!(refused, DestinationError::StrangeDirectory { .. }), "{kind:?} {name}: {refused}");
                fs::remove_dir_all(&path).unwrap();
            }
        }
        fs::write(&path, "x").unwrap();
        assert!(matches!(Directory::check(&path, kinds[0], &[]), Err(DestinationError::IsFile { .. })));
    }

    #[test]
    fn a_directory_of_states_is_ours_by_what_is_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let states = dir.path().join("states");
        let check = || Directory::check(dir.path(), DirectoryKind::Recording, &[]);
        fs::create_dir(&states).unwrap();
        fs::write(states.join("layer-000.f32"), "").unwrap();
        fs::write(states.join("layer-001.f32.partial"), "").unwrap();
        check().unwrap();
        fs::write(states.join("data.csv"), "mine").unwrap();
        assert!(matches!(check(), Err(DestinationError::StrangeDirectory { .. })));
        fs::remove_dir_all(&states).unwrap();
        std::os::unix::fs::symlink(dir.path(), &states).unwrap();
        assert!(matches!(check(), Err(DestinationError::StrangeDirectory { .. })));
    }

    #[test]
    fn no_directory_or_pipe_may_have_the_name_of_a_file() {
        let dir = tempfile::tempdir().unwrap();
        for (kind, name) in [
            (DirectoryKind::Predictors, "predictor-000.safetensors"),
            (DirectoryKind::Predictors, "predictors.json"),
            (DirectoryKind::Orders, "layer-001.order.safetensors.partial"),
            (DirectoryKind::Recording, "tokens.safetensors"),
            (DirectoryKind::Work, WORK_MARK),
        ] {
            let path = dir.path().join(name);
            let refused = || match Directory::check(dir.path(), kind, &[]) {
                Err(DestinationError::NoFileInside { path: named, .. }) => named == path,
                _ => false,
            };
            fs::create_dir(&path).unwrap();
            assert!(refused(), "{name}, a directory");
            fs::remove_dir(&path).unwrap();
            assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
            assert!(refused(), "{name}, a pipe");
            fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn names_alone_say_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let kind = DirectoryKind::Predictors;
        let mine = |name: &str, bytes: &[u8]| {
            fs::write(dir.path().join(name), bytes).unwrap();
            let whose = Directory::check(dir.path(), kind, &[]);
            fs::remove_file(dir.path().join(name)).unwrap();
            whose.is_err()
        };
        assert!(mine("predictor-000.safetensors", b"\x40\0\0\0\0\0\0\0{\"encoder\":{}}"));
        assert!(!mine("predictor-000.safetensors", b"\x40\0\0\0\0\0\0\0{\"__metadata__\":{\"seal\":\"0123\"}}"));
        assert!(mine("predictors.json", b"{\"format\": \"other\"}"));
        assert!(!mine("predictors.json", b"{\n  \"format\": \"flashlm-predictors\"}"));
        assert!(mine("timings.json", b"[1, 2]") && mine("training.json", b"{}"));
        assert!(!mine("timings.json", b"[\n  {\n    \"layer\": 0,"));
        assert!(!mine("training.json", b"[\n  {\n    \"layer\": 0,"));
        assert!(!mine("predictor-001.safetensors.partial", b""));
    }

    #[test]
    fn charts_belong_to_the_report_beside_them() {
        let dir = tempfile::tempdir().unwrap();
        let check = || Directory::check(dir.path(), DirectoryKind::ReportData, &[]);
        fs::write(dir.path().join("runs.csv"), "layer,run\n").unwrap();
        fs::write(dir.path().join("runs.svg.partial"), "").unwrap();
        assert!(matches!(check(), Err(DestinationError::StrangeDirectory { entry, .. }) if entry == "runs.csv"));
        fs::write(dir.path().join("report.json"), "{\"charts\": []}").unwrap();
        assert!(matches!(check(), Err(DestinationError::StrangeDirectory { entry, .. }) if entry == "report.json"));
        fs::write(dir.path().join("report.json"), format!("{{\"format\": \"{REPORT_DATA_FORMAT}\"}}")).unwrap();
        check().unwrap();
        fs::create_dir(dir.path().join("budget.svg")).unwrap();
        assert!(matches!(check(), Err(DestinationError::NoFileInside { .. })));
    }

    #[test]
    fn one_process_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        for kind in [DirectoryKind::Work, DirectoryKind::Orders] {
            let path = dir.path().join(kind.name());
            let first = Directory::take(&path, kind, &[]).unwrap();
            assert!(matches!(Directory::take(&path, kind, &[]), Err(DestinationError::Busy { .. })));
            drop(first);
            let _second = Directory::take(&path, kind, &[]).unwrap();
            let refused = Directory::take(&path, kind, std::slice::from_ref(&path)).unwrap_err();
            assert!(matches!(refused, DestinationError::Input { .. }), "{refused}");
        }
    }
}
