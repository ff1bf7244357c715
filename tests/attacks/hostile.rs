//! Attacks 60 to 64: files made to harm.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use flashlm_tests::{Said, copied, fixtures, program, root, scratch};
use rustix::fs::{CWD, FileType, Mode, mknodat};

use crate::Dice;
use crate::mini::Mini;
use crate::targets;

#[test]
fn a60_corpora_of_the_fuzzers() {
    for (name, target) in targets::ALL {
        let dir = root().join("fuzz/corpus").join(name);
        let mut files: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        assert!(!files.is_empty(), "no corpus in {}", dir.display());
        let mut dice = Dice::of(name);
        for file in files {
            let bytes = fs::read(&file).unwrap();
            let begin = Instant::now();
            target(&bytes);
            // And its neighbourhood: stable Rust has no fuzzer, but dice.
            for _ in 0..20 {
                let mut bytes = bytes.clone();
                (0..1 + dice.below(4)).for_each(|_| _ = dice.flip(&mut bytes));
                target(&bytes[..if dice.below(4) == 0 { dice.below(bytes.len()) } else { bytes.len() }]);
            }
            assert!(begin.elapsed() < Duration::from_secs(20), "{} is slow", file.display());
        }
    }
}

/// Writes what fuzzing begins with.
#[test]
#[ignore = "writes fuzz/corpus"]
fn a60_write_seeds() {
    let put = |target: &str, name: &str, bytes: &[u8]| {
        let dir = root().join("fuzz/corpus").join(target);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(name), bytes).unwrap();
    };
    let read = |path: &str| fs::read(fixtures().join(path)).unwrap();
    put("bundle", "seed-v1", &read("bundle-v1.flashlm"));
    // Headers matter, data does not: a header alone is refused late enough.
    let weights = read("quirks/opt-125m/model.safetensors");
    put("safetensors", "seed-header", &weights[..weights.len().min(6000)]);
    let tiny = br#"{"a":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]}}"#;
    put("safetensors", "seed-tiny", &[&(tiny.len() as u64).to_le_bytes()[..], tiny, &[0; 12]].concat());
    let archive = read("torch/plain/pytorch_model.bin");
    put("torch", "seed-end", &archive[archive.len() - 12_000..]);
    put("torch", "seed-legacy", &read("torch/legacy/pytorch_model.bin")[..4000]);
    for name in fs::read_dir(fixtures().join("quirks")).unwrap() {
        let name = name.unwrap().file_name().into_string().unwrap();
        put("config", &format!("seed-{name}"), &read(&format!("quirks/{name}/config.json")));
    }
    put("tokenizer", "seed-words", &fs::read(Mini::get().path("checkpoint/tokenizer.json")).unwrap());
    let bpe = r#"{"version":"1.0","added_tokens":[{"id":3,"content":"<s>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],"normalizer":{"type":"NFC"},"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true},"post_processor":null,"decoder":{"type":"ByteLevel"},"model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2},"merges":["a b"]}}"#;
    put("tokenizer", "seed-bpe", bpe.as_bytes());
    put("recording", "seed-info", &[&[0], &read("recording-tiny-opt/recording.json")[..]].concat());
    put("recording", "seed-tokens", &[&[1], &read("recording-tiny-opt/tokens.safetensors")[..]].concat());
    let (_dir, recording) = targets::small_recording();
    put("recording_layer", "seed-small", &fs::read(recording.layer_path(0)).unwrap());
    let blob = r#"{"layers.0.encoder":{"dtype":"F16","shape":[2,4],"data_offsets":[0,16]},"layers.0.decoder":{"dtype":"F16","shape":[9,2],"data_offsets":[16,52]},"layers.0.bias":{"dtype":"F32","shape":[9],"data_offsets":[52,88]}}"#;
    put("predictors", "seed-f16", &[&(blob.len() as u64).to_le_bytes()[..], blob.as_bytes(), &[0; 88]].concat());
}

