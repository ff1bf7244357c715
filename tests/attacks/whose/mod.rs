//! Attacks 80 to 89: files that are somebody's. Sources, foreign files and directories, by any spelling; work files that were changed.

mod prepared;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use flashlm_formats::publish::temporary_path;
use flashlm_tests::{Said, scratch};

use crate::mini::{Mini, Stage, contents};

/// A directory by a second path, where the machine lets us.
struct BindMount(PathBuf);

impl BindMount {
    fn of(dir: &Path, at: &Path) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        let status = Command::new("mount").arg("--bind").arg(dir).arg(at).output();
        status.is_ok_and(|output| output.status.success()).then(|| Self(at.to_owned()))
    }
}

impl Drop for BindMount {
    fn drop(&mut self) {
        _ = Command::new("umount").arg(&self.0).status();
    }
}

/// Files that commands read: one of each kind.
const READ: [&str; 11] = [
    "checkpoint/config.json",
    "checkpoint/model.safetensors",
    "checkpoint/tokenizer.json",
    "text.txt",
    "foreign/c4_layer0_-0.9.safetensors",
    "recording/recording.json",
    "recording/layer-000.safetensors",
    "predictors/predictor-001.safetensors",
    "orders/orders.json",
    "orders/layer-001.order.safetensors",
    "mini.flashlm",
];

/// Nothing that is read is ever written over, whatever name it is given by, and with `--force`.
#[test]
fn a80_sources_are_not_outputs_by_any_spelling() {
    let mini = Mini::get();
    let before = contents(&mini.path(""));
    let dir = scratch();
    let mount = BindMount::of(&mini.path(""), &dir.path().join("mount"));
    if mount.is_none() {
        crate::skip("no bind mounts here");
    }
    let mut number = 0;
    for stage in Stage::ALL {
        for read in READ {
            // A bundle may be replaced by a bundle where that is asked for; no command reads one and writes another.
            let is_bundle = |name: &str| name.ends_with(".flashlm");
            if is_bundle(read) && is_bundle(stage.output()) {
                continue;
            }
            let file = mini.path(read);
            number += 1;
            let here = dir.path().join(number.to_string());
            fs::create_dir(&here).unwrap();
            let (soft, hard) = (here.join("soft"), here.join("hard"));
            symlink(&file, &soft).unwrap();
            fs::hard_link(&file, &hard).unwrap();
            let mut spellings = vec![file.clone(), file.parent().unwrap().join(".").join(file.file_name().unwrap())];
            spellings.extend([soft, hard]);
            spellings.extend(mount.as_ref().map(|mount| mount.0.join(read)));
            // Each spelling with every stage and each file with every spelling, but not all of all.
            let spelling = &spellings[number % spellings.len()];
            let said = Said::from(stage.run(mini, spelling));
            assert!(said.code == Some(1), "{stage:?} to {}: {said:?}", spelling.display());
            let said = said.stderr;
            let told = ["which this command reads", "left alone", "is a file"].iter().any(|word| said.contains(word));
            assert!(told, "{stage:?} to {}: {said}", spelling.display());
            fs::remove_dir_all(&here).unwrap();
        }
        for read in ["checkpoint", "recording", "predictors", "orders", "foreign"].map(|name| mini.path(name)) {
            // Each directory is the output of one command, which may write it again.
            if Some(read.file_name().unwrap()) != Path::new(stage.output()).file_name() && stage != Stage::Import {
                Said::from(stage.run(mini, &read)).failed(1, &[]);
            }
        }
    }
    assert!(contents(&mini.path("")) == before, "something that is read was changed");
}

/// What has the output's name is replaced only if it is such an output.
#[test]
fn a81_files_and_directories_of_others_are_left_alone() {
    let mini = Mini::get();
    let dir = scratch();
    for stage in Stage::ALL {
        let here = dir.path().join(format!("{stage:?}"));
        fs::create_dir(&here).unwrap();
        let output = here.join(stage.output());
        if stage.is_file() {
            for notes in ["my notes", "{\"format\": \"mine\"}", "<!DOCTYPE html>\n<html></html>"] {
                fs::write(&output, notes).unwrap();
                Said::from(stage.run(mini, &output)).failed(1, &[stage.output(), "left alone"]);
                assert_eq!(fs::read_to_string(&output).unwrap(), notes, "{stage:?}");
                fs::remove_file(&output).unwrap();
            }
            fs::create_dir(&output).unwrap();
            Said::from(stage.run(mini, &output)).failed(1, &["is a directory"]);
        } else {
            fs::create_dir(&output).unwrap();
            for name in ["notes.txt", "orders.json", "recording.json", "predictors.json", "layer-000.safetensors"] {
                fs::write(output.join(name), "mine").unwrap();
                Said::from(stage.run(mini, &output)).failed(1, &[name, "did not write"]);
                assert_eq!(contents(&output), [(PathBuf::from(name), b"mine".to_vec())], "{stage:?}");
                fs::remove_file(output.join(name)).unwrap();
            }
            Said::from(stage.run(mini, &output)).succeeded();
            // Beside what it wrote itself a note does no harm, and takes none.
            fs::write(output.join("notes.txt"), "mine").unwrap();
            Said::from(stage.run(mini, &output)).succeeded();
            assert_eq!(fs::read_to_string(output.join("notes.txt")).unwrap(), "mine");
        }
        // No temporary file stays behind.
        assert!(!here.join(temporary_path(Path::new(stage.output()))).exists(), "{stage:?}");
    }
}

/// A hard link of a source under the output's temporary name: the link goes, the source stays.
#[test]
fn a82_a_hard_link_under_the_temporary_name() {
    let mini = Mini::get();
    let dir = scratch();
    let source = mini.path("checkpoint/model.safetensors");
    let before = fs::read(&source).unwrap();
    for stage in Stage::ALL.into_iter().filter(|stage| stage.is_file()) {
        let output = dir.path().join(stage.output());
        fs::hard_link(&source, temporary_path(&output)).unwrap();
        Said::from(stage.run(mini, &output)).succeeded();
        assert!(fs::read(&source).unwrap() == before, "{stage:?} wrote to the source");
    }
}

/// `prepare` empties directories in its work directory: only in one that it marked before it put anything there.
#[test]
fn a83_prepare_works_in_no_directory_of_others() {
    let mini = Mini::get();
    let dir = scratch();
    let work = dir.path().join("work");
    for name in ["recording", "predictors", "orders", "own-text"] {
        fs::create_dir_all(work.join(name)).unwrap();
        fs::write(work.join(name).join("precious"), "mine").unwrap();
    }
    let before = contents(&work);
    let mut command = Stage::Prepare.command(mini, &dir.path().join("out.flashlm"));
    let said = Said::from(command.arg("--work").arg(&work).output().unwrap());
    said.failed(1, &["work", "did not write"]);
    assert_eq!(contents(&work), before);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}
