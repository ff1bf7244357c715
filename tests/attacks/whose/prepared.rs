//! `prepare` on what earlier runs left: bundles, inputs, work files, room.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use flashlm_tests::{Said, copied, program, scratch};
use tempfile::TempDir;

use crate::budgets::Cgroup;
use crate::disk::SmallDisk;
use crate::mini::{Mini, Stage, contents};
use crate::{Dice, rounds, skip};

/// A checkpoint and a text of one's own, and `prepare` of them.
struct Case(TempDir);

impl Case {
    fn new() -> Self {
        let dir = copied(&Mini::get().path("checkpoint"));
        fs::create_dir(dir.path().join("checkpoint")).unwrap();
        for name in ["config.json", "model.safetensors", "tokenizer.json"] {
            fs::rename(dir.path().join(name), dir.path().join("checkpoint").join(name)).unwrap();
        }
        fs::copy(Mini::get().path("text.txt"), dir.path().join("text.txt")).unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, output: &Path, more: &[&str]) -> Command {
        let mut command = Command::new(program("flashlm-prep"));
        command
            .arg("prepare")
            .arg(self.path("checkpoint"))
            .arg("-o")
            .arg(output)
            .arg("--text")
            .arg(self.path("text.txt"));
        // Of a model of random weights most neurons are admitted.
        command.args(["--size-budget", "15%", "--anyway"]).args(more);
        let mut default = |name: &str, value: &str| {
            if !more.contains(&name) {
                command.args([name, value]);
            }
        };
        default("--tokens", "1400");
        default("--sequence-tokens", "40");
        command
    }

    fn prepare(&self, output: &Path, more: &[&str]) -> Said {
        self.command(output, more).output().unwrap().into()
    }

    /// The bytes of a bundle that is made of what is there now, from nothing.
    fn fresh(&self, more: &[&str]) -> Vec<u8> {
        let dir = scratch();
        let output = dir.path().join("fresh.flashlm");
        self.prepare(&output, more).succeeded();
        fs::read(output).unwrap()
    }
}