/// Pipes and devices in the place of files: none is waited for, none is read without end.
#[test]
fn a61_pipes_and_devices_as_files() {
    let dir = scratch();
    let mini = Mini::get();
    let pipe = dir.path().join("pipe");
    mknodat(CWD, &pipe, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    let out = dir.path().join("out");
    let refuse = |name: &str, args: &[&Path]| {
        let mut command = Command::new(program(name));
        let mut child =
            command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let begin = Instant::now();
        while child.try_wait().unwrap().is_none() {
            if begin.elapsed() > Duration::from_secs(20) {
                child.kill().unwrap();
                panic!("{args:?} hangs");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Said::from(child.wait_with_output().unwrap()).failed(1, &[]);
    };
    let word = Path::new;
    for thing in [pipe.as_path(), word("/dev/zero"), word("/dev/null")] {
        refuse("flashlm", &[word("run"), thing, word("--ids"), word("5")]);
        refuse("flashlm", &[word("plan"), thing]);
        for command in ["verify", "inspect", "convert"] {
            let output = [word("-o"), out.as_path()];
            let output = if command == "convert" { &output[..] } else { &[] };
            refuse("flashlm-prep", &[&[word(command), thing][..], output].concat());
        }
        for (from, files) in [
            ("checkpoint", &["config.json", "model.safetensors", "tokenizer.json"][..]),
            ("recording", &["recording.json", "tokens.safetensors", "layer-000.safetensors"]),
            ("predictors", &["predictor-000.safetensors"]),
            ("orders", &["layer-000.order.safetensors"]),
        ] {
            for file in files {
                let copy = copied_tree(&mini.path(from));
                fs::remove_file(copy.path().join(file)).unwrap();
                std::os::unix::fs::symlink(thing, copy.path().join(file)).unwrap();
                let (checkpoint, predictors, orders) =
                    (mini.path("checkpoint"), mini.path("predictors"), mini.path("orders"));
                match from {
                    "checkpoint" => refuse("flashlm-prep", &[word("convert"), copy.path(), word("-o"), &out]),
                    "recording" => refuse(
                        "flashlm-prep",
                        &[word("train"), copy.path(), word("--rank"), word("4"), word("-o"), &out],
                    ),
                    _ => {
                        let predictors = if from == "predictors" { copy.path() } else { &predictors };
                        let orders = if from == "orders" { copy.path() } else { &orders };
                        let args = [
                            word("pack"),
                            &checkpoint,
                            word("--predictors"),
                            predictors,
                            word("--orders"),
                            orders,
                            word("-o"),
                            &out,
                        ];
                        refuse("flashlm-prep", &args);
                    }
                }
            }
        }
    }
}

/// A copy of the plain files of a directory.
fn copied_tree(from: &Path) -> tempfile::TempDir {
    copied(from)
}

/// Files that claim more than they hold, within 600 MB of address space.
#[test]
fn a62_claims_do_not_take_memory() {
    let dir = scratch();
    let checkpoint = dir.path().join("checkpoint");
    let config = fs::read_to_string(fixtures().join("quirks/opt-125m/config.json")).unwrap();
    let header = |json: &str| [&(json.len() as u64).to_le_bytes()[..], json.as_bytes()].concat();
    let shape = r#"{"model.decoder.embed_tokens.weight":{"dtype":"F16","shape":[1152921504606846976,48],"data_offsets":[0,12]}}"#;
    let deep = format!("{}{}", "[".repeat(2_000_000), "]".repeat(2_000_000));
    let good = fs::read(fixtures().join("quirks/opt-125m/model.safetensors")).unwrap();
    let with = |key: &str, value: &str| {
        let start = config.find(&format!("\"{key}\":")).unwrap();
        let end = start + config[start..].find(',').unwrap();
        format!("{}\"{key}\": {value}{}", &config[..start], &config[end..])
    };
    let huge = with("num_hidden_layers", "1152921504606846976");
    let many = with("num_hidden_layers", "4000000");
    let wide = with("ffn_dim", "9007199254740992");
    for (name, config, weights) in [
        ("a shape of 2^60", config.as_str(), header(shape)),
        ("a header of 2^60", &config, [&(1u64 << 60).to_le_bytes()[..], b"{}"].concat()),
        ("a header of deep JSON", &config, header(&deep)),
        ("deep JSON as configuration", &deep, good.clone()),
        ("2^60 layers", &huge, good.clone()),
        ("four million layers", &many, good.clone()),
        ("2^53 neurons", &wide, good.clone()),
    ] {
        fs::create_dir_all(&checkpoint).unwrap();
        fs::write(checkpoint.join("config.json"), config).unwrap();
        fs::write(checkpoint.join("model.safetensors"), weights).unwrap();
        let mut sh = Command::new("sh");
        sh.args(["-c", "ulimit -v 600000 && exec \"$@\"", "sh"]).arg(program("flashlm-prep")).arg("convert");
        sh.arg(&checkpoint).arg("-o").arg(dir.path().join("out")).stdin(Stdio::null());
        let begin = Instant::now();
        let said = Said::from(sh.output().unwrap());
        assert!(begin.elapsed() < Duration::from_secs(20), "{name} takes long");
        assert!(!said.stderr.contains("allocat"), "{name}: {}", said.stderr);
        said.failed(1, &[]);
    }
}
