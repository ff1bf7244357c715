//! Attacks 20 to 29: disks that are full, slow, broken or refuse, and files that change under the reader.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use flashlm::error::RuntimeError;
use flashlm::load::load;
use flashlm::options::{FfnChoice, LoadOptions};
use flashlm::plan::plan;
use flashlm::sampler::Sampling;
use flashlm_formats::bundle::{Bundle, verify};
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_io::{EngineChoice, FaultPlan};
use flashlm_kernels::Threads;
use flashlm_prep::pack::{PackOptions, pack};
use flashlm_prep::record::text::Sampling as TextSampling;
use flashlm_prep::record::{Calibration, Recorder};
use flashlm_tests::{Said, continuation, loaded, options, program, scratch};
use tempfile::TempDir;

use crate::mini::{Mini, Stage, contents, convert_from_hub, hub};
use crate::{rounds, skip};

/// A small file system in memory, unmounted when dropped.
pub(crate) struct SmallDisk(TempDir);

impl SmallDisk {
    pub(crate) fn new(bytes: u64) -> Result<Self, String> {
        let dir = scratch();
        let disk = Self(dir);
        disk.mount("tmpfs", &format!("size={bytes},mode=755")).map(|()| disk)
    }

    /// One that has room, and so many names.
    fn with_names(count: u64) -> Result<Self, String> {
        let disk = Self(scratch());
        disk.mount("tmpfs", &format!("size=64m,nr_inodes={count},mode=755")).map(|()| disk)
    }

    /// Gives it room and names.
    fn grow(&self) {
        let mut mount = Command::new("mount");
        let grown = mount.args(["-o", "remount,size=64m,nr_inodes=100000"]).arg(self.path()).status();
        assert!(grown.unwrap().success());
    }

    /// One that has no direct reads, and no bound.
    fn without_direct() -> Result<Self, String> {
        let disk = Self(scratch());
        disk.mount("ramfs", "mode=755").map(|()| disk)
    }

    fn mount(&self, kind: &str, options: &str) -> Result<(), String> {
        let mut mount = Command::new("mount");
        let output = mount.args(["-t", kind, "-o", options, kind]).arg(self.0.path()).output();
        let output = output.map_err(|e| e.to_string())?;
        output.status.success().then_some(()).ok_or_else(|| String::from_utf8_lossy(&output.stderr).into_owned())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: what a process had registered with io_uring may be held for a moment after its end.
        _ = Command::new("umount").arg("--lazy").arg(self.0.path()).stderr(Stdio::null()).status();
    }
}

#[test]
fn a20_a_disk_that_is_full_at_any_moment() {
    let mini = Mini::get();
    let size = |path: &Path| -> u64 {
        let files = if path.is_dir() { contents(path) } else { vec![(PathBuf::new(), fs::read(path).unwrap())] };
        files.iter().map(|(_, bytes)| (bytes.len() as u64).next_multiple_of(4096)).sum()
    };
    for stage in Stage::ALL {
        let whole = mini.path(stage.output());
        let needed = size(&whole);
        let steps = rounds(3, 40) as u64;
        let mut failed = 0;
        for step in 0..steps {
            // From no room at all; small outputs fit into a page, so one page is taken.
            let bytes = needed * step / steps / 4096 * 4096;
            let disk = match SmallDisk::new(bytes + 4096) {
                Ok(disk) => disk,
                Err(why) => return skip(&why),
            };
            fs::write(disk.path().join("taken"), [0; 4096]).unwrap();
            let output = disk.path().join(stage.output());
            let said = Said::from(stage.run(mini, &output));
            if said.code != Some(0) {
                failed += 1;
                said.failed(1, &[]);
                for (name, bytes) in contents(disk.path()) {
                    let path = disk.path().join(&name);
                    let is_wrong = Bundle::open(&path).is_ok()
                        && verify(&path, &mut |_, _| ()).is_ok_and(|r| !r.damages.is_empty());
                    assert!(!is_wrong, "{stage:?}: {} opens and is wrong", name.display());
                    let expected = whole.join(name.strip_prefix(stage.output()).unwrap_or(&name));
                    if whole.is_dir() && expected.is_file() {
                        assert_eq!(bytes, fs::read(expected).unwrap(), "{stage:?}: {} is not whole", name.display());
                    }
                }
            }
            // With room it goes on and ends as if nothing had been.
            disk.grow();
            assert!(stage.run(mini, &output).status.success(), "{stage:?} does not go on");
            if whole.is_dir() {
                assert!(contents(&output) == contents(&whole), "{stage:?}: other bytes after a full disk");
            } else if stage != Stage::Pack {
                // The packed one was changed by the mini model itself.
                assert_eq!(fs::read(&output).unwrap(), fs::read(&whole).unwrap(), "{stage:?}");
            }
        }
        assert!(failed > 0, "{stage:?} never met a full disk");
    }
}

