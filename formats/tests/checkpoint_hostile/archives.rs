//! PyTorch's archives, and the pickles in them.

use std::io::{Cursor, Write};

use flashlm_formats::checkpoint::{CheckpointError, TensorProblem, TorchError};
use zip::write::SimpleFileOptions;

use super::{check_message, open_with};

/// A zip archive with these members.
fn archive(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, content) in members {
        writer
            .start_file(*name, SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored))
            .unwrap();
        writer.write_all(content).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

fn torch_lie(content: &[u8]) -> TorchError {
    let error = open_with("pytorch_model.bin", content);
    check_message(&error);
    match error {
        CheckpointError::Torch { source, .. } => *source,
        other => panic!("{other}"),
    }
}

/// What is wrong with this pickle beside a storage `data/0` of 64 bytes.
fn pickle_lie(pickle: &[u8]) -> TorchError {
    torch_lie(&archive(&[("m/data.pkl", pickle), ("m/data/0", &[0; 64])]))
}

fn text(text: &str) -> Vec<u8> {
    [&b"X"[..], &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()
}

fn integer(value: i64) -> Vec<u8> {
    [&b"\x8a\x08"[..], &value.to_le_bytes()].concat()
}

fn tuple(values: &[i64]) -> Vec<u8> {
    [b"(".to_vec(), values.iter().flat_map(|&value| integer(value)).collect(), b"t".to_vec()].concat()
}

/// A state dict of one float32 tensor `w`.
fn one_tensor(storage_elements: i64, offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    let storage = [
        b"(".to_vec(),
        text("storage"),
        b"ctorch\nFloatStorage\n".to_vec(),
        text("0"),
        text("cpu"),
        integer(storage_elements),
        b"tQ".to_vec(),
    ];
    [
        b"\x80\x02}".to_vec(),
        text("w"),
        b"ctorch._utils\n_rebuild_tensor_v2\n(".to_vec(),
        storage.concat(),
        integer(offset),
        tuple(shape),
        tuple(strides),
        b"\x89ccollections\nOrderedDict\n)RtRs.".to_vec(),
    ]
    .concat()
}

#[test]
fn a_pickle_of_one_tensor_is_understood_at_all() {
    let good = archive(&[
        ("m/data.pkl", &one_tensor(16, 0, &[4, 4], &[4, 1])),
        ("m/data/0", &[0; 64]),
        ("m/byteorder", b"little"),
    ]);
    let error = open_with("pytorch_model.bin", &good);
    let CheckpointError::Tensors { problems, .. } = error else { panic!("{error}") };
    assert!(problems.iter().all(|problem| matches!(problem, TensorProblem::Missing { .. })));
}

#[test]
fn tensors_beyond_their_storage() {
    for (elements, offset, shape, strides) in [
        (17, 0, vec![4, 4], vec![4, 1]),
        (16, 1, vec![4, 4], vec![4, 1]),
        (16, 0, vec![4, 5], vec![4, 1]),
        (16, 0, vec![4, 4], vec![5, 1]),
        (16, i64::MAX, vec![4, 4], vec![4, 1]),
        (16, 0, vec![i64::MAX, i64::MAX], vec![1, 1]),
        (16, 0, vec![2, 2], vec![i64::MAX, i64::MAX]),
        (i64::MAX, 0, vec![4, 4], vec![4, 1]),
        // Expanded: few bytes, endless elements.
        (16, 0, vec![1 << 40, 1 << 20], vec![0, 0]),
        (16, 0, vec![4, 5], vec![0, 1]),
        (16, 17, vec![0], vec![1]),
    ] {
        let error = pickle_lie(&one_tensor(elements, offset, &shape, &strides));
        assert!(matches!(error, TorchError::Storage { .. }), "{shape:?}: {error}");
    }
    for (elements, offset, shape, strides) in [
        (-1, 0, vec![4], vec![1]),
        (16, -1, vec![4], vec![1]),
        (16, 0, vec![-4], vec![1]),
        (16, 0, vec![4], vec![-1]),
        (16, 0, vec![4, 4], vec![4]),
    ] {
        let error = pickle_lie(&one_tensor(elements, offset, &shape, &strides));
        assert!(matches!(error, TorchError::Tensor { .. }), "{shape:?}: {error}");
    }
}

/// What a pickle says once, every tensor may refer to: none of it may be written out again and again.
#[test]
fn tensors_that_share_what_is_large() {
    let many_dimensions = vec![1; 65];
    let error = pickle_lie(&one_tensor(16, 0, &many_dimensions, &many_dimensions));
    assert!(matches!(error, TorchError::Tensor { .. }), "{error}");
    let long = one_tensor(16, 0, &[4, 4], &[4, 1]);
    let (name, long_name) = (text("0"), text(&"0".repeat(256)));
    let at = long.windows(name.len()).position(|window| window == name).unwrap();
    let error = pickle_lie(&[&long[..at], &long_name, &long[at + name.len()..]].concat());
    assert!(matches!(error, TorchError::Tensor { .. }), "{error}");

    let of = |tensors: usize| {
        let one = one_tensor(1 << 14, 0, &[1 << 14], &[1]);
        let (name, value) = (text("w"), &one[3 + text("w").len()..one.len() - 2]);
        assert!(one[3..].starts_with(&name));
        let items = (0..tensors).flat_map(|number| [&text(&format!("w{number}")), value].concat());
        let pickle = [&b"\x80\x02}("[..], &items.collect::<Vec<u8>>(), b"u."].concat();
        open_with("pytorch_model.bin", &archive(&[("m/data.pkl", &pickle), ("m/data/0", &[0; 1 << 16])]))
    };
    // A few are as tied matrices are.
    assert!(matches!(of(4), CheckpointError::Tensors { .. }), "{}", of(4));
    let CheckpointError::Torch { source, .. } = of(12) else { panic!("{}", of(12)) };
    assert!(matches!(*source, TorchError::Shared { .. }), "{source}");
}

#[test]
fn pickles_that_attack() {
    // What `os.system("..")` looks like, in both ways of naming it; and friends.
    for (module, name) in [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("__builtin__", "exec"),
        ("torch", "load"),
        ("torch.serialization", "load"),
    ] {
        let classic =
            [format!("\x02c{module}\n{name}\n(").into_bytes(), text("touch /tmp/owned"), b"tR.".to_vec()].concat();
        let stacked =
            [&b"\x04"[..], &text(module), &text(name), b"\x93", &text("touch /tmp/owned"), b"\x85R."].concat();
        for pickle in [classic, stacked] {
            let error = pickle_lie(&[&b"\x80"[..], &pickle].concat());
            assert!(
                matches!(&error, TorchError::Global { module: m, name: n, .. } if m == module && n == name),
                "{error}"
            );
        }
    }
    // INST, OBJ, NEWOBJ, EXT1, PERSID, DUP, POP, GET, textual INT: not needed, so not there.
    for opcode in *b"io\x81\x82P20gI" {
        assert_eq!(pickle_lie(&[0x80, 2, opcode]), TorchError::Opcode { opcode, position: 2 });
    }
    // A list in itself, a dictionary in itself.
    assert!(matches!(pickle_lie(b"\x80\x02]q\x00h\x00a."), TorchError::NotAStateDict { found: "a list" }));
    let own_value = [&b"\x80\x02}q\x00"[..], &text("w"), b"h\x00s."].concat();
    assert!(matches!(pickle_lie(&own_value), TorchError::NotAStateDict { found: "a dictionary without tensors" }));
    // Each tuple holds the one before twice: 2^60 leaves, were they ever walked.
    let doubling = [&b"\x80\x02}"[..], &text("w"), b"N", &b"q\x00h\x00\x86".repeat(60), b"s."].concat();
    assert!(matches!(pickle_lie(&doubling), TorchError::NotAStateDict { .. }));
    // A parameter of a parameter of .. a tensor; nesting to any depth.
    let nested = [
        b"\x80\x02}".to_vec(),
        text("w"),
        b"ctorch._utils\n_rebuild_parameter\n(".repeat(100_000),
        b"N".to_vec(),
        b"\x89NtR".repeat(100_000),
        b"s.".to_vec(),
    ];
    assert!(matches!(pickle_lie(&nested.concat()), TorchError::Tensor { .. }));
    let deep = [&b"\x80\x02N"[..], &b"\x85".repeat(1_000_000), b"."].concat();
    assert!(matches!(pickle_lie(&deep), TorchError::NotAStateDict { found: "a tuple" }));
    let objects = [&b"\x80\x02"[..], &b"N".repeat(5_000_000)].concat();
    assert!(matches!(pickle_lie(&objects), TorchError::Limit { what: "objects", .. }));
    let twice = one_tensor(16, 0, &[4], &[1]);
    let item = &twice[3..twice.len() - 1];
    let twice = [&b"\x80\x02}"[..], item, item, b"."].concat();
    assert_eq!(pickle_lie(&twice), TorchError::Duplicate { tensor: "w".into() });
}

#[test]
fn pickles_that_are_broken() {
    let good = one_tensor(16, 0, &[4, 4], &[4, 1]);
    for length in 0..good.len() {
        let error = pickle_lie(&good[..length]);
        assert!(matches!(error, TorchError::Pickle { .. }), "{length}: {error}");
    }
    for broken in [
        &b"\x80\x02."[..],
        b"\x80\x02NN.",
        b"\x80\x02(.",
        b"\x80\x02t.",
        b"\x80\x02\x87.",
        b"\x80\x02h\x07.",
        b"\x80\x02Na.",
        b"\x80\x02N(u.",
        b"\x80\x02}(Nu.",
        b"\x80\x02NNR.",
        b"\x80\x02q\x00.",
        b"\x80\x02N(\x85.",
        b"\x80\x02\x8a\x09123456789.",
        b"\x80\x02X\xff\xff\xff\xff.",
        b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
        b"\x80\x02NNb.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02ccollections",
    ] {
        let error = pickle_lie(broken);
        assert!(matches!(error, TorchError::Pickle { .. }), "{broken:?}: {error}");
    }
    for (root, found) in
        [(&b"N."[..], "None"), (b"].", "a list"), (b"K\x05.", "a number"), (b"}.", "a dictionary without tensors")]
    {
        assert_eq!(pickle_lie(root), TorchError::NotAStateDict { found });
    }
    assert!(matches!(pickle_lie(b"\x80\x02}NNs."), TorchError::NotAStateDict { .. }), "a key that is no name");
}

#[test]
fn archives_that_lie() {
    let pickle = one_tensor(16, 0, &[4, 4], &[4, 1]);
    assert!(matches!(torch_lie(&archive(&[("m/data/0", &[0; 64])])), TorchError::NoMember { .. }));
    assert!(matches!(torch_lie(&archive(&[("m/data.pkl", &pickle)])), TorchError::NoMember { .. }));
    assert!(matches!(
        torch_lie(&archive(&[("m/data.pkl", &pickle), ("m/data/0", &[0; 63])])),
        TorchError::Storage { stored: 15, .. }
    ));
    let big = archive(&[("m/data.pkl", &pickle), ("m/data/0", &[0; 64]), ("m/byteorder", b"big")]);
    assert_eq!(torch_lie(&big), TorchError::ByteOrder { found: "big".into() });
    let whole = archive(&[("m/data.pkl", &pickle), ("m/data/0", &[0; 64])]);
    for length in [4, 30, whole.len() / 2, whole.len() - 1] {
        assert!(matches!(torch_lie(&whole[..length]), TorchError::Zip { .. }), "cut to {length}");
    }
    // Say "deflated", and say "larger than it is", in the central directory.
    let central = whole.windows(4).position(|window| window == b"PK\x01\x02").unwrap();
    let with = |at: usize, bytes: &[u8]| {
        let mut changed = whole.clone();
        changed[central + at..central + at + bytes.len()].copy_from_slice(bytes);
        torch_lie(&changed)
    };
    assert!(matches!(with(10, &[8, 0]), TorchError::NotStored { .. }));
    assert!(matches!(with(24, &[0xff, 0xff, 0xff, 0x7f]), TorchError::NotStored { .. }));
    let both = with(20, &[0xff, 0xff, 0xff, 0x7f, 0xff, 0xff, 0xff, 0x7f]);
    assert!(matches!(both, TorchError::Bounds { .. } | TorchError::Zip { .. }), "{both}");
}
