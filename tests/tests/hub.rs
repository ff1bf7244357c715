//! Models from a hub, as a user fetches them: with the program, from a hub-like server on loopback.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use flashlm_tests::hub_server::{Behaviour, COMMIT, Hub, MODEL, Request};
use flashlm_tests::{Said, copied, fixtures, program, root, scratch, tiny_opt};
use tempfile::TempDir;

const TOKEN: &str = "hf_secret";
/// Variables that the machine may have and the tests must not see.
const FOREIGN: [&str; 18] = [
    "HTTP_PROXY",
    "http_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "ALL_PROXY",
    "all_proxy",
    "HF_TOKEN",
    "HF_HOME",
    "HF_ENDPOINT",
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_TOKEN_PATH",
    "XDG_CACHE_HOME",
    "HF_HUB_DISABLE_SYMLINKS",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN",
];

/// Every file of a directory, and some that nobody needs.
fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<(String, Vec<u8>)> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(&path).unwrap())
        })
        .collect();
    for name in
        ["flax_model.msgpack", "tf_model.h5", "onnx/model.onnx", "pytorch_model.bin", "rust_model.ot", "README.md"]
    {
        if !files.iter().any(|(n, _)| n == name) {
            files.push((name.into(), vec![7; 200_000]));
        }
    }
    files
}

struct User {
    home: TempDir,
    endpoint: String,
}

impl User {
    fn of(hub: &Hub) -> Self {
        Self { home: scratch(), endpoint: hub.endpoint.clone() }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(program("flashlm-prep"));
        FOREIGN.iter().for_each(|name| _ = command.env_remove(name));
        command.env("HF_HOME", self.home.path()).env("HF_ENDPOINT", &self.endpoint);
        command.args(args).stdin(Stdio::null()).current_dir(self.home.path());
        command
    }

    fn run_with(&self, args: &[&str], environment: &[(&str, &str)]) -> Said {
        let mut command = self.command(args);
        command.envs(environment.iter().copied());
        let mut command = assert_cmd::Command::from_std(command);
        command.timeout(Duration::from_secs(120)).output().unwrap().into()
    }

    fn run(&self, args: &[&str]) -> Said {
        self.run_with(args, &[])
    }

    fn path(&self, name: &str) -> String {
        self.home.path().join(name).to_str().unwrap().to_owned()
    }

    /// Length of what there is of a file that is not complete.
    fn incomplete(&self) -> Option<u64> {
        let blobs = self.home.path().join("hub/models--some-org--tiny/blobs");
        let parts = fs::read_dir(blobs).ok()?.map(|entry| entry.unwrap().path());
        parts
            .filter(|path| path.extension().is_some_and(|e| e == "incomplete"))
            .find_map(|p| Some(p.metadata().ok()?.len()))
    }
}

fn convert_directory(dir: &Path) -> Vec<u8> {
    let out = scratch();
    let path = out.path().join("m.flashlm");
    let args = ["convert", dir.to_str().unwrap(), "-o", path.to_str().unwrap()];
    flashlm_tests::run("flashlm-prep", &args, "").succeeded();
    fs::read(path).unwrap()
}

fn of_store(requests: &[Request]) -> Vec<&Request> {
    requests.iter().filter(|r| r.of_store).collect()
}

