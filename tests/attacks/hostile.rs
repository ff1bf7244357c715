//! Attacks 60 to 67: files made to harm.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use flashlm::text::Tokenizer;
use flashlm_formats::bundle::{Bundle, PredictorDType, Section};
use flashlm_formats::checkpoint::PublishedTensor;
use flashlm_formats::destination::{Destination, FileKind};
use flashlm_formats::ids::NeuronId;
use flashlm_formats::orders::OrderFile;
use flashlm_formats::predictors::{PredictorPart, StoredElements, StoredMatrix, write_predictor};
use flashlm_formats::sessions::{Origin, SavedSession, write_session};
use flashlm_prep::foreign_predictors;
use flashlm_prep::train::Fitted;
use flashlm_tests::{Said, copied, fixtures, program, root, scratch};
use rustix::fs::{CWD, FileType, Mode, mknodat};

use serde_json::Value;

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
    for (name, prefix) in [("v2", ""), ("v2-quantised", " "), ("v3", "")] {
        let bundle = Bundle::open(fixtures().join(format!("bundle-{name}.flashlm"))).unwrap();
        let manifest = bundle.read_part(bundle.section(Section::Manifest).unwrap().extent).unwrap();
        put("bundle", &format!("seed-manifest-{name}"), &[prefix.as_bytes(), &manifest].concat());
        let section = bundle.read_part(bundle.resident().extent).unwrap();
        let length = u64::from_le_bytes(section[..8].try_into().unwrap()) as usize;
        let table = [prefix.as_bytes(), section[8..8 + length].trim_ascii()].concat();
        put("bundle", &format!("seed-resident-{name}"), &table);
    }
    let (tensors, config) = (targets::tiny::tensors(), targets::tiny::CONFIG);
    let (header, _) = targets::tiny::safetensors_json(&tensors);
    put("safetensors", "seed-header", header.as_bytes());
    put("safetensors", "seed-file", &targets::tiny::safetensors(&tensors));
    let (first, second) = tensors.split_at(tensors.len() / 2);
    let shards = [(first, "a.safetensors"), (second, "b.safetensors")];
    let map: serde_json::Map<_, _> = shards
        .iter()
        .flat_map(|(tensors, shard)| tensors.iter().map(|tensor| (tensor.name.clone(), (*shard).into())))
        .collect();
    put("safetensors", "seed-index", serde_json::json!({ "weight_map": map }).to_string().as_bytes());
    put("safetensors", "seed-foreign", targets::tiny::FOREIGN);
    let pickle = targets::tiny::pickle(&tensors);
    put("torch", "seed-pickle", &pickle);
    put("torch", "seed-archive", &targets::tiny::archive(&pickle));
    let foreign = |name: &str, shape: &[usize]| PublishedTensor { name: name.into(), shape: shape.into() };
    put("torch", "seed-foreign", &targets::tiny::pickle(&[foreign("0.weight", &[2, 4]), foreign("1.weight", &[9, 2])]));
    put("config", "seed-tiny", &[config, b"\0{\"eos_token_id\":[1,2]}\0{\"add_bos_token\":false}"].concat());
    for name in fs::read_dir(fixtures().join("quirks")).unwrap() {
        let name = name.unwrap().file_name().into_string().unwrap();
        put("config", &format!("seed-{name}"), &read(&format!("quirks/{name}/config.json")));
    }
    put("tokenizer", "seed-words", &fs::read(Mini::get().path("checkpoint/tokenizer.json")).unwrap());
    let bpe = r#"{"version":"1.0","added_tokens":[{"id":3,"content":"<s>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],"normalizer":{"type":"NFC"},"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true},"post_processor":null,"decoder":{"type":"ByteLevel"},"model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2},"merges":["a b"]}}"#;
    put("tokenizer", "seed-bpe", bpe.as_bytes());
    put("tokenizer", "seed-older-files", b"{\"a\":0,\"b\":1,\"ab\":2,\"</s>\":3}\0#version: 0.2\na b\n\0{\"add_prefix_space\":true,\"eos_token\":\"</s>\",\"added_tokens_decoder\":{\"3\":{\"content\":\"</s>\",\"special\":true}}}\0{\"bos_token\":{\"content\":\"</s>\"}}\0{\"<x>\":4}");
    let kinds = [
        (
            "wordpiece",
            r#"{"version":"1.0","normalizer":{"type":"BertNormalizer","clean_text":true,"handle_chinese_chars":true,"strip_accents":null,"lowercase":true},"pre_tokenizer":{"type":"BertPreTokenizer"},"decoder":{"type":"WordPiece","prefix":"\#\#","cleanup":true},"model":{"type":"WordPiece","unk_token":"[UNK]","continuing_subword_prefix":"\#\#","max_input_chars_per_word":100,"vocab":{"[UNK]":0,"on":1,"\#\#ce":2,"a":3}}}"#,
        ),
        (
            "unigram",
            r#"{"version":"1.0","normalizer":{"type":"Sequence","normalizers":[{"type":"Prepend","prepend":"_"},{"type":"Replace","pattern":{"Regex":" +"},"content":"_"}]},"pre_tokenizer":{"type":"Metaspace","replacement":"_","prepend_scheme":"always","split":true},"decoder":{"type":"Sequence","decoders":[{"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]},"model":{"type":"Unigram","unk_id":0,"vocab":[["<unk>",0.0],["_on",-1.5],["ce",-2.0],["a",-3.0]],"byte_fallback":false}}"#,
        ),
        (
            "llama",
            r#"{"version":"1.0","truncation":{"max_length":8,"stride":0,"strategy":"LongestFirst","direction":"Right"},"padding":{"strategy":{"Fixed":9},"direction":"Left","pad_to_multiple_of":4,"pad_id":0,"pad_type_id":0,"pad_token":"a"},"pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"Split","pattern":{"Regex":"(?i:'s|'t)|\\p{L}+|\\p{N}{1,3}"},"behavior":"Isolated","invert":false},{"type":"ByteLevel","add_prefix_space":false,"use_regex":false}]},"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"a","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],"pair":[{"Sequence":{"id":"A","type_id":0}},{"Sequence":{"id":"B","type_id":1}}],"special_tokens":{"a":{"id":"a","ids":[0],"tokens":["a"]}}},"decoder":{"type":"ByteLevel"},"model":{"type":"BPE","dropout":null,"unk_token":"a","continuing_subword_prefix":"","end_of_word_suffix":"","fuse_unk":true,"byte_fallback":true,"ignore_merges":true,"vocab":{"a":0,"b":1,"ab":2,"<0x41>":3},"merges":[["a","b"]]}}"#,
        ),
    ];
    for (name, json) in kinds {
        put("tokenizer", &format!("seed-{name}"), json.as_bytes());
    }
    put("recording", "seed-info", &[&[0], &read("recording-tiny-opt/recording.json")[..]].concat());
    put("recording", "seed-tokens", &[&[1], &read("recording-tiny-opt/tokens.safetensors")[..]].concat());
    let (_dir, recording) = targets::small_recording();
    put("recording_layer", "seed-small", &fs::read(recording.layer_path(0)).unwrap());
    let dir = scratch();
    fs::write(dir.path().join("0.safetensors"), targets::tiny::foreign()).unwrap();
    let predictor = foreign_predictors::read(&dir.path().join("0.safetensors"), None).unwrap();
    let trained = dir.path().join("trained");
    for dtype in [PredictorDType::F16, PredictorDType::Int8] {
        let predictor = Fitted::low_rank(predictor.clone(), dtype);
        write_predictor(&trained, &[predictor.part("")]).unwrap();
        put("predictors", &format!("seed-trained-{dtype:?}").to_lowercase(), &fs::read(&trained).unwrap());
    }
    let (order, groups) = ((0..9).rev().map(NeuronId).collect(), None);
    let order = OrderFile { layer: 0, strategy: "path".into(), recording: "r".into(), groups, order };
    put("predictors", "seed-order", &fs::read(order.write(dir.path()).unwrap()).unwrap());
    let blob = r#"{"layers.0.encoder":{"dtype":"F16","shape":[2,4],"data_offsets":[0,16]},"layers.0.decoder":{"dtype":"F16","shape":[9,2],"data_offsets":[16,52]},"layers.0.bias":{"dtype":"F32","shape":[9],"data_offsets":[52,88]}}"#;
    let values = StoredElements::Int4 { values: vec![0x7a; 9 * 16], scales: vec![0x3f; 9 * 2] };
    let decoder = StoredMatrix { rows: 9, columns: 4, elements: values };
    let part = PredictorPart { prefix: "", encoder: None, decoder, relu: false, bias: &[0.5; 9], rows: None };
    write_predictor(&trained, &[part]).unwrap();
    put("predictors", "seed-projection", &fs::read(&trained).unwrap());
    let session = dir.path().join("session");
    let origin = Origin { bundle: 7, kv: "f16".into(), predicted: true, instructions: "plain".into() };
    let (ids, in_piece) = (vec![2, 9, 4], vec![true, false]);
    let conversation = Some("{\"turns\":[]}".to_owned());
    let saved = SavedSession { origin, ids, in_piece, conversation, planes: 4, row_bytes: 6 };
    let destination = Destination::take(&session, FileKind::Session, &[]).unwrap();
    write_session(destination, &saved, &mut |plane, write| write(&[plane as u8; 12])).unwrap();
    let session = fs::read(session).unwrap();
    put("sessions", "seed-small", &session);
    let length = u64::from_le_bytes(session[..8].try_into().unwrap()) as usize;
    put("sessions", "seed-header", session[8..8 + length].trim_ascii());
    put("predictors", "seed-f16", &[&(blob.len() as u64).to_le_bytes()[..], blob.as_bytes(), &[0; 88]].concat());
}