/// Models of the hub: from no room, and from no room for another name, to enough.
#[test]
fn a20_a_disk_that_is_full_while_a_model_is_fetched() {
    let hub = hub();
    let out = scratch();
    let output = out.path().join("m.flashlm");
    let (mut failed, mut names) = (0, 5);
    for pages in 0..60 {
        // By turns too little room and too few names.
        let is_room = pages % 2 == 0;
        let disk = if is_room { SmallDisk::new(4096 * (1 + pages)) } else { SmallDisk::with_names(names) };
        names += u64::from(!is_room);
        let disk = match disk {
            Ok(disk) => disk,
            Err(why) => return skip(&why),
        };
        let said = Said::from(convert_from_hub(&hub, disk.path(), &output).output().unwrap());
        if said.code == Some(0) {
            continue;
        }
        failed += 1;
        let said = said.stderr.clone();
        assert!(said.contains("No space") || said.contains("room") || said.contains("free"), "{said}");
        assert!(said.contains(disk.path().to_str().unwrap()), "no path in: {said}");
        disk.grow();
        Said::from(convert_from_hub(&hub, disk.path(), &output).output().unwrap()).succeeded();
        assert_eq!(fs::read(&output).unwrap(), fs::read(Mini::get().path("converted.flashlm")).unwrap());
    }
    assert!(failed > 20, "the disk was full {failed} times");
}

/// A profile that cannot be kept is an error, and the one that was kept stays.
#[test]
fn a20_a_disk_that_is_full_for_its_profile() {
    let disk = match SmallDisk::new(8192) {
        Ok(disk) => disk,
        Err(why) => return skip(&why),
    };
    let measured = scratch();
    let flashlm_disk = || {
        let mut command = Command::new(program("flashlm"));
        command.arg("disk").arg(measured.path()).args(["--seconds", "1", "--scratch", "64"]);
        command.env("FLASHLM_CACHE_DIR", disk.path()).stdin(Stdio::null());
        Said::from(command.output().unwrap())
    };
    flashlm_disk().succeeded();
    let kept = contents(disk.path());
    assert_eq!(kept.len(), 1);
    while fs::write(disk.path().join(format!("taken-{}", contents(disk.path()).len())), [0; 4096]).is_ok() {}
    flashlm_disk().failed(1, &["disk-", "No space left"]);
    let (name, bytes) = &kept[0];
    assert_eq!(fs::read(disk.path().join(name)).unwrap(), *bytes);
    // And where the scratch file for measuring does not fit.
    let mut command = Command::new(program("flashlm"));
    command.arg("disk").arg(disk.path()).args(["--seconds", "1", "--scratch", "64"]);
    command.env("FLASHLM_CACHE_DIR", measured.path()).stdin(Stdio::null());
    Said::from(command.output().unwrap()).failed(1, &["No space left"]);
    assert!(fs::read_dir(measured.path()).unwrap().next().is_none());
}