#[test]
fn a_model_is_assessed_from_its_first_layers() {
    let local = flashlm_tests::run("flashlm-prep", &["assess", tiny_opt().to_str().unwrap(), "--json"], "").succeeded();
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    let whole = json(&local);
    assert_eq!(whole["worth_preparing"], true);
    let size = fs::metadata(tiny_opt().join("model.safetensors")).unwrap().len() as usize;

    let hub = Hub::start(files(&tiny_opt()));
    let user = User::of(&hub);
    let assessed = json(&user.run(&["assess", MODEL, "--layers", "2", "--json"]).succeeded());
    let shares = |of: &serde_json::Value| of["active_share_of_layers"].as_array().unwrap().clone();
    assert_eq!(shares(&assessed), shares(&whole)[..2]);
    let requests = hub.requests();
    let fetched: usize = of_store(&requests).iter().map(|request| request.sent).sum();
    // The embedding is 4 of 15 MB, each layer 1.3.
    assert!((size / 4..size / 2).contains(&fetched), "{fetched} of {size}");
    assert!(of_store(&requests).iter().all(|request| request.range.as_ref().is_some_and(|r| !r.ends_with('-'))));

    let quick = user.run(&["assess", MODEL, "--quick"]).succeeded();
    assert!(quick.contains("preparing a model of family opt") && !quick.contains("tokens/s"), "{quick}");
    let fetched: usize = of_store(&hub.requests()).iter().map(|request| request.sent).sum();
    assert!(fetched < size / 100, "{fetched}");
    // Nothing of it looks like the whole model to anybody else.
    let offline = user.run_with(&["inspect", MODEL], &[("HF_HUB_OFFLINE", "1")]);
    assert!(offline.stderr.contains("HF_HUB_OFFLINE"), "{offline:?}");

    hub.behave(Behaviour { no_ranges: true, ..Behaviour::default() });
    let refused = user.run(&["assess", MODEL]);
    assert!(refused.stderr.contains("it sends others"), "{refused:?}");

    // What is here already is not asked for again.
    hub.behave(Behaviour::default());
    user.run(&["inspect", MODEL]).succeeded();
    hub.requests();
    user.run(&["assess", MODEL]).succeeded();
    assert!(of_store(&hub.requests()).is_empty());
}

#[test]
fn weights_that_cannot_be_read_in_part_are_named() {
    let hub = Hub::start(vec![("config.json".into(), b"{}".to_vec()), ("pytorch_model.bin".into(), vec![0; 100])]);
    let said = User::of(&hub).run(&["assess", MODEL]);
    assert!(said.stderr.contains("pytorch_model.bin") && said.stderr.contains("flashlm-prep inspect"), "{said:?}");
}

#[test]
fn a_bundle_is_found_by_the_name_of_its_model() {
    let cache = scratch();
    let kept = cache.path().join("bundles/some-org--tiny.flashlm");
    fs::create_dir(kept.parent().unwrap()).unwrap();
    let cache = cache.path().to_str().unwrap();
    let flashlm = |args: &[&str]| {
        let mut command = assert_cmd::Command::new(program("flashlm"));
        command.args(args).env("FLASHLM_CACHE_DIR", cache).env("PATH", "").timeout(Duration::from_secs(60));
        Said::from(command.output().unwrap())
    };
    let run = ["run", MODEL, "--prompt", "Once upon a time", "-n", "4"];
    let missing = flashlm(&run);
    assert!(missing.stderr.contains("flashlm-prep prepare some-org/tiny"), "{missing:?}");
    // The other program's commands are this one's.
    let model = tiny_opt();
    let convert = ["convert", model.to_str().unwrap(), "-o", kept.to_str().unwrap()];
    flashlm(&convert).succeeded();
    let said = flashlm(&run);
    assert!(said.stderr.contains("some-org/tiny is prepared"), "{said:?}");
    assert!(said.succeeded().starts_with(", there was"));
    assert!(flashlm(&["plan", MODEL]).succeeded().contains("total"));
    assert!(flashlm(&["help", "convert"]).succeeded().contains("flashlm-prep convert"));
}

