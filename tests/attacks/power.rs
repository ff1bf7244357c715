//! Attack 13: power fails at any moment of any writing command.
//!
//! The programs are watched as they are, and what they did to their files is done again on a disk that forgets: of what was not
//! synchronised any part may be there, sectors of files as well as names in directories, whatever came first. What is left then is
//! looked at, and the command is given again.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use flashlm_tests::{Said, program, scratch};

use crate::crash::{nothing_is_wrong, result};
use crate::mini::{Mini, Stage, contents, convert_from_hub, hub};
use crate::watched::{Change, watch};
use crate::{Dice, rounds, skip};

const SECTOR: usize = 512;

/// What a name leads to.
#[derive(Clone, Debug, PartialEq)]
enum Entry {
    File(usize),
    Directory,
    Link(PathBuf),
}

/// A change of one directory that is not durable: names that go, and one that comes. A rename is one change.
struct NameChange {
    gone: Option<PathBuf>,
    come: Option<(PathBuf, Entry)>,
}

enum DataChange {
    Bytes(u64, Vec<u8>),
    Length(u64),
}

#[derive(Default)]
struct DiskFile {
    durable: Vec<u8>,
    pending: Vec<DataChange>,
}

/// What is durable, and what only the page cache knows.
#[derive(Default)]
struct Disk {
    files: Vec<DiskFile>,
    names: BTreeMap<PathBuf, Entry>,
    /// With the directory that they are changes of, in their order.
    pending: Vec<(PathBuf, NameChange)>,
    /// What a program sees.
    live: BTreeMap<PathBuf, Entry>,
}

/// Files as they are found after a loss of power. Directories have no contents.
type Found = BTreeMap<PathBuf, Option<FoundFile>>;

#[derive(Clone, Debug, PartialEq)]
enum FoundFile {
    Bytes(Vec<u8>),
    Link(PathBuf),
}

fn put(image: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    if image.len() < offset + bytes.len() {
        image.resize(offset + bytes.len(), 0);
    }
    image[offset..offset + bytes.len()].copy_from_slice(bytes);
}

impl DataChange {
    /// Does to `image` as much of it as `keep` lets through.
    fn apply(&self, image: &mut Vec<u8>, keep: &mut dyn FnMut() -> bool) {
        match self {
            Self::Length(length) if keep() => image.resize(*length as usize, 0),
            Self::Length(_) => {}
            Self::Bytes(offset, bytes) => {
                let (offset, mut at) = (*offset as usize, 0);
                while at < bytes.len() {
                    let end = ((offset + at) / SECTOR * SECTOR + SECTOR - offset).min(bytes.len());
                    if keep() {
                        put(image, offset + at, &bytes[at..end]);
                    }
                    at = end;
                }
            }
        }
    }
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<PathBuf, Entry>) {
        if let Some(gone) = &self.gone {
            names.remove(gone);
        }
        if let Some((name, entry)) = &self.come {
            names.insert(name.clone(), entry.clone());
        }
    }
}

impl Disk {
    fn apply(&mut self, change: &Change) {
        let rename = |gone: Option<&PathBuf>, come: Option<(&PathBuf, Entry)>| NameChange {
            gone: gone.cloned(),
            come: come.map(|(name, entry)| (name.clone(), entry)),
        };
        let name_change = match change {
            Change::Write(file, offset, bytes) => {
                return self.files[*file].pending.push(DataChange::Bytes(*offset, bytes.clone()));
            }
            Change::Length(file, length) => return self.files[*file].pending.push(DataChange::Length(*length)),
            Change::Sync(file) => {
                let file = &mut self.files[*file];
                for change in std::mem::take(&mut file.pending) {
                    change.apply(&mut file.durable, &mut || true);
                }
                return;
            }
            Change::SyncNames(directory) => {
                let names = &mut self.names;
                self.pending.retain(|(of, change)| {
                    if of == directory {
                        change.apply(names);
                    }
                    of != directory
                });
                return;
            }
            Change::Create(path, file) => {
                self.files.resize_with(file + 1, DiskFile::default);
                rename(None, Some((path, Entry::File(*file))))
            }
            Change::Directory(path) => rename(None, Some((path, Entry::Directory))),
            Change::Link(path, target) => rename(None, Some((path, Entry::Link(target.clone())))),
            Change::Remove(path) => rename(Some(path), None),
            Change::Rename(from, to) => {
                assert_eq!(from.parent(), to.parent(), "renames between directories are not understood here");
                rename(Some(from), Some((to, self.live[from].clone())))
            }
        };
        name_change.apply(&mut self.live);
        let name = name_change.gone.as_ref().or(name_change.come.as_ref().map(|(name, _)| name));
        let directory = name.and_then(|name| name.parent()).expect("below the root").to_owned();
        self.pending.push((directory, name_change));
    }