/// Checkpoints are refused up front where they do not fit; nothing is left.
#[test]
fn a20_a_disk_that_is_full_for_a_synthesized_model() {
    let disk = match SmallDisk::new(40 << 20) {
        Ok(disk) => disk,
        Err(why) => return skip(&why),
    };
    let mut command = Command::new(program("flashlm-prep"));
    command.args(["synthesize", "--geometry", "opt-125m", "--layers", "1", "-o"]).arg(disk.path().join("new"));
    Said::from(command.stdin(Stdio::null()).output().unwrap()).failed(1, &["bytes free", "needs"]);
    assert!(contents(disk.path()).is_empty());
}

/// A bundle of its own, for changing.
fn own_bundle() -> (TempDir, PathBuf) {
    let dir = scratch();
    let path = dir.path().join("own.flashlm");
    fs::copy(Mini::get().bundle(), &path).unwrap();
    (dir, path)
}

fn smallest(bundle: &Bundle, options: &LoadOptions) -> LoadOptions {
    match plan(bundle, &LoadOptions { budget: Some(1), ..options.clone() }) {
        Err(RuntimeError::BudgetTooSmall { needed, .. }) => LoadOptions { budget: Some(needed), ..options.clone() },
        _ => panic!("one byte is enough"),
    }
}

/// The ways in which neurons come from the disk while decoding.
fn ways() -> Vec<LoadOptions> {
    let with = |ffn, engine: EngineChoice| LoadOptions { engines: engine.into(), ..options(100, ffn) };
    let engines = [EngineChoice::Auto, EngineChoice::Threads];
    engines
        .into_iter()
        .flat_map(|engine| [FfnChoice::Flash, FfnChoice::Streamed].map(|ffn| with(ffn, engine)))
        .collect()
}

#[test]
fn a21_passing_faults_change_nothing_and_are_counted() {
    let bundle = Bundle::open(Mini::get().bundle()).unwrap();
    for way in ways() {
        let way = smallest(&bundle, &way);
        let text = |model: &mut _| continuation(model, &[5, 6], 30, Sampling::default());
        let expected = text(&mut loaded(&bundle, &way));
        for (faults, retried) in [
            (FaultPlan { fail_first: 2, after: 5, ..FaultPlan::default() }, true),
            (FaultPlan { fail_first: 3, errno: 4, after: 1, ..FaultPlan::default() }, true),
            (FaultPlan { short_every: 2, ..FaultPlan::default() }, false),
            (FaultPlan { delay: Duration::from_micros(300), ..FaultPlan::default() }, false),
        ] {
            let mut model = loaded(&bundle, &LoadOptions { engines: way.engines.with_faults(faults), ..way.clone() });
            assert_eq!(text(&mut model), expected, "{faults:?} with {way:?}");
            assert_eq!(model.read_counters().retries > 0, retried, "{faults:?} with {way:?}");
        }
    }
}

#[test]
fn a22_lasting_faults_end_with_layer_offset_and_file() {
    let path = Mini::get().bundle();
    let bundle = Bundle::open(&path).unwrap();
    for way in ways() {
        let engines = way.engines.with_deadline(Duration::from_millis(300));
        let way = LoadOptions { engines, ..smallest(&bundle, &way) };
        for (faults, word) in [
            (FaultPlan { fail_first: u64::MAX, after: 30, ..FaultPlan::default() }, "after 3 retries"),
            (FaultPlan { stall_first: u64::MAX, after: 30, ..FaultPlan::default() }, "has not finished"),
        ] {
            let mut model = loaded(&bundle, &LoadOptions { engines: way.engines.with_faults(faults), ..way.clone() });
            let begin = Instant::now();
            let error = (0..90).find_map(|id| model.feed(&[5 + id]).err()).expect("the disk is broken").to_string();
            assert!(begin.elapsed() < Duration::from_secs(20), "{error}");
            for part in ["layer ", "offset ", path.to_str().unwrap(), word] {
                assert!(error.contains(part), "no {part:?} in: {error}");
            }
        }
        // While loading there is no layer, but the rest is said.
        let broken = FaultPlan { fail_first: u64::MAX, ..FaultPlan::default() };
        let way = LoadOptions { engines: engines.with_faults(broken), ..way };
        let error = load(&bundle, &way, &mut |_, _| ()).err().unwrap().to_string();
        assert!(error.contains("offset ") && error.contains(path.to_str().unwrap()), "{error}");
    }
}