#[test]
fn an_interrupted_download_goes_on_where_it_stopped() {
    let hub = Hub::start(files(&tiny_opt()));
    let user = User::of(&hub);
    let size = fs::metadata(tiny_opt().join("model.safetensors")).unwrap().len();
    let output = user.path("m.flashlm");
    let convert = ["convert", MODEL, "-o", &output];

    // The server hangs up twice, then falls silent, and the process is killed.
    let cuts = vec![(2_000_000, false), (1_000_000, false), (3_000_000, true)];
    hub.behave(Behaviour { token: Some(TOKEN), cuts, ..Behaviour::default() });
    let mut child = user.command(&convert).env("HF_TOKEN", TOKEN).stderr(Stdio::piped()).spawn().unwrap();
    let begin = Instant::now();
    while user.incomplete() != Some(6_000_000) {
        assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", hub.requests());
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    hub.behave(Behaviour { token: Some(TOKEN), ..Behaviour::default() });
    let have = user.incomplete().expect("what was fetched is kept");
    assert!(have < size && !Path::new(&output).exists(), "{have}");
    let before = hub.requests();
    let ranges: Vec<_> = of_store(&before).iter().map(|r| r.range.clone()).collect();
    assert_eq!(ranges, [None, Some("bytes=2000000-".into()), Some("bytes=3000000-".into())]);

    let said = user.run_with(&convert, &[("HF_TOKEN", TOKEN)]);
    assert!(said.stderr.contains("are here already"), "{said:?}");
    said.succeeded();
    let after = hub.requests();
    let [rest] = of_store(&after)[..] else { panic!("{after:?}") };
    assert_eq!(rest.range, Some(format!("bytes={have}-")));
    assert_eq!(rest.sent as u64, size - have);
    assert_eq!(fs::read(&output).unwrap(), convert_directory(&tiny_opt()));

    // The token went to the hub, always, and never further; nobody asked for what is not needed.
    for request in before.iter().chain(&after) {
        let expected = (!request.of_store).then(|| format!("Bearer {TOKEN}"));
        assert_eq!(request.authorization, expected, "{request:?}");
        for name in ["flax", "tf_model", "onnx", "pytorch", ".ot", "README", "vocab", "merges"] {
            assert!(!request.path.contains(name), "{request:?}");
        }
    }

    // Complete: one question, and offline none.
    let again = user.path("again.flashlm");
    user.run_with(&["convert", MODEL, "-o", &again], &[("HF_TOKEN", TOKEN)]).succeeded();
    assert_eq!(hub.requests().len(), 1);
    let offline = user.path("offline.flashlm");
    user.run_with(&["convert", MODEL, "-o", &offline], &[("HF_HUB_OFFLINE", "1")]).succeeded();
    assert!(hub.requests().is_empty());
    drop(hub);
    let gone = user.run(&["convert", MODEL, "-o", &user.path("gone.flashlm")]);
    assert!(gone.stderr.contains("as it was downloaded before"), "{gone:?}");
    gone.succeeded();
    assert_eq!(fs::read(&output).unwrap(), fs::read(&offline).unwrap());
}

/// Waits until `done`, while the child runs.
fn wait_for(child: &mut std::process::Child, done: impl Fn() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(60), "it takes too long");
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn prepare_killed_while_fetching_and_while_training_ends_in_the_same_bundle() {
    let hub = Hub::start(files(&tiny_opt()));
    let user = User::of(&hub);
    let [a, b, work, other] = ["a.flashlm", "b.flashlm", "work", "other"].map(|name| user.path(name));
    let (directory, text) = (tiny_opt(), root().join("examples/synthetic.txt"));
    let arguments = |source: &'static str, output: &str, work: &str| -> Vec<String> {
        let args = ["prepare", source, "--text", text.to_str().unwrap(), "-o", output, "--work", work];
        let sampling = ["--tokens", "2500", "--sequence-tokens", "128"];
        args.iter().chain(&sampling).map(ToString::to_string).collect()
    };
    let from_hub = arguments(MODEL, &a, &work);
    let from_hub: Vec<&str> = from_hub.iter().map(String::as_str).collect();

    // Killed in the middle of the weights ..
    let cuts = vec![(5_000_000, true)];
    hub.behave(Behaviour { cuts, detour: true, ..Behaviour::default() });
    let mut child = user.command(&from_hub).stderr(Stdio::null()).spawn().unwrap();
    wait_for(&mut child, || user.incomplete() == Some(5_000_000));
    child.kill().unwrap();
    child.wait().unwrap();
    hub.behave(Behaviour { detour: true, ..Behaviour::default() });
    // .. and after the first layer that was trained.
    let mut child = user.command(&from_hub).stderr(Stdio::null()).spawn().unwrap();
    let first = Path::new(&work).join("predictors/report-000.json");
    wait_for(&mut child, || first.exists());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!Path::new(&a).exists());
    let trained = fs::metadata(&first).unwrap().modified().unwrap();
    user.run(&from_hub).succeeded();
    assert_eq!(fs::metadata(&first).unwrap().modified().unwrap(), trained, "trained twice");
    let requests = hub.requests();
    let ranges: Vec<_> = of_store(&requests).iter().filter(|r| r.method == "GET").map(|r| r.range.clone()).collect();
    assert_eq!(ranges, [None, Some("bytes=5000000-".into())], "fetched once");

    let directory = directory.to_str().unwrap().to_owned();
    let from_directory = arguments(Box::leak(directory.into_boxed_str()), &b, &other);
    user.run(&from_directory.iter().map(String::as_str).collect::<Vec<_>>()).succeeded();
    assert!(fs::read(&a).unwrap() == fs::read(&b).unwrap());
    for (report, model) in [("a.report.html", "some-org/tiny"), ("b.report.html", "tiny-opt")] {
        let page = fs::read_to_string(user.path(report)).unwrap();
        assert!(page.contains(&format!("How sparse and how predictable: {model}<")), "{report}");
        assert!(page.contains("--sequence-tokens 128") && !page.contains("class=\"missing\""), "{report}");
    }

    // Without a name the bundle goes where it is found by that of its model.
    let named: Vec<&str> = from_hub.iter().copied().filter(|word| *word != "-o" && *word != a).collect();
    let said = user.run_with(&named, &[("FLASHLM_CACHE_DIR", &user.path("cache"))]);
    assert!(said.stderr.ends_with("to run it: flashlm run some-org/tiny\n"), "{said:?}");
    said.succeeded();
    assert!(fs::read(user.path("cache/bundles/some-org--tiny.flashlm")).unwrap() == fs::read(&a).unwrap());
    assert!(Path::new(&user.path("cache/bundles/some-org--tiny.report.html")).exists());
}