/// Pipes and devices in place of files: none is waited for, none is read without end.
#[test]
fn a61_pipes_and_devices_as_files() {
    let dir = scratch();
    let mini = Mini::get();
    let pipe = dir.path().join("pipe");
    mknodat(CWD, &pipe, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    let out = dir.path().join("out");
    let refuse = |name: &str, args: &[&Path]| {
        let mut command = Command::new(program(name));
        command.args(args).stdout(Stdio::null()).stderr(Stdio::piped());
        ends(command, &format!("{args:?}")).failed(1, &[]);
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
                let copy = copied(&mini.path(from));
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

/// Pipes and devices in the places that only some commands look at: thresholds, the hub's cache, reports.
#[test]
fn a63_pipes_and_devices_in_odd_places() {
    let dir = scratch();
    let mini = Mini::get();
    let pipe = dir.path().join("pipe");
    mknodat(CWD, &pipe, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    let refuse = |args: &[&Path], env: &[(&str, &Path)]| {
        let mut command = Command::new(program("flashlm-prep"));
        command.args(args).envs(env.iter().copied()).stdout(Stdio::null()).stderr(Stdio::piped());
        ends(command, &format!("{args:?}")).failed(1, &[]);
    };
    let word = Path::new;
    let (cache, out) = (dir.path().join("cache"), dir.path().join("out"));
    let model = cache.join("models--org--name");
    fs::create_dir_all(model.join("refs")).unwrap();
    fs::create_dir_all(model.join("snapshots/abc")).unwrap();
    fs::copy(mini.path("checkpoint/config.json"), model.join("snapshots/abc/config.json")).unwrap();
    let place = |thing: &Path, at: &Path| {
        _ = fs::remove_file(at);
        std::os::unix::fs::symlink(thing, at).unwrap();
    };
    let hub = [("HF_HUB_CACHE", cache.as_path()), ("HF_HUB_OFFLINE", word("1"))];
    for thing in [pipe.as_path(), word("/dev/zero"), word("loop")] {
        let (text, checkpoint) = (mini.path("text.txt"), mini.path("checkpoint"));
        let thresholds = dir.path().join("thresholds.json");
        place(thing, &thresholds);
        let record = [word("record"), &checkpoint, word("--text"), &text, word("--thresholds"), &thresholds];
        refuse(&[&record[..], &[word("-o"), &out]].concat(), &[]);
        place(thing, &model.join("refs/main"));
        refuse(&[word("inspect"), word("org/name")], &hub);
        fs::remove_file(model.join("refs/main")).unwrap();
        fs::write(model.join("refs/main"), "abc").unwrap();
        place(thing, &model.join("snapshots/abc/model.safetensors.index.json"));
        refuse(&[word("inspect"), word("org/name")], &hub);
        let orders = copied(&mini.path("orders"));
        place(thing, &orders.path().join("orders.json"));
        let recording = mini.path("recording");
        refuse(&[word("report"), &recording, word("--orders"), orders.path(), word("-o"), &out], &[]);
    }
}

/// What a program says, if it says it within twenty seconds.
pub(crate) fn ends(mut command: Command, what: &str) -> Said {
    let mut child = command.stdin(Stdio::null()).spawn().unwrap();
    let begin = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begin.elapsed() > Duration::from_secs(20) {
            child.kill().unwrap();
            panic!("{what} hangs");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Said::from(child.wait_with_output().unwrap())
}

/// Outputs that are pipes: a file put in place of /dev/null would be felt by everybody.
#[test]
fn a64_no_file_takes_the_place_of_a_pipe() {
    let dir = scratch();
    let mini = Mini::get();
    let pipe = dir.path().join("pipe");
    mknodat(CWD, &pipe, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    let word = Path::new;
    let (checkpoint, recording, bundle) = (mini.path("checkpoint"), mini.path("recording"), mini.bundle());
    for (name, args) in [
        ("flashlm-prep", vec![word("convert"), &checkpoint, word("--force"), word("-o"), &pipe]),
        ("flashlm-prep", vec![word("report"), &recording, word("-o"), &pipe]),
        ("flashlm", vec![word("logits"), &bundle, word("--ids"), word("5,6"), word("-o"), &pipe]),
    ] {
        let mut command = Command::new(program(name));
        command.args(&args).stdout(Stdio::null()).stderr(Stdio::piped());
        ends(command, &format!("{args:?}")).failed(1, &["pipe or a device"]);
        assert!(fs::symlink_metadata(&pipe).unwrap().file_type().is_fifo(), "{args:?} replaced it");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "{args:?} left something behind");
    }
}

/// Tokenizers whose rules make text grow without bound, or that leave it to chance.
#[test]
fn a65_tokenizers_that_harm() {
    let replace =
        |content: &str| serde_json::json!({ "type": "Replace", "pattern": { "String": "a" }, "content": content });
    let sequence = |list: &str, rules: Vec<Value>| serde_json::json!({ "type": "Sequence", list: rules });
    let mut good: Value =
        serde_json::from_slice(&fs::read(Mini::get().path("checkpoint/tokenizer.json")).unwrap()).unwrap();
    let mut words = |key: &str, rule: Value| {
        let old = std::mem::replace(&mut good[key], rule);
        let json = good.to_string();
        good[key] = old;
        json
    };
    for (name, json) in [
        ("doubled forty times", words("normalizer", sequence("normalizers", vec![replace("aa"); 40]))),
        (
            "times a thousand, four times",
            words("normalizer", sequence("normalizers", vec![replace(&"a".repeat(1000)); 4])),
        ),
        ("the same when decoding", words("decoder", sequence("decoders", vec![replace("aa"); 40]))),
        (
            "merges at random",
            words("model", serde_json::json!({ "type": "BPE", "dropout": 0.5, "vocab": { "a": 0 }, "merges": [] })),
        ),
        (
            "a table of 4 GB",
            words("normalizer", serde_json::json!({ "type": "Precompiled", "precompiled_charsmap": "////////" })),
        ),
    ] {
        let refused = Tokenizer::from_json(json.as_bytes()).map(drop).expect_err(name).to_string();
        assert!(refused.contains("tokenizer"), "{name}: {refused}");
        let checkpoint = copied(&Mini::get().path("checkpoint"));
        fs::write(checkpoint.path().join("tokenizer.json"), json).unwrap();
        let mut command = Command::new(program("flashlm-prep"));
        command.arg("convert").arg(checkpoint.path()).arg("-o").arg(checkpoint.path().join("out"));
        ends_quietly(command, name).failed(1, &["tokenizer.json"]);
    }
}

fn ends_quietly(mut command: Command, what: &str) -> Said {
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let said = ends(command, what);
    assert!(!said.stderr.contains("panicked"), "{what}: {}", said.stderr);
    said
}

/// Weights that are no numbers: a checkpoint has no checksums, so they cannot be known for damage; but no text is made of them.
#[test]
fn a66_weights_that_are_no_numbers() {
    let nan = half::f16::NAN.to_le_bytes();
    for tensor in ["model.decoder.embed_tokens.weight", "model.decoder.layers.1.fc1.weight"] {
        let checkpoint = copied(&Mini::get().path("checkpoint"));
        let path = checkpoint.path().join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        let (head, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let (from, to) = metadata.info(tensor).unwrap().data_offsets;
        bytes[8 + head + from..8 + head + to].as_chunks_mut().0.fill(nan);
        fs::write(&path, bytes).unwrap();
        let bundle = checkpoint.path().join("nan.flashlm");
        let mut command = Command::new(program("flashlm-prep"));
        command.arg("convert").arg(checkpoint.path()).arg("-o").arg(&bundle);
        ends_quietly(command, tensor).succeeded();
        for sampling in [&["--temperature", "0"][..], &["--temperature", "0.8", "--top-p", "0.9"]] {
            let mut command = Command::new(program("flashlm"));
            command.arg("run").arg(&bundle).args(["--ids", "5,6", "-n", "4"]).args(sampling);
            ends_quietly(command, tensor).failed(1, &["not a finite number"]);
        }
    }
}

/// Names with orders for the terminal in them.
#[test]
fn a67_terminals_are_not_told_what_to_do() {
    let checkpoint = copied(&Mini::get().path("checkpoint"));
    let path = checkpoint.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let head = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json = std::str::from_utf8(&bytes[8..8 + head]).unwrap().trim_end();
    // Outside the model's body it is only noted; inside, it is an error.
    for (name, fails) in [(r"\u001b]0;title\u0007", false), (r"model.decoder.\u001b[2J", true)] {
        let entry = format!(r#"{{"{name}":{{"dtype":"F16","shape":[0],"data_offsets":[0,0]}},"#);
        let json = json.replacen('{', &entry, 1);
        let length = (json.len() as u64).to_le_bytes();
        fs::write(&path, [&length[..], json.as_bytes(), &bytes[8 + head..]].concat()).unwrap();
        for command_name in ["inspect", "convert"] {
            let mut command = Command::new(program("flashlm-prep"));
            command.arg(command_name).arg(checkpoint.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
            if command_name == "convert" {
                command.arg("--force").arg("-o").arg(checkpoint.path().join("out"));
            }
            let said = ends(command, name);
            assert!(!(said.stdout.clone() + &said.stderr).contains(['\u{1b}', '\u{7}']), "{}", said.stderr);
            assert!((said.stdout.clone() + &said.stderr).contains("\\u001b"), "{} {}", said.stdout, said.stderr);
            if fails {
                said.failed(1, &[])
            } else {
                said.succeeded()
            };
        }
    }
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
    // Parts of fused projections, one for each head of each layer, are not written out.
    let heads = r#"{"model_type":"falcon","multi_query":false,"parallel_attn":false,"bias":true,"num_attention_heads":4096,
        "num_hidden_layers":4096,"hidden_size":8192,"vocab_size":8}"#;
    for (name, config, weights) in [
        ("4096 heads in 4096 layers", heads, header("{}")),
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