#[test]
fn a23_a_bundle_that_shrinks_or_is_replaced_while_running() {
    for way in ways() {
        let (dir, path) = own_bundle();
        let bundle = Bundle::open(&path).unwrap();
        let way = smallest(&bundle, &way);
        let text = |model: &mut _| continuation(model, &[5, 6], 30, Sampling::default());
        let mut model = loaded(&bundle, &way);
        let expected = text(&mut model);

        // Another file under its name: the open one stays whole until the run ends.
        fs::write(dir.path().join("other"), "another").unwrap();
        fs::rename(dir.path().join("other"), &path).unwrap();
        assert_eq!(text(&mut model), expected, "{way:?}");
        // Replaced between opening and loading.
        fs::copy(Mini::get().bundle(), dir.path().join("other")).unwrap();
        fs::rename(dir.path().join("other"), &path).unwrap();
        let error = load(&bundle, &way, &mut |_, _| ()).err().unwrap();
        assert!(matches!(error, RuntimeError::Replaced { .. }), "{error}");

        // Overwritten where it lies.
        let bundle = Bundle::open(&path).unwrap();
        let mut model = loaded(&bundle, &way);
        let file = File::options().write(true).open(&path).unwrap();
        let flash = bundle.flash();
        file.write_all_at(&vec![7; flash.bytes as usize], flash.offset).unwrap();
        let error = (0..90).find_map(|id| model.feed(&[5 + id]).err()).expect("overwritten").to_string();
        assert!(error.contains("damaged") && error.contains("of layer"), "{error}");

        // Cut.
        let (_dir, path) = own_bundle();
        let bundle = Bundle::open(&path).unwrap();
        let mut model = loaded(&bundle, &way);
        File::options().write(true).open(&path).unwrap().set_len(flash.offset + 4096).unwrap();
        let error = (0..90).find_map(|id| model.feed(&[5 + id]).err()).expect("cut").to_string();
        assert!(error.contains("ended early") && error.contains("layer "), "{error}");
    }
}

#[test]
fn a24_a_source_that_changes_meanwhile() {
    let dir = scratch();
    let source = dir.path().join("checkpoint");
    let out = dir.path().join("out.flashlm");
    let weights = source.join("model.safetensors");
    type Change = fn(&Path);
    let changes: [(&str, Change); 3] = [
        ("grows", |path| File::options().append(true).open(path).unwrap().write_all(b"x").unwrap()),
        ("shrinks", |path| File::options().write(true).open(path).unwrap().set_len(100_000).unwrap()),
        ("is written to", |path| {
            std::thread::sleep(Duration::from_millis(20));
            File::options().write(true).open(path).unwrap().write_all_at(b"x", 100_000).unwrap();
        }),
    ];
    for (name, change) in changes {
        crate::mini::write_checkpoint(&source);
        let checkpoint = Checkpoint::open(&source).unwrap();
        let mut changed = false;
        let options = PackOptions { tokenizer: b"{}".to_vec(), ..PackOptions::default() };
        let result = pack(&checkpoint, &out, options, &mut |_, _| {
            if !std::mem::replace(&mut changed, true) {
                change(&weights);
            }
        });
        let error = result.expect_err(name).to_string();
        assert!(error.contains("changed") && error.contains("model.safetensors"), "{name}: {error}");
        assert!(!out.exists());

        // Recording notices at its end at the latest.
        crate::mini::write_checkpoint(&source);
        let checkpoint = Checkpoint::open(&source).unwrap();
        let sampling = TextSampling { tokens: 60, sequence_tokens: 30, seed: 1, held_out: 0.1 };
        let calibration = Calibration::random(checkpoint.spec(), sampling);
        let recording = dir.path().join(name);
        let threads = Threads::new(std::num::NonZeroUsize::MIN).unwrap();
        let mut recorder = Recorder::open(&checkpoint, &calibration, &recording, threads).unwrap();
        recorder.record(0, true, &mut |_| ()).unwrap();
        change(&weights);
        let second = recorder.record(1, true, &mut |_| ());
        let error = second.and_then(|_| recorder.finish().map(|_| 0.0)).expect_err(name).to_string();
        assert!(error.contains("changed") || error.contains("model.safetensors"), "{name}: {error}");
    }
}