#[test]
fn a_busy_hub_is_asked_again_when_it_says() {
    let hub = Hub::start(files(&tiny_opt()));
    let user = User::of(&hub);
    // The list of files, a file's name, and the weights each are refused for a while.
    let (limit, down) = ("429 Too Many Requests", "503 Service Unavailable");
    let busy = vec![(false, limit, Some(1)), (false, down, None), (true, limit, Some(1)), (true, down, None)];
    hub.behave(Behaviour { busy, cuts: vec![(2_000_000, false)], ..Behaviour::default() });
    let begin = Instant::now();
    let said = user.run(&["inspect", MODEL]);
    assert!(begin.elapsed() >= Duration::from_secs(2), "it did not wait");
    assert_eq!(said.stderr.matches("asks to wait 1 s (status 429)").count(), 2, "{said:?}");
    said.succeeded();

    // Too long a wait, and one that does not end, are for the user to decide.
    for (busy, words) in [
        (vec![(false, limit, Some(3600)); 9], ["status 429", "to wait 3600 s", "HF_TOKEN", "repeat the command"]),
        (vec![(false, down, None); 9], ["status 503", "/api/models/", "kept", "repeat the command"]),
    ] {
        let fresh = User::of(&hub);
        hub.behave(Behaviour { busy, ..Behaviour::default() });
        fresh.run(&["inspect", MODEL]).failed(1, &words);
    }
    let fresh = User::of(&hub);
    hub.behave(Behaviour { busy: vec![(true, limit, Some(3600))], ..Behaviour::default() });
    let said = fresh.run(&["inspect", MODEL]).failed(1, &["to wait 3600 s", "model.safetensors"]);
    assert!(!said.contains("signature"), "{said}");
    // With a copy in the cache a hub that is down stops nobody.
    hub.behave(Behaviour { busy: vec![(false, down, None); 9], ..Behaviour::default() });
    let said = user.run(&["inspect", MODEL]);
    assert!(said.stderr.contains("as it was downloaded before"), "{said:?}");
    said.succeeded();
}

