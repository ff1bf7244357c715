//! What is in the directory.

use std::fs;
use std::os::unix::fs::symlink;

use flashlm_formats::checkpoint::{Checkpoint, CheckpointError, Foreign};

use super::{check_message, directory, fixture, open, open_with};

#[test]
fn other_formats_are_named_with_a_hint() {
    for (name, expected) in [
        ("model-q4.gguf", Foreign::Gguf),
        ("flax_model.msgpack", Foreign::Flax),
        ("tf_model.h5", Foreign::TensorFlow),
        ("consolidated.00.pth", Foreign::OriginalTorch),
        ("adapter_model.safetensors", Foreign::Adapter),
        ("model.onnx", Foreign::Onnx),
        ("model-00001-of-00002.safetensors", Foreign::ShardsWithoutIndex),
    ] {
        let error = open_with(name, b"x");
        check_message(&error);
        assert!(matches!(error, CheckpointError::OtherFormat { found, .. } if found == expected), "{name}: {error}");
        // The same where even the configuration is absent, as beside GGUF files.
        let dir = directory([(name, &b"x"[..])]);
        fs::remove_file(dir.path().join("config.json")).unwrap();
        assert!(matches!(open(&dir), CheckpointError::OtherFormat { found, .. } if found == expected), "{name}");
    }
    let error = open_with("README.md", b"x");
    assert!(
        matches!(&error, CheckpointError::NoWeights { found, .. } if found == &["README.md", "config.json"]),
        "{error}"
    );
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(open(&empty), CheckpointError::NoConfig { .. }));
    let missing = Checkpoint::open(empty.path().join("nowhere")).unwrap_err();
    assert!(matches!(missing, CheckpointError::NotADirectory { .. }), "{missing}");
}

#[test]
fn files_are_not_what_their_names_say() {
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 13316063421\n";
    let legacy = fixture("torch/legacy/pytorch_model.bin");
    // The format before that one.
    let tar = [&b"sys_info"[..], &[0; 249], b"ustar\x0000", &[0; 248]].concat();
    for (content, expected) in [
        (&b""[..], Foreign::Empty),
        (pointer, Foreign::GitLfsPointer),
        (b"<!DOCTYPE html><html><body>401 Unauthorized</body></html>", Foreign::Html),
        (b"\n <HTML>Sign in</HTML>", Foreign::Html),
        (b"GGUF\x03\x00\x00\x00aaaaaaaaaaaaaaaaaaaaaaaaaaaa", Foreign::Gguf),
        (&legacy, Foreign::LegacyTorch),
        (&tar, Foreign::LegacyTorch),
        (b"Access to model is restricted. Log in to your account to go on.", Foreign::Unknown),
    ] {
        for name in ["model.safetensors", "pytorch_model.bin"] {
            let error = open_with(name, content);
            check_message(&error);
            assert!(matches!(error, CheckpointError::Foreign { found, .. } if found == expected), "{name}: {error}");
        }
    }
    let zip = fixture("torch/plain/pytorch_model.bin");
    assert!(matches!(open_with("model.safetensors", &zip), CheckpointError::Foreign { found: Foreign::Zip, .. }));
    let good = fixture("quirks/opt-125m/model.safetensors");
    let renamed = open_with("pytorch_model.bin", &good);
    assert!(matches!(renamed, CheckpointError::Foreign { found: Foreign::Safetensors, .. }), "{renamed}");
    assert!(matches!(
        open_with("config.json", pointer),
        CheckpointError::Foreign { found: Foreign::GitLfsPointer, .. }
    ));
}

#[test]
fn only_regular_files_are_read() {
    for name in ["model.safetensors", "pytorch_model.bin", "config.json", "model.safetensors.index.json"] {
        for what in ["/dev/zero", "/dev/full", "/tmp"] {
            let dir = directory([]);
            _ = fs::remove_file(dir.path().join(name));
            symlink(what, dir.path().join(name)).unwrap();
            let error = open(&dir);
            assert!(matches!(error, CheckpointError::NotRegular { .. }), "{name} -> {what}: {error}");
        }
        let dir = directory([]);
        _ = fs::remove_file(dir.path().join(name));
        let made = std::process::Command::new("mkfifo").arg(dir.path().join(name)).status().unwrap();
        assert!(made.success());
        assert!(matches!(open(&dir), CheckpointError::NotRegular { kind: "a pipe", .. }), "{name}");
        let dir = directory([]);
        _ = fs::remove_file(dir.path().join(name));
        symlink("nowhere", dir.path().join(name)).unwrap();
        assert!(Checkpoint::open(dir.path()).is_err(), "{name}: a dangling link");
    }
}

#[test]
fn small_files_are_bounded() {
    let dir = directory([]);
    fs::File::create(dir.path().join("config.json")).unwrap().set_len(1 << 40).unwrap();
    assert!(matches!(open(&dir), CheckpointError::TooLarge { bytes: 0x100_0000_0000, .. }));
}