/// Trained further, with files as long as before: nothing of the old model may be taken for the new one's.
#[test]
fn a25_a_source_that_changed_between_two_runs() {
    let dir = scratch();
    let source = dir.path().join("checkpoint");
    crate::mini::write_checkpoint(&source);
    let prepare = |output: &str| {
        let mut command = Command::new(program("flashlm-prep"));
        command.arg("prepare").arg(&source).arg("--text").arg(Mini::get().path("text.txt"));
        command
            .args(["--tokens", "1400", "--sequence-tokens", "40", "--size-budget", "15%", "--anyway", "-o"])
            .arg(dir.path().join(output));
        let said = Said::from(command.stdin(Stdio::null()).output().unwrap());
        (said.stderr.clone(), said.succeeded()).0
    };
    prepare("a.flashlm");
    assert!(prepare("a.flashlm").contains("is up to date"));
    let weights = source.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let half = bytes.len() / 2;
    bytes[half..].iter_mut().step_by(2).for_each(|low| *low ^= 1);
    fs::write(&weights, bytes).unwrap();
    assert!(!prepare("a.flashlm").contains("is up to date"));
    prepare("b.flashlm");
    assert_eq!(fs::read(dir.path().join("a.flashlm")).unwrap(), fs::read(dir.path().join("b.flashlm")).unwrap());
}

/// A user without rights: root passes every check, so the program runs as nobody.
#[test]
fn a26_directories_and_files_without_permission() {
    if !rustix::process::geteuid().is_root() {
        return skip("only root can become another user");
    }
    let dir = tempfile::tempdir().unwrap();
    let open = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    open(dir.path(), 0o755);
    let mini = Mini::get();
    let bundle = dir.path().join("mini.flashlm");
    fs::copy(mini.bundle(), &bundle).unwrap();
    crate::mini::write_checkpoint(&dir.path().join("checkpoint"));
    open(&dir.path().join("checkpoint"), 0o755);
    let as_nobody = |name: &str, args: &[&Path]| {
        let here = dir.path().join(name);
        fs::copy(program(name), &here).unwrap();
        open(&here, 0o755);
        let mut command = Command::new(here);
        command
            .args(args)
            .current_dir(dir.path())
            .env("HOME", "/nonexistent")
            .stdin(Stdio::null())
            .uid(65534)
            .gid(65534);
        // Other tests start programs meanwhile, which hold the copy open for writing for a moment, until they have begun.
        for _ in 0..100 {
            match command.output() {
                Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                other => return other.map(Said::from),
            }
        }
        panic!("the copied program is busy");
    };
    let (checkpoint, out) = (dir.path().join("checkpoint"), dir.path().join("out.flashlm"));
    let word = Path::new;
    match as_nobody("flashlm-prep", &[word("convert"), &checkpoint, word("-o"), &out]) {
        Ok(said) => said.failed(1, &["Permission denied"]),
        Err(error) => return skip(&error.to_string()),
    };
    assert!(!out.exists());
    let run = |bundle: &Path| {
        as_nobody("flashlm", &[word("run"), bundle, word("--ids"), word("5"), word("-n"), word("3")]).unwrap()
    };
    open(&bundle, 0o644);
    run(&bundle).succeeded();
    open(&bundle, 0o600);
    run(&bundle).failed(1, &["mini.flashlm", "Permission denied"]);
    open(&checkpoint.join("model.safetensors"), 0o600);
    let writable = dir.path().join("writable");
    fs::create_dir(&writable).unwrap();
    open(&writable, 0o777);
    let said = as_nobody("flashlm-prep", &[word("convert"), &checkpoint, word("-o"), &writable.join("x.flashlm")]);
    said.unwrap().failed(1, &["model.safetensors", "Permission denied"]);
    assert_eq!(fs::read_dir(&writable).unwrap().count(), 0);
}