#[test]
fn a_mirror_may_lie_under_a_path() {
    let hub = Hub::start(files(&tiny_opt()));
    let user = User::of(&hub);
    hub.behave(Behaviour { prefix: "/mirrors/hf", token: Some(TOKEN), detour: true, ..Behaviour::default() });
    let endpoint = format!("{}/mirrors/hf/", hub.endpoint);
    let with = [("HF_ENDPOINT", endpoint.as_str()), ("HF_TOKEN", TOKEN)];
    user.run_with(&["inspect", MODEL], &with).succeeded();
    let requests = hub.requests();
    assert!(requests.iter().all(|r| r.of_store || r.path.starts_with("/mirrors/hf/")), "{requests:?}");
    assert!(requests.iter().all(|r| r.of_store == r.authorization.is_none()), "{requests:?}");
    user.run_with(&["inspect", "some-org/other"], &with).failed(1, &["/mirrors/hf has no model some-org/other"]);
}

#[test]
fn gated_files_of_a_model_that_all_may_see() {
    let hub = Hub::start(files(&tiny_opt()));
    let user = User::of(&hub);
    hub.behave(Behaviour { gated: Some(TOKEN), ..Behaviour::default() });
    let page = format!("{}/{MODEL}", hub.endpoint);
    let inspect = |environment: &[(&str, &str)]| user.run_with(&["inspect", MODEL], environment);
    inspect(&[]).failed(1, &["status 401", "set HF_TOKEN", "accept the model's conditions", &page]);
    inspect(&[("HF_TOKEN", "hf_other")]).failed(1, &["status 403", "gives no access", "conditions", &page]);
    inspect(&[("HF_TOKEN", TOKEN)]).succeeded();
    // Gone from the hub: with a token it says so by another status.
    let said = user.run_with(&["inspect", "some-org/gone"], &[("HF_TOKEN", TOKEN)]);
    assert!(!said.failed(1, &["has no model some-org/gone", "check the name"]).contains("set HF_TOKEN"));
}

#[test]
fn repositories_that_cannot_be_read_are_told_before_anything_large_is_fetched() {
    let config = ("config.json".to_owned(), fs::read(tiny_opt().join("config.json")).unwrap());
    let flax = [config.clone(), ("flax_model.msgpack".into(), vec![7; 10]), ("tf_model.h5".into(), vec![7; 10])];
    let hub = Hub::start(flax);
    let user = User::of(&hub);
    user.run(&["inspect", MODEL])
        .failed(1, &["no safetensors or PyTorch weights", "flax_model.msgpack", "from_flax=True", "save_pretrained"]);
    let weights = ("model.safetensors".to_owned(), fs::read(tiny_opt().join("model.safetensors")).unwrap());
    let hub = Hub::start([config.clone(), weights.clone()]);
    let user = User::of(&hub);
    let said = user.run(&["convert", MODEL, "-o", &user.path("m.flashlm")]);
    let before = said.stderr.split("fetching").next().unwrap();
    assert!(before.contains("no tokenizer that can be used"), "{said:?}");
    said.failed(1, &["tokenizer.json", "tokenizer.model"]);
    // SentencePiece's is one, if it is whole.
    let hub = Hub::start([config, weights, ("tokenizer.model".into(), vec![7; 10])]);
    let user = User::of(&hub);
    let said = user.run(&["convert", MODEL, "-o", &user.path("m.flashlm")]);
    let before = said.stderr.split("fetching").next().unwrap();
    assert!(!before.contains("no tokenizer"), "{said:?}");
    said.failed(1, &["tokenizer.model", "SentencePiece"]);
}

