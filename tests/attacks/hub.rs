//! Hostile hubs, and caches that somebody prepared: no download lasts forever, and nothing outside the cache is touched.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use flashlm_prep::hub::{HubError, ModelName, Pace, Settings, Watch, fetch};
use flashlm_tests::hub_server::{Behaviour, Hub, MODEL, hex_sha256};
use flashlm_tests::{scratch, tiny_opt};
use tempfile::TempDir;

struct Nobody;

impl Watch for Nobody {
    fn begin(&mut self, _: u64, _: u64) {}
    fn at(&mut self, _: u64) {}
    fn say(&mut self, _: &str) {}
}

/// The example's directory on a hub, and an empty cache.
fn hub() -> (Hub, TempDir) {
    let names = ["config.json", "tokenizer.json", "model.safetensors"];
    (Hub::start(names.map(|name| (name.to_owned(), fs::read(tiny_opt().join(name)).unwrap()))), scratch())
}

fn settings(hub: &Hub, cache: &Path) -> Settings {
    Settings {
        endpoint: hub.endpoint.clone(),
        cache: cache.to_owned(),
        token: None,
        offline: false,
        timeout: Duration::from_secs(5),
        pace: Pace { bytes: 10_000, time: Duration::from_millis(200) },
        links: true,
    }
}

fn fetched(hub: &Hub, cache: &Path) -> Result<PathBuf, HubError> {
    fetch(&ModelName::parse(MODEL).unwrap(), &settings(hub, cache), &mut Nobody)
}

#[test]
fn servers_that_never_get_further_are_given_up() {
    let by_turns = |lengths: &[usize]| lengths.iter().cycle().take(60).map(|&n| (n, false)).collect::<Vec<_>>();
    let behaviours = [
        // Refuses to go on, and sends from the start again, in the same length or two by turns.
        Behaviour { unsatisfiable: true, cuts: by_turns(&[3_000_000]), ..Behaviour::default() },
        Behaviour { no_ranges: true, cuts: by_turns(&[3_000_000, 2_000_000]), ..Behaviour::default() },
        // Gets further, by a byte.
        Behaviour { cuts: by_turns(&[1]), ..Behaviour::default() },
    ];
    std::thread::scope(|scope| {
        for behaviour in behaviours {
            scope.spawn(|| {
                let (hub, cache) = hub();
                hub.behave(behaviour);
                let error = fetched(&hub, cache.path()).unwrap_err();
                assert!(matches!(error, HubError::Cut { .. }), "{error}");
                let asked = hub.requests().iter().filter(|request| request.of_store).count();
                assert!(asked < 12, "{asked} requests: {error}");
                // What lies here after all that is no harm.
                hub.behave(Behaviour::default());
                fetched(&hub, cache.path()).unwrap();
            });
        }
    });
}

#[test]
fn a_byte_now_and_then_is_not_waited_for() {
    let pause = Duration::from_millis(5);
    std::thread::scope(|scope| {
        for path in ["?signature", "/revision/"] {
            scope.spawn(move || {
                let (hub, cache) = hub();
                hub.behave(Behaviour { drip: Some((path, pause)), ..Behaviour::default() });
                let error = fetched(&hub, cache.path()).unwrap_err().to_string();
                assert!(error.contains("bytes arrived in 0.2 s"), "{error}");
                assert!(error.contains("kept"), "{error}");
            });
        }
    });
}

/// Fetches where something stands under the temporary name of the weights, or in place of their lock.
fn with_planted(lock: bool, plant: impl Fn(&Path)) -> HubError {
    let (hub, cache) = hub();
    let name = hex_sha256(&fs::read(tiny_opt().join("model.safetensors")).unwrap());
    let place = match lock {
        true => cache.path().join(format!(".locks/models--some-org--tiny/{name}.lock")),
        false => cache.path().join(format!("models--some-org--tiny/blobs/{name}.incomplete")),
    };
    fs::create_dir_all(place.parent().unwrap()).unwrap();
    plant(&place);
    let error = fetched(&hub, cache.path()).unwrap_err();
    // And its own way out helps.
    fs::remove_file(&place).unwrap();
    fetched(&hub, cache.path()).unwrap();
    error
}

#[test]
fn what_stands_in_the_place_of_the_caches_own_files_is_neither_waited_for_nor_written_to() {
    let dir = scratch();
    let precious = dir.path().join("precious");
    std::thread::scope(|scope| {
        for lock in [false, true] {
            for (kind, words) in [("pipe", "no file"), ("link", "symbolic link"), ("name", "hard link")] {
                let precious = precious.with_extension(format!("{kind}-{lock}"));
                scope.spawn(move || {
                    fs::write(&precious, "all of it").unwrap();
                    let plant = |place: &Path| match kind {
                        "pipe" => assert!(Command::new("mkfifo").arg(place).status().unwrap().success()),
                        "link" => symlink(&precious, place).unwrap(),
                        _ => fs::hard_link(&precious, place).unwrap(),
                    };
                    let said = with_planted(lock, plant).to_string();
                    assert!(said.contains(words) && said.contains("remove it"), "{kind}, {lock}: {said}");
                    assert_eq!(fs::read(&precious).unwrap(), b"all of it");
                });
            }
        }
    });
}

#[test]
fn a_pipe_or_link_as_the_name_of_a_revision_is_not_written_to() {
    let (hub, cache) = hub();
    let refs = cache.path().join("models--some-org--tiny/refs");
    fs::create_dir_all(&refs).unwrap();
    let precious = cache.path().join("precious");
    fs::write(&precious, "all of it").unwrap();
    symlink(&precious, refs.join("main")).unwrap();
    fetched(&hub, cache.path()).unwrap();
    assert_eq!(fs::read(&precious).unwrap(), b"all of it");
    fs::remove_file(refs.join("main")).unwrap();
    assert!(Command::new("mkfifo").arg(refs.join("main")).status().unwrap().success());
    let said = fetched(&hub, cache.path()).unwrap_err().to_string();
    assert!(said.contains("pipe"), "{said}");
}

#[test]
fn shards_that_the_hub_does_not_have_are_not_asked_for() {
    let map: serde_json::Map<String, serde_json::Value> =
        (0..800).map(|i| (format!("t{i}"), format!("model-{i}.safetensors").into())).collect();
    let index = serde_json::json!({ "weight_map": map }).to_string();
    let config = fs::read(tiny_opt().join("config.json")).unwrap();
    let files = [("config.json", config), ("model.safetensors.index.json", index.into_bytes())];
    let hub = Hub::start(files.map(|(name, bytes)| (name.to_owned(), bytes)));
    let cache = scratch();
    let error = fetched(&hub, cache.path()).unwrap_err();
    assert!(matches!(error, HubError::MissingShards { .. }), "{error}");
    assert!(error.to_string().len() < 1000, "{error}");
    assert!(hub.requests().len() < 12);
}