#[test]
fn a27_read_only_file_systems() {
    let disk = match SmallDisk::new(16 << 20) {
        Ok(disk) => disk,
        Err(why) => return skip(&why),
    };
    let mini = Mini::get();
    let bundle = disk.path().join("mini.flashlm");
    fs::copy(mini.bundle(), &bundle).unwrap();
    assert!(Command::new("mount").args(["-o", "remount,ro"]).arg(disk.path()).status().unwrap().success());
    for stage in Stage::ALL {
        Said::from(stage.run(mini, &disk.path().join("new"))).failed(1, &["Read-only file system"]);
    }
    // Running needs to write nothing.
    let expected = run_mini(&mini.bundle(), &[], None).succeeded();
    assert_eq!(run_mini(&bundle, &[], None).succeeded(), expected);
}

/// `flashlm run`, with some system calls forbidden.
fn run_mini(bundle: &Path, args: &[&str], forbidden: Option<&seccompiler::BpfProgram>) -> Said {
    std::thread::scope(|scope| {
        // A filter holds for the thread that asks for it and what that starts.
        let run = scope.spawn(|| {
            if let Some(filter) = forbidden {
                seccompiler::apply_filter(filter).expect("filters are to be had");
            }
            let mut command = Command::new(program("flashlm"));
            command.arg("run").arg(bundle).args(["--ids", "5,6,7", "-n", "30", "--ignore-eos", "--verbose"]).args(args);
            Said::from(command.stdin(Stdio::null()).output().unwrap())
        });
        run.join().unwrap()
    })
}

#[test]
fn a28_direct_reads_refused() {
    let mini = Mini::get();
    let expected = run_mini(&mini.bundle(), &[], None).succeeded();
    let disk = match SmallDisk::without_direct() {
        Ok(disk) => disk,
        Err(why) => return skip(&why),
    };
    let bundle = disk.path().join("mini.flashlm");
    fs::copy(mini.bundle(), &bundle).unwrap();
    let required = run_mini(&bundle, &["--direct", "required"], None);
    required.failed(1, &["direct I/O is required", "optional"]);
    let optional = run_mini(&bundle, &[], None);
    assert!(optional.stderr.contains("through the page cache"), "{}", optional.stderr);
    assert_eq!(optional.succeeded(), expected);
}

#[test]
#[cfg(target_arch = "x86_64")]
fn a29_io_uring_forbidden() {
    use seccompiler::{SeccompAction, SeccompFilter, TargetArch};
    const IO_URING_SETUP: i64 = 425;
    let mini = Mini::get();
    let expected = run_mini(&mini.bundle(), &[], None).succeeded();
    for errno in [1, 38] {
        let rules = [(IO_URING_SETUP, vec![])].into_iter().collect();
        let filter = SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(errno), TargetArch::x86_64);
        let filter = filter.unwrap().try_into().unwrap();
        let said = run_mini(&mini.bundle(), &[], Some(&filter));
        assert!(said.stderr.contains("threads"), "the fallback is not announced: {}", said.stderr);
        assert_eq!(said.succeeded(), expected);
        run_mini(&mini.bundle(), &["--engine", "io_uring"], Some(&filter)).failed(1, &["io_uring engine failed"]);
    }
}