fn is_up_to_date(said: &Said) -> bool {
    assert_eq!(said.code, Some(0), "{said:?}");
    said.stderr.contains("is up to date")
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

/// A bundle that was not packed here is neither resumed nor replaced; one that was is compared with what was packed.
#[test]
fn a84_the_bundle_at_the_output() {
    let case = Case::new();
    let output = case.path("out.flashlm");
    assert!(!is_up_to_date(&case.prepare(&output, &[])));
    assert!(is_up_to_date(&case.prepare(&output, &[])));
    let whole = fs::read(&output).unwrap();

    // Damaged, wherever: made whole again, and said.
    for at in [513, whole.len() / 3, whole.len() / 2, whole.len() - 2] {
        flip(&output, at);
        let said = case.prepare(&output, &[]);
        assert!(!is_up_to_date(&said) && said.stderr.contains("packed again"), "{said:?}");
        assert!(fs::read(&output).unwrap() == whole, "byte {at}");
    }
    fs::write(&output, &whole[..whole.len() / 2]).unwrap();
    assert!(case.prepare(&output, &[]).stderr.contains("packed again"));
    assert!(fs::read(&output).unwrap() == whole, "a bundle that was cut");

    // Other predictors for the same neurons; another name of the old file keeps the old ones.
    let recall = ["--recall", "0.9"];
    let other = case.fresh(&recall);
    assert!(other != whole);
    let kept = case.path("kept.flashlm");
    fs::hard_link(&output, &kept).unwrap();
    case.prepare(&output, &recall).succeeded();
    assert!(fs::read(&kept).unwrap() == whole, "the other name's bundle was changed");
    assert!(is_up_to_date(&case.prepare(&output, &recall)));
    // In place, as nothing else leads to it; and with damaged neurons not in place.
    case.prepare(&output, &[]).succeeded();
    flip(&output, whole.len() / 2);
    case.prepare(&output, &recall).succeeded();
    assert!(fs::read(&output).unwrap() == other, "damaged neurons got other predictors");

    // Bundles of others: another model's, one with a damaged header, and one of the same model from elsewhere.
    let elsewhere = case.path("elsewhere.flashlm");
    case.prepare(&elsewhere, &["--seed", "3"]).succeeded();
    let mut header = other.clone();
    header[100] ^= 1;
    for stranger in [fs::read(Mini::get().path("converted.flashlm")).unwrap(), header, fs::read(elsewhere).unwrap()] {
        for more in [&[][..], &recall] {
            fs::write(&output, &stranger).unwrap();
            case.prepare(&output, more).failed(1, &["out.flashlm", "left alone", "--force"]);
            assert!(fs::read(&output).unwrap() == stranger);
        }
        case.prepare(&output, &["--force"]).succeeded();
        assert!(fs::read(&output).unwrap() == whole);
    }
    // The very bytes that were packed are ours, whoever put them there.
    fs::remove_file(&output).unwrap();
    fs::copy(&kept, &output).unwrap();
    assert!(is_up_to_date(&case.prepare(&output, &[])));
}

/// Every input that can change the output is looked at; where none changed nothing is made again.
#[test]
fn a85_every_changed_input_is_noticed() {
    let case = Case::new();
    let output = case.path("out.flashlm");
    case.prepare(&output, &[]).succeeded();
    let stamps = || -> Vec<_> {
        let mut dirs = vec![case.path("out.flashlm.work")];
        let mut stamps = vec![fs::metadata(&output).unwrap().modified().unwrap()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let entry = entry.unwrap();
                // What is remembered of the checkpoint is remembered when it is no longer new.
                match entry.metadata().unwrap() {
                    metadata if metadata.is_dir() => dirs.push(entry.path()),
                    metadata if entry.file_name() != "source" => stamps.push(metadata.modified().unwrap()),
                    _ => {}
                }
            }
        }
        stamps.sort();
        stamps
    };
    let before = stamps();
    assert!(is_up_to_date(&case.prepare(&output, &[])));
    assert!(stamps() == before, "something was made anew though nothing changed");

    type Change<'a> = (&'a str, &'a dyn Fn(), &'a [&'a str]);
    let edit = |name: &str, from: &str, to: &str| {
        let path = case.path(name);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{name} has no {from}");
        fs::write(&path, text.replacen(from, to, 1)).unwrap();
    };
    let nothing = || ();
    let changes: [Change<'_>; 14] = [
        (
            "a decoder",
            &|| edit("checkpoint/tokenizer.json", "\"decoder\":null", "\"decoder\":{\"type\":\"Fuse\"}"),
            &[],
        ),
        (
            "what ends a text",
            &|| fs::write(case.path("checkpoint/generation_config.json"), r#"{"eos_token_id": [2, 9]}"#).unwrap(),
            &[],
        ),
        ("config.json", &|| edit("checkpoint/config.json", "4.38.0", "4.39.0"), &[]),
        ("a weight", &|| flip(&case.path("checkpoint/model.safetensors"), 70_000), &[]),
        ("the text", &|| edit("text.txt", "w4 ", "w5 "), &[]),
        ("--seed", &nothing, &["--seed", "7"]),
        ("--recall", &nothing, &["--recall", "0.9"]),
        ("--tokens", &nothing, &["--tokens", "1300"]),
        ("--sequence-tokens", &nothing, &["--sequence-tokens", "20"]),
        ("--look-ahead", &nothing, &["--look-ahead", "2"]),
        ("--dtype", &nothing, &["--dtype", "int8"]),
        ("--resident-dtype", &nothing, &["--resident-dtype", "int8"]),
        ("--embedding-dtype", &nothing, &["--embedding-dtype", "int8"]),
        ("--quality-loss", &nothing, &["--quality-loss", "5%"]),
    ];
    for (what, change, more) in changes {
        change();
        let said = case.prepare(&output, more);
        assert!(!is_up_to_date(&said), "{what} changed unnoticed: {said:?}");
        assert!(is_up_to_date(&case.prepare(&output, more)), "{what}");
        assert!(fs::read(&output).unwrap() == case.fresh(more), "{what}: not what is made from nothing");
    }
}

/// The text that the model writes: how long it may take, and what it is made from.
#[test]
fn a85_the_models_own_text_is_one_of_the_inputs() {
    let case = Case::new();
    let output = case.path("out.flashlm");
    let prepare = |minutes: &str| -> Said {
        let mut command = Command::new(program("flashlm-prep"));
        command.arg("prepare").arg(case.path("checkpoint")).arg("-o").arg(&output).args(["--minutes", minutes]);
        command
            .args(["--size-budget", "15%", "--tokens", "1400", "--sequence-tokens", "40", "--anyway"])
            .output()
            .unwrap()
            .into()
    };
    assert!(!is_up_to_date(&prepare("20")) && is_up_to_date(&prepare("20")));
    assert!(prepare("21").stderr.contains("the model wrote"));
    let text = case.path("out.flashlm.work/own-text/text.txt");
    let whole = fs::read(&text).unwrap();
    flip(&text, whole.len() / 2);
    let said = prepare("21");
    assert!(
        said.stderr.contains("text.txt is not as it was written") && said.stderr.contains("the model wrote"),
        "{said:?}"
    );
    assert!(fs::read(&text).unwrap() == whole);
    assert!(is_up_to_date(&prepare("21")));
}

/// Every file in the work directory is changed, cut and taken away: it is made again, and the bundle is what it was.
#[test]
fn a86_damaged_work_files_are_made_anew() {
    let mut dice = Dice::of("damaged work files");
    let case = Case::new();
    let output = case.path("out.flashlm");
    case.prepare(&output, &["--keep-recordings"]).succeeded();
    let whole = fs::read(&output).unwrap();
    let work = case.path("out.flashlm.work");
    let files: Vec<PathBuf> = contents(&work).into_iter().map(|(name, _)| name).collect();
    assert!(files.len() > 20, "{files:?}");
    for (number, name) in files.iter().enumerate() {
        for how in (0..3).filter(|how| rounds(0, 1) == 1 || number % 3 == *how) {
            let path = work.join(name);
            // What is remembered of earlier bundles has no contents.
            let Ok(mut bytes) = fs::read(&path) else { continue };
            match how {
                _ if bytes.is_empty() => continue,
                0 => _ = dice.flip(&mut bytes),
                1 => bytes.truncate(dice.below(bytes.len())),
                _ => bytes.clear(),
            }
            match how {
                2 => fs::remove_file(&path).unwrap(),
                _ => fs::write(&path, &bytes).unwrap(),
            }
            fs::remove_file(&output).unwrap();
            let said = case.prepare(&output, &["--keep-recordings"]);
            assert_eq!(said.code, Some(0), "{}: {said:?}", name.display());
            assert!(fs::read(&output).unwrap() == whole, "{}: another bundle; {said:?}", name.display());
        }
    }
}

/// A preparation of layers that were recorded and not yet trained, with files of the recording damaged.
#[test]
fn a86_damaged_states_are_recorded_anew() {
    let dir = scratch();
    let whole = dir.path().join("whole");
    let record = |output: &Path| {
        let mut command = Command::new(program("flashlm-prep"));
        command.arg("record").arg(flashlm_tests::tiny_opt()).arg("--text");
        command.arg(flashlm_tests::root().join("examples/synthetic.txt"));
        command.args(["--tokens", "3000", "-o"]).arg(output);
        command
    };
    Said::from(record(&whole).output().unwrap()).succeeded();
    let mut damaged = 0;
    for round in 0..20 {
        let output = dir.path().join(round.to_string());
        let mut child = record(&output).stderr(std::process::Stdio::null()).spawn().unwrap();
        let states = output.join("states");
        // The states after the second layer: from here it would go on.
        while !states.join("layer-002.f32").exists() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let last = (2..9).rev().map(|layer| states.join(format!("layer-{layer:03}.f32"))).find(|path| path.exists());
        let Some(last) = last else { continue };
        flip(&last, 5000);
        let said = Said::from(record(&output).output().unwrap());
        assert!(said.stderr.contains("is not as it was written"), "{said:?}");
        said.succeeded();
        assert!(contents(&output) == contents(&whole), "damaged states changed the recording");
        damaged += 1;
        if damaged == rounds(1, 10) {
            return;
        }
    }
    panic!("no recording was interrupted in its middle");
}

/// One preparation at a time: the others are told before they begin.
#[test]
fn a87_one_preparation_at_a_time() {
    let case = Case::new();
    let output = case.path("out.flashlm");
    let work = case.path("out.flashlm.work");
    let running: Vec<_> =
        (0..6).map(|_| case.command(&output, &[]).stderr(std::process::Stdio::piped()).spawn().unwrap()).collect();
    let said: Vec<_> = running.into_iter().map(|child| Said::from(child.wait_with_output().unwrap())).collect();
    assert!(said.iter().any(|said| said.code == Some(0)), "{said:?}");
    for said in said.iter().filter(|said| said.code != Some(0)) {
        assert_eq!((said.code, said.stderr.lines().count()), (Some(1), 1), "{said:?}");
        assert!(said.stderr.contains("another process"), "{said:?}");
    }
    // As long as another has the work directory nothing is begun, whatever the output is.
    let theirs = File::open(&work).unwrap();
    theirs.lock().unwrap();
    let args = ["--work", work.to_str().unwrap()];
    let told = case.prepare(&case.path("second.flashlm"), &args).failed(1, &["another process", "out.flashlm.work"]);
    assert_eq!(told.lines().count(), 1, "{told}");
    drop(theirs);
    assert!(is_up_to_date(&case.prepare(&output, &[])));
    for stage in [Stage::Record, Stage::Train, Stage::Order, Stage::Import] {
        let output = case.path(stage.output());
        fs::create_dir(&output).unwrap();
        let theirs = File::open(&output).unwrap();
        theirs.lock().unwrap();
        let told = Said::from(stage.run(Mini::get(), &output)).failed(1, &["another process", stage.output()]);
        let told: Vec<&str> = told.lines().filter(|line| !line.starts_with("note: ")).collect();
        assert_eq!(told.len(), 1, "{stage:?}: {told:?}");
        assert_eq!(fs::read_dir(&output).unwrap().count(), 0, "{stage:?}");
    }
}

/// What is there already needs no room: on a full disk an up-to-date bundle is up to date, and kept recordings are resumed.
#[test]
fn a88_what_is_there_needs_no_room() {
    let disk = match SmallDisk::new(6 << 20) {
        Ok(disk) => disk,
        Err(why) => return skip(&why),
    };
    let case = Case::new();
    let output = disk.path().join("out.flashlm");
    case.prepare(&output, &["--keep-recordings"]).succeeded();
    let whole = fs::read(&output).unwrap();
    let fill = || {
        let mut file = File::options().append(true).create(true).open(disk.path().join("full")).unwrap();
        while std::io::Write::write_all(&mut file, &[0; 4096]).is_ok() {}
    };
    fs::write(disk.path().join("room"), [0; 64 << 10]).unwrap();
    fill();
    assert!(is_up_to_date(&case.prepare(&output, &["--keep-recordings"])));
    // Room for the bundle alone: less than all scratch files would take.
    fs::remove_file(&output).unwrap();
    fs::remove_file(disk.path().join("room")).unwrap();
    case.prepare(&output, &["--keep-recordings"]).succeeded();
    assert!(fs::read(&output).unwrap() == whole);
    // Damaged, there is no room to pack it beside itself: that is said before.
    fill();
    flip(&output, whole.len() / 2);
    case.prepare(&output, &["--keep-recordings"]).failed(1, &["free some space"]);
}

/// Memory that is not there is said before the work, with numbers; what fits is done.
#[test]
fn a89_too_little_memory_is_said_before_the_work() {
    let prepare = |bytes: u64, tokens: &str, output: &Path| -> Result<Said, String> {
        let cgroup = Cgroup::new(bytes)?;
        let mut command = cgroup.command(&program("flashlm-prep"));
        command
            .arg("prepare")
            .arg(flashlm_tests::tiny_opt())
            .arg("-o")
            .arg(output)
            .args(["--tokens", tokens, "--text"]);
        command.arg(flashlm_tests::root().join("examples/synthetic.txt"));
        Ok(command.output().unwrap().into())
    };
    let dir = scratch();
    let output = dir.path().join("out.flashlm");
    match prepare(20 << 20, "20000", &output) {
        Err(why) => skip(&why),
        Ok(said) => {
            let told = said.failed(1, &["needs at least", "of memory", "--tokens"]);
            assert!(!told.contains("layer") && !output.exists(), "{told}");
        }
    }
}