    /// What is found after a crash. Of everything that is not durable a coin decides; luck 0 loses all of it, luck 1 nothing.
    fn after_crash(&self, luck: u64) -> Found {
        let mut dice = Dice(luck);
        let mut keep = || match luck {
            0 => false,
            1 => true,
            _ => dice.below(2) == 1,
        };
        let mut names = self.names.clone();
        for (_, change) in &self.pending {
            if keep() {
                change.apply(&mut names);
            }
        }
        let mut found = Found::new();
        // Parents come first; below a directory that was lost there is nothing.
        for (path, entry) in &names {
            let parent = path.parent().expect("below the root");
            let has_parent = parent == Path::new("") || found.get(parent).is_some_and(Option::is_none);
            if !has_parent {
                continue;
            }
            let file = match entry {
                Entry::Directory => None,
                Entry::Link(target) => Some(FoundFile::Link(target.clone())),
                Entry::File(file) => {
                    let file = &self.files[*file];
                    let mut image = file.durable.clone();
                    file.pending.iter().for_each(|change| change.apply(&mut image, &mut keep));
                    Some(FoundFile::Bytes(image))
                }
            };
            found.insert(path.clone(), file);
        }
        found
    }
}

/// Makes `found` real below `dir`.
fn write(found: &Found, dir: &Path) {
    for (path, file) in found {
        let path = dir.join(path);
        match file {
            None => fs::create_dir(path).unwrap(),
            Some(FoundFile::Bytes(bytes)) => fs::write(path, bytes).unwrap(),
            Some(FoundFile::Link(target)) => std::os::unix::fs::symlink(target, path).unwrap(),
        }
    }
}

/// The changes with names relative to `root`.
fn below(root: &Path, changes: Vec<Change>) -> Vec<Change> {
    let short = |path: PathBuf| path.strip_prefix(root).expect("only these were watched").to_owned();
    let shorten = |change| match change {
        Change::Create(path, file) => Change::Create(short(path), file),
        Change::Directory(path) => Change::Directory(short(path)),
        Change::Link(path, target) => Change::Link(short(path), target),
        Change::Rename(from, to) => Change::Rename(short(from), short(to)),
        Change::Remove(path) => Change::Remove(short(path)),
        Change::SyncNames(path) => Change::SyncNames(short(path)),
        other => other,
    };
    changes.into_iter().map(shorten).collect()
}

/// Whether a file that is made has to be there for good when the command has ended well.
#[derive(PartialEq)]
enum Made {
    ForGood,
    /// A cache may be made again.
    Cache,
}

/// Runs the command that `command` gives for a directory, and lets power fail: `looked_at` sees what is left at so many moments,
/// with the files as they are in the end. How many changes there were; `None` where programs cannot be watched.
fn power_fails(
    dice: &mut Dice,
    moments: usize,
    made: Made,
    command: &dyn Fn(&Path) -> Command,
    looked_at: &mut dyn FnMut(&Found, &Found),
) -> Option<usize> {
    let root = scratch();
    let root = root.path().canonicalize().unwrap();
    let (changes, code) = match watch(&command(&root), &root) {
        Ok(watched) => watched,
        Err(why) => {
            skip(&why);
            return None;
        }
    };
    assert_eq!(code, 0, "{:?}", command(&root));
    let changes = below(&root, changes);
    let mut end = Disk::default();
    changes.iter().for_each(|change| end.apply(change));
    let whole = end.after_crash(1);
    // What was watched is what happened.
    let real = scratch();
    write(&whole, real.path());
    assert!(contents(real.path()) == contents(&root), "the watched changes do not give what is there");
    // What is done is done. Scratch files that were removed may come back.
    let kept = end.after_crash(0);
    let lost: Vec<_> =
        whole.iter().filter(|(name, file)| kept.get(*name) != Some(file)).map(|(name, _)| name).collect();
    assert!(
        made == Made::Cache || lost.is_empty(),
        "{lost:?} are lost with the power although the command had ended well"
    );

    // Names change seldom, and that is where things go wrong: half of the moments are there.
    let seldom: Vec<usize> = (1..=changes.len()).filter(|at| !matches!(changes[at - 1], Change::Write(..))).collect();
    let pick =
        |dice: &mut Dice, n| if n % 2 == 0 { seldom[dice.below(seldom.len())] } else { dice.below(changes.len()) };
    let mut moments: Vec<usize> = (0..moments).map(|n| pick(dice, n)).collect();
    moments.sort_unstable();
    let mut disk = Disk::default();
    let mut done = 0;
    for moment in &moments {
        changes[done..*moment].iter().for_each(|change| disk.apply(change));
        done = *moment;
        let luck = match dice.below(4) {
            luck @ (0 | 1) => luck as u64,
            _ => dice.next(),
        };
        looked_at(&disk.after_crash(luck), &whole);
    }
    Some(changes.len())
}