/// A cache on a disk of its own, too small: refused at once, or full on the way. Needs to mount.
#[test]
fn a_full_disk_keeps_what_arrived() {
    let hub = Hub::start(files(&tiny_opt()));
    let user = User::of(&hub);
    let Some(disk) = SmallDisk::mount(&user.path("disk"), "24m") else { return };
    let with = [("HF_HUB_CACHE", disk.0.as_str()), ("HF_HUB_DOWNLOAD_TIMEOUT", "1")];
    let inspect = || user.run_with(&["inspect", MODEL], &with);
    let stuffing = Path::new(&disk.0).join("stuffing");
    fs::write(&stuffing, vec![0; 12_000_000]).unwrap();
    inspect().failed(1, &["more bytes are needed in", "are free", "HF_HUB_CACHE"]);
    fs::remove_file(&stuffing).unwrap();

    // Room for all at first; somebody else takes it while the server is silent.
    hub.behave(Behaviour { cuts: vec![(3_000_000, true)], ..Behaviour::default() });
    let mut child = user.command(&["inspect", MODEL]);
    let mut child = child.envs(with).stderr(Stdio::piped()).spawn().unwrap();
    let part = || {
        let blobs = fs::read_dir(Path::new(&disk.0).join("models--some-org--tiny/blobs")).ok()?;
        blobs.filter_map(|e| Some(e.ok()?.path())).find(|p| p.extension().is_some_and(|e| e == "incomplete"))
    };
    let have = || part().and_then(|path| Some(path.metadata().ok()?.len())).unwrap_or(0);
    wait_for(&mut child, || have() == 3_000_000);
    fs::write(&stuffing, vec![0; 12_000_000]).unwrap();
    let said: Said = child.wait_with_output().unwrap().into();
    said.failed(1, &["more bytes are needed in", "are free", "What was fetched is kept"]);
    let kept = have();
    assert!(kept >= 3_000_000, "{kept}");
    fs::remove_file(&stuffing).unwrap();
    hub.requests();
    inspect().succeeded();
    let requests = hub.requests();
    let ranges: Vec<_> = of_store(&requests).iter().map(|r| r.range.clone()).collect();
    assert_eq!(ranges, [Some(format!("bytes={kept}-"))]);
}

/// A file system in memory, unmounted when dropped.
struct SmallDisk(String);

impl SmallDisk {
    /// None, with a word why, where mounting is not allowed.
    fn mount(path: &str, size: &str) -> Option<Self> {
        fs::create_dir(path).unwrap();
        let args = ["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", path];
        let mounted = Command::new("mount").args(args).stderr(Stdio::null()).status();
        if mounted.is_ok_and(|status| status.success()) {
            return Some(Self(path.to_owned()));
        }
        assert!(std::env::var_os("FLASHLM_REQUIRE_ROOT").is_none(), "a small disk cannot be mounted");
        eprintln!("skipped: a small disk cannot be mounted here");
        None
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[test]
fn a_server_without_ranges_sends_everything_again() {
    let hub = Hub::start(files(&tiny_opt()));
    let user = User::of(&hub);
    hub.behave(Behaviour { cuts: vec![(3_000_000, false)], no_ranges: true, ..Behaviour::default() });
    let output = user.path("m.flashlm");
    user.run(&["convert", MODEL, "-o", &output]).succeeded();
    assert!(fs::read(&output).unwrap() == convert_directory(&tiny_opt()));
}

#[test]
fn shards_and_older_formats_are_found() {
    for (dir, wanted, not) in [
        (fixtures().join("torch/sharded"), "pytorch_model-", "flax"),
        (fixtures().join("torch/plain"), "pytorch_model.bin", "flax"),
    ] {
        let mut here = files(&dir);
        here.retain(|(name, content)| !(name == "pytorch_model.bin" && content.iter().all(|&b| b == 7)));
        if !here.iter().any(|(name, _)| name == "config.json") {
            here.push(("config.json".into(), fs::read(fixtures().join("quirks/opt-125m/config.json")).unwrap()));
        }
        let hub = Hub::start(here);
        let user = User::of(&hub);
        let said = user.run(&["inspect", MODEL]);
        let requests = hub.requests();
        assert!(requests.iter().any(|r| r.path.contains(wanted)), "{said:?} {requests:?}");
        assert!(!requests.iter().any(|r| r.path.contains(not)), "{requests:?}");
        assert!(said.succeeded().contains("torch"));
    }
}

#[test]
fn what_goes_wrong_is_said_with_the_next_step() {
    let hub = Hub::start(files(&tiny_opt()));
    let user = User::of(&hub);
    let inspect = |name: &str, environment: &[(&str, &str)]| user.run_with(&["inspect", name], environment);
    let offline = [("HF_HUB_OFFLINE", "1")];
    inspect(MODEL, &offline).failed(1, &["not complete", "unset HF_HUB_OFFLINE", "no directory some-org/tiny here"]);
    assert!(hub.requests().is_empty());
    inspect("some-org/other", &[]).failed(1, &["has no model some-org/other", "HF_TOKEN", "no directory"]);
    inspect("some-org/tiny@v9", &[]).failed(1, &["no revision \"v9\"", "branch"]);
    inspect(MODEL, &[("HF_ENDPOINT", "http://127.0.0.1:1")]).failed(1, &["cannot reach", "HF_ENDPOINT", "network"]);
    inspect(MODEL, &[("HF_ENDPOINT", "nonsense")]).failed(1, &["HF_ENDPOINT", "https://"]);

    hub.behave(Behaviour { token: Some(TOKEN), ..Behaviour::default() });
    inspect(MODEL, &[]).failed(1, &["set HF_TOKEN", "conditions", MODEL]);
    let wrong = inspect(MODEL, &[("HF_TOKEN", "hf_wrong")]).failed(1, &["the token that was sent gives no access"]);
    assert!(!wrong.contains("hf_wrong"));

    hub.behave(Behaviour { damaged: true, ..Behaviour::default() });
    inspect(MODEL, &[]).failed(1, &["SHA-256", "deleted", "Repeat"]);
    assert_eq!(user.incomplete(), None);
    hub.behave(Behaviour { cuts: vec![(0, false); 20], ..Behaviour::default() });
    inspect(MODEL, &[]).failed(1, &["broke 5 times in a row", "repeat the command to go on"]);
    // Silence ends, too.
    hub.behave(Behaviour { cuts: vec![(1000, true); 20], ..Behaviour::default() });
    let begin = Instant::now();
    let mut child = user.command(&["inspect", MODEL]).env("HF_HUB_DOWNLOAD_TIMEOUT", "1").spawn().unwrap();
    while user.incomplete().is_none_or(|bytes| bytes < 2000) {
        assert!(begin.elapsed() < Duration::from_secs(30) && child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();

    hub.behave(Behaviour::default());
    let busy = lock_everything(&user);
    inspect(MODEL, &[]).failed(1, &["another process is fetching model.safetensors"]);
    drop(busy);
    inspect(MODEL, &[]).succeeded();
    inspect(&format!("{MODEL}@refs/pr/1"), &[]).succeeded();
    inspect(&format!("{MODEL}@{COMMIT}"), &offline).succeeded();
    let cache = user.path("hub");
    inspect(MODEL, &[("HF_HUB_OFFLINE", "1"), ("HF_HOME", "/nowhere"), ("HF_HUB_CACHE", &cache)]).succeeded();
}

/// Takes the locks as another client would.
fn lock_everything(user: &User) -> Vec<fs::File> {
    let locks = PathBuf::from(user.path("hub/.locks/models--some-org--tiny"));
    let files = fs::read_dir(locks).unwrap().map(|entry| fs::File::open(entry.unwrap().path()).unwrap());
    let files: Vec<_> = files.collect();
    files.iter().for_each(|file| file.lock().unwrap());
    files
}

#[test]
fn a_cache_without_symbolic_links_serves_as_well() {
    let hub = Hub::start(files(&tiny_opt()));
    let user = User::of(&hub);
    let without = [("HF_HUB_DISABLE_SYMLINKS", "1")];
    let output = user.path("m.flashlm");
    user.run_with(&["convert", MODEL, "-o", &output], &without).succeeded();
    let snapshot = user.home.path().join("hub/models--some-org--tiny/snapshots").join(COMMIT);
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        assert!(snapshot.join(name).symlink_metadata().unwrap().is_file(), "{name}");
    }
    // As Python's client leaves it: what was moved is not there twice.
    let blobs = user.home.path().join("hub/models--some-org--tiny/blobs");
    assert_eq!(fs::read_dir(blobs).unwrap().count(), 0);
    assert!(fs::read(&output).unwrap() == convert_directory(&tiny_opt()));
    // Nothing is fetched again, with links or without, with the hub or without it.
    hub.requests();
    user.run_with(&["inspect", MODEL], &without).succeeded();
    user.run(&["inspect", MODEL]).succeeded();
    assert_eq!(hub.requests().len(), 2);
    user.run_with(&["inspect", MODEL], &[("HF_HUB_OFFLINE", "1")]).succeeded();
}

#[test]
fn variables_with_a_tilde_name_the_cache_that_all_clients_share() {
    let hub = Hub::start(files(&tiny_opt()));
    let user = User::of(&hub);
    let home = user.path("home");
    fs::create_dir(&home).unwrap();
    user.run_with(&["inspect", MODEL], &[("HOME", &home), ("HF_HOME", "~/hf")]).succeeded();
    assert!(Path::new(&home).join("hf/hub/models--some-org--tiny").is_dir());
    assert!(!user.home.path().join("~").exists());
    let offline = [("HF_HUB_OFFLINE", "1"), ("HOME", home.as_str())];
    for (name, value) in [("HF_HOME", "$HOME/hf"), ("HF_HUB_CACHE", "~/hf/hub"), ("HF_HUB_CACHE", "${HOME}/hf/hub")] {
        user.run_with(&["inspect", MODEL], &[&offline[..], &[(name, value)]].concat()).succeeded();
    }
}

#[test]
fn a_directory_of_the_same_name_wins() {
    let hub = Hub::start(files(&tiny_opt()));
    let user = User::of(&hub);
    fs::create_dir(user.path("some-org")).unwrap();
    fs::rename(copied(&fixtures().join("quirks/opt-125m")).keep(), user.path(MODEL)).unwrap();
    user.run(&["inspect", MODEL]).succeeded();
    assert!(hub.requests().is_empty());
    fs::remove_file(user.path(&format!("{MODEL}/config.json"))).unwrap();
    user.run(&["inspect", MODEL]).failed(1, &["config.json", "for the model on the hub write some-org/tiny@main"]);
    assert!(hub.requests().is_empty());
    user.run(&["inspect", &format!("{MODEL}@main")]).succeeded();

    let empty = Hub::start([("config.json".to_owned(), b"{}".to_vec()), ("model.gguf".to_owned(), vec![0; 10])]);
    let user = User::of(&empty);
    user.run(&["inspect", MODEL]).failed(1, &["no safetensors or PyTorch weights", "model.gguf"]);
}

#[test]
fn chat_templates_are_fetched_with_the_model() {
    let mut files = files(&tiny_opt());
    files.push(("chat_template.jinja".into(), b"{{ messages[0].content }}".to_vec()));
    files.push(("additional_chat_templates/tool_use.jinja".into(), b"{{ tools }}".to_vec()));
    files.push(("additional_chat_templates/../escape.jinja".into(), b"x".to_vec()));
    let hub = Hub::start(files);
    let user = User::of(&hub);
    let output = user.path("m.flashlm");
    user.run(&["convert", MODEL, "-o", &output]).succeeded();
    let bundle = flashlm_formats::bundle::Bundle::open(&output).unwrap();
    let chat = bundle.manifest().chat.as_ref().unwrap();
    let templates: Vec<_> = chat.templates.iter().map(|(name, text)| (&**name, &**text)).collect();
    assert_eq!(templates, [("default", "{{ messages[0].content }}"), ("tool_use", "{{ tools }}")]);
    assert_eq!(chat.special_tokens["eos_token"], "</s>");
    assert!(hub.requests().iter().all(|request| !request.path.contains("escape")));
}