#[test]
fn a13_power_fails_at_any_moment_and_run_again() {
    let mini = Mini::get();
    for stage in Stage::ALL {
        let mut dice = Dice::of(&format!("power fails in {stage:?}"));
        let (mut seen, mut again) = (0, 0);
        let whole = scratch();
        let expected = whole.path().join(stage.output());
        assert!(stage.run(mini, &expected).status.success());
        let (moments, runs) = (rounds(40, 2000), rounds(3, 200));
        let changes = power_fails(
            &mut dice,
            moments,
            Made::ForGood,
            &|dir| stage.command(mini, &dir.join(stage.output())),
            &mut |found, _| {
                let dir = scratch();
                write(found, dir.path());
                let output = dir.path().join(stage.output());
                nothing_is_wrong(stage, &output, &expected);
                // The last moments and some others are resumed from.
                if seen * runs / moments > again || seen == 0 {
                    again += 1;
                    let said = Said::from(stage.run(mini, &output));
                    assert_eq!(said.code, Some(0), "{stage:?} does not go on after a loss of power: {}", said.stderr);
                    assert!(result(stage, &output) == result(stage, &expected), "{stage:?}: other bytes in the end");
                }
                seen += 1;
            },
        );
        let Some(changes) = changes else { return };
        eprintln!("power: {stage:?}: {seen} losses among {changes} changes, {again} gone on from, none wrong");
    }
}

#[test]
fn a13_power_fails_in_synthesize() {
    let command = |dir: &Path| {
        let mut command = Command::new(program("flashlm-prep"));
        command.args(["synthesize", "--geometry", "opt-125m", "--layers", "1", "-o"]).arg(dir.join("checkpoint"));
        command
    };
    let mut dice = Dice::of("power fails in synthesize");
    let mut opened = 0;
    let changes = power_fails(&mut dice, rounds(12, 200), Made::ForGood, &command, &mut |found, whole| {
        // Without its configuration no checkpoint opens.
        if found.contains_key(Path::new("checkpoint/config.json")) {
            opened += 1;
            assert!(found == whole, "a checkpoint that opens is not whole");
        }
    });
    if let Some(changes) = changes {
        eprintln!("power: synthesize: {changes} changes, {opened} losses left a checkpoint that opens, whole");
    }
}

/// The cache of the hub: what has its final name there is whole, and the same command ends in the same bundle.
#[test]
fn a13_power_fails_while_a_model_is_fetched() {
    let hub = hub();
    let blobs = Path::new("hub/models--some-org--tiny/blobs");
    let output = scratch();
    let output = output.path().join("m.flashlm");
    let mut dice = Dice::of("power fails while a model is fetched");
    let (mut seen, mut again) = (0, 0);
    let command = |home: &Path| convert_from_hub(&hub, home, &output);
    let changes = power_fails(&mut dice, rounds(40, 2000), Made::Cache, &command, &mut |found, whole| {
        for (name, file) in found.iter().filter(|(name, file)| name.starts_with(blobs) && file.is_some()) {
            let is_part = name.extension().is_some_and(|e| e == "incomplete");
            assert!(is_part || whole.get(name) == Some(file), "{} is not whole", name.display());
        }
        seen += 1;
        if seen % rounds(14, 10) == 0 {
            again += 1;
            let home = scratch();
            write(found, home.path());
            Said::from(command(home.path()).output().unwrap()).succeeded();
            assert_eq!(fs::read(&output).unwrap(), fs::read(Mini::get().path("converted.flashlm")).unwrap());
        }
    });
    if let Some(changes) = changes {
        eprintln!("power: hub: {seen} losses among {changes} changes, {again} gone on from, none wrong");
    }
}

/// Disk profiles: there whole, or not there.
#[test]
fn a13_power_fails_while_a_disk_profile_is_kept() {
    let measured = scratch();
    let command = |dir: &Path| {
        let mut command = Command::new(program("flashlm"));
        command.arg("disk").arg(measured.path()).args(["--seconds", "1", "--scratch", "64"]);
        command.env("FLASHLM_CACHE_DIR", dir);
        command
    };
    let mut dice = Dice::of("power fails while a disk profile is kept");
    power_fails(&mut dice, rounds(100, 400), Made::Cache, &command, &mut |found, whole| {
        for (name, file) in found.iter().filter(|(name, _)| name.extension().is_some_and(|e| e == "json")) {
            assert!(whole.get(name) == Some(file), "{} is not whole", name.display());
        }
    });
}
