//! Every way a bundle can lie: a typed error, never a panic, never silence.
//!
//! Offsets are written out here as in docs/bundle-format.md, not taken from the code under test. Lies are sealed with right
//! checksums, so that it is the checks of the numbers that have to find them.

mod bundle_support;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use bundle_support::{Small, ramp};
use flashlm_formats::bundle::{Bundle, BundleError, FORMAT_VERSION, Section, checksum, verify};
use proptest::prelude::*;
use serde_json::{Value, json};

/// A bundle in memory that can be changed and sealed again.
#[derive(Clone)]
struct Image(Vec<u8>);

impl Image {
    fn of(small: &Small) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.flashlm");
        small.write(&path, Some(ramp(5, 777)));
        Self(fs::read(path).unwrap())
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.0[at..at + 8].try_into().unwrap())
    }

    fn set_u64(&mut self, at: usize, value: u64) {
        self.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    fn set_u32(&mut self, at: usize, value: u32) {
        self.0[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// Place of a section's entry in the header.
    fn entry(section: Section) -> usize {
        24 + 24 * section as usize
    }

    fn extent(&self, section: Section) -> (usize, usize) {
        let entry = Self::entry(section);
        (self.u64(entry) as usize, self.u64(entry + 8) as usize)
    }

    fn seal_header(&mut self) {
        let sum = checksum(&self.0[..504]);
        self.set_u64(504, sum);
    }

    /// Makes a section's checksum and the header's right again.
    fn seal(&mut self, section: Section) {
        let (at, len) = self.extent(section);
        let sum = checksum(&self.0[at..at + len]);
        self.set_u64(Self::entry(section) + 16, sum);
        self.seal_header();
    }

    /// Puts another manifest in place of the one at the end of the file.
    fn set_manifest(&mut self, json: &[u8]) {
        let (at, _) = self.extent(Section::Manifest);
        self.0.truncate(at);
        self.0.extend(json);
        self.set_u64(Self::entry(Section::Manifest) + 8, json.len() as u64);
        let end = self.0.len() as u64;
        self.set_u64(16, end);
        self.seal(Section::Manifest);
    }

    fn manifest(&self) -> Value {
        let (at, len) = self.extent(Section::Manifest);
        serde_json::from_slice(&self.0[at..at + len]).unwrap()
    }
}

/// A file to put images in.
struct Probe {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

impl Probe {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.flashlm");
        Self { _dir: dir, path }
    }

    fn open(&self, image: &Image) -> Result<Bundle, BundleError> {
        fs::write(&self.path, &image.0).unwrap();
        Bundle::open(&self.path)
    }

    /// The section that the image is refused for.
    fn fault(&self, image: &Image, lie: &str) -> (Option<Section>, String) {
        match self.open(image) {
            Err(BundleError::Corrupt { fault, .. }) => (fault.section, fault.what),
            Err(other) => panic!("{lie}: {other}"),
            Ok(_) => panic!("{lie}: opened"),
        }
    }

    /// Whether opening or verifying reports damage.
    fn reported(&self) -> bool {
        match verify(&self.path, &mut |_, _| ()) {
            Ok(report) => !report.damages.is_empty(),
            Err(_) => true,
        }
    }
}

#[test]
fn what_is_no_bundle() {
    let probe = Probe::new();
    let whole = Image::of(&Small::opt());
    for at in 0..8 {
        let mut image = whole.clone();
        image.0[at] ^= 0x20;
        image.seal_header();
        assert!(matches!(probe.open(&image), Err(BundleError::NotABundle { .. })), "magic byte {at}");
    }
    for bytes in [&b""[..], b"\x89FLM", b"\x89PNG\r\n\x1a\n", b"{}", &[0; 4096]] {
        let found = probe.open(&Image(bytes.to_vec()));
        assert!(matches!(&found, Err(BundleError::NotABundle { found, .. }) if found.len() == bytes.len().min(8)));
    }
    assert!(matches!(Bundle::open(probe.path.parent().unwrap()), Err(BundleError::Directory { .. })));
    assert!(matches!(Bundle::open(probe.path.with_extension("no")), Err(BundleError::Io { .. })));
}

#[test]
fn versions() {
    let probe = Probe::new();
    let mut image = Image::of(&Small::opt());
    image.set_u32(8, FORMAT_VERSION + 1);
    assert_eq!(probe.fault(&image, "damaged version").0, None, "a damaged version is no newer version");
    for version in [FORMAT_VERSION + 1, FORMAT_VERSION + 2, u32::MAX] {
        image.set_u32(8, version);
        image.seal_header();
        let found = probe.open(&image);
        assert!(matches!(found, Err(BundleError::TooNew { found, supported: FORMAT_VERSION, .. }) if found == version));
    }
    image.set_u32(8, 0);
    image.seal_header();
    assert_eq!(probe.fault(&image, "version 0"), (None, "format version".into()));
}

#[test]
fn every_truncation() {
    let probe = Probe::new();
    for small in Small::all() {
        let whole = Image::of(&small);
        let mut lengths: Vec<usize> = (0..600).chain((600..whole.0.len()).step_by(251)).collect();
        for section in Section::ALL {
            let (at, len) = whole.extent(section);
            lengths.extend([at - 1, at, at + 1, at + len - 1, at + len, at + len + 1]);
        }
        for length in lengths.into_iter().filter(|length| *length < whole.0.len()) {
            let found = probe.open(&Image(whole.0[..length].to_vec()));
            match found {
                Err(BundleError::NotABundle { .. }) => assert!(length < 8, "{length}"),
                Err(BundleError::Truncated { found, expected, .. }) => {
                    assert_eq!(found, length as u64);
                    assert_eq!(expected, if length < 512 { 512 } else { whole.0.len() as u64 });
                }
                other => panic!("cut at {length}: {other:?}"),
            }
        }
    }
}

#[test]
fn lies_of_the_header() {
    let probe = Probe::new();
    let whole = Image::of(&Small::opt());
    let refused = |lie: &str, change: &dyn Fn(&mut Image)| {
        let mut image = whole.clone();
        change(&mut image);
        image.seal_header();
        assert!(probe.open(&image).is_err(), "{lie}");
    };
    for count in [0, 5, 7, u32::MAX] {
        refused("section count", &|image| image.set_u32(12, count));
    }
    let end = whole.u64(16);
    for bytes in [0, 511, end - 1, end + 1, u64::MAX] {
        refused("file length", &|image| image.set_u64(16, bytes));
    }
    for at in 168..504 {
        refused("reserved byte", &|image| image.0[at] = 1);
    }
    for section in Section::ALL {
        let entry = Image::entry(section);
        let (offset, bytes) = (whole.u64(entry), whole.u64(entry + 8));
        for lie in
            [0, 1, 512, offset - 1, offset + 1, offset + 512, offset - 4096, offset + 4096, 1 << 63, u64::MAX - 4095]
        {
            refused(&format!("offset {lie} of {}", section.name()), &|image| image.set_u64(entry, lie));
        }
        for other in Section::ALL.into_iter().filter(|other| *other != section) {
            let lie = whole.u64(Image::entry(other));
            refused(&format!("{} on {}", section.name(), other.name()), &|image| image.set_u64(entry, lie));
        }
        for lie in [0, bytes + 4096, u64::MAX, u64::MAX - offset, u64::MAX - offset + 1, 1 << 62] {
            refused(&format!("length {lie} of {}", section.name()), &|image| image.set_u64(entry + 8, lie));
        }
        refused(&format!("no {}", section.name()), &|image| image.0[entry..entry + 24].fill(0));
        // One byte less or more, one other checksum: predictors and resident data are hashed by verify only.
        for (at, lie) in [(8, bytes - 1), (8, bytes + 1), (16, 1), (16, 0)] {
            let mut image = whole.clone();
            image.set_u64(entry + at, lie);
            image.seal_header();
            fs::write(&probe.path, &image.0).unwrap();
            assert!(probe.reported(), "{} with {lie} at {at}", section.name());
        }
    }
}

#[test]
fn lies_of_the_index() {
    let probe = Probe::new();
    let small = Small::opt();
    let whole = Image::of(&small);
    let (at, len) = whole.extent(Section::Index);
    let neurons = small.plan.model.ffn().size;
    let table =
        (8 + 4 * neurons).next_multiple_of(8) + 8 * ((len - 16) / 2 - (8 + 4 * neurons).next_multiple_of(8)) / 8;
    assert_eq!(16 + 2 * table, len);
    let sums = (8 + 4 * neurons).next_multiple_of(8);
    let refused = |lie: &str, section: Section, change: &dyn Fn(&mut Image)| {
        let mut image = whole.clone();
        change(&mut image);
        image.seal(Section::Index);
        assert_eq!(probe.fault(&image, lie).0, Some(section), "{lie}");
    };
    for (field, lie) in [(0, 0), (0, 1), (0, 3), (0, u32::MAX), (4, 0), (4, 36), (4, 38), (8, 0), (8, 1), (12, 1)] {
        refused(&format!("{lie} at {field}"), Section::Index, &|image| image.set_u32(at + field, lie));
    }
    for layer in 0..2 {
        let table = at + 16 + layer * table;
        for lie in [0, 4096, whole.u64(table) + 512, whole.u64(table) - 4096, u64::MAX] {
            refused("base", Section::Index, &|image| image.set_u64(table, lie));
        }
        for position in [0, 1, neurons - 1] {
            let entry = table + 8 + 4 * position;
            let other = table + 8 + 4 * ((position + 1) % neurons);
            for lie in [neurons as u32, u32::MAX, u32::from_le_bytes(whole.0[other..other + 4].try_into().unwrap())] {
                refused(&format!("order {lie}"), Section::Index, &|image| image.set_u32(entry, lie));
            }
        }
        assert_eq!(neurons % 2, 1, "there is padding behind the order");
        refused("padding of the order", Section::Index, &|image| image.0[table + 8 + 4 * neurons] = 1);
        refused("a group's checksum", Section::Flash, &|image| image.set_u64(table + sums, 1));
    }
    for lie in [len - 8, len - 1, len + 8] {
        let mut image = whole.clone();
        image.set_u64(Image::entry(Section::Index) + 8, lie as u64);
        image.seal(Section::Index);
        assert_eq!(probe.fault(&image, "length of the index").0, Some(Section::Index));
    }
}

/// Calls `visit` with the pointer of every value below `value`.
fn visit(value: &Value, pointer: &str, found: &mut Vec<(String, Value)>) {
    found.push((pointer.to_owned(), value.clone()));
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| visit(value, &format!("{pointer}/{key}"), found)),
        Value::Array(list) => {
            list.iter().enumerate().for_each(|(i, value)| visit(value, &format!("{pointer}/{i}"), found));
        }
        _ => {}
    }
}

#[test]
fn lies_of_the_manifest() {
    let probe = Probe::new();
    // Numbers that nothing in the file contradicts.
    let free = ["/model_bytes", "/model/max_positions", "/model/bos", "/model/eos/0", "/provenance"];
    for small in Small::all() {
        let whole = Image::of(&small);
        let manifest = whole.manifest();
        let mut values = Vec::new();
        visit(&manifest, "", &mut values);
        assert!(values.len() > 50);
        for (pointer, value) in &values {
            for lie in [
                json!(0),
                json!(-1),
                json!(1u64 << 40),
                json!(u64::MAX),
                json!(null),
                json!("?"),
                json!(1e300),
                json!([]),
            ] {
                let mut changed = manifest.clone();
                if lie == *value || pointer.is_empty() {
                    continue;
                }
                *changed.pointer_mut(pointer).unwrap() = lie.clone();
                let mut image = whole.clone();
                image.set_manifest(&serde_json::to_vec(&changed).unwrap());
                let opened = probe.open(&image).is_ok();
                let absurd = lie.is_number() && lie.as_u64() != Some(0) || lie.is_array();
                let free = free.iter().any(|free| pointer.starts_with(free)) || pointer.ends_with("norm/eps");
                if absurd && !free && value.is_number() && !pointer.starts_with("/predictors") {
                    let float_in_range = lie.as_f64().is_some_and(|lie| lie.abs() < 1e30) && value.is_f64();
                    assert!(!opened || float_in_range, "{pointer} = {lie} instead of {value}");
                }
            }
            // A key that this version does not know, or one that is missing.
            if let Value::Object(map) = value {
                let mut changed = manifest.clone();
                changed.pointer_mut(pointer).unwrap()["surprise"] = json!(1);
                let mut image = whole.clone();
                image.set_manifest(&serde_json::to_vec(&changed).unwrap());
                assert_eq!(probe.fault(&image, pointer).0, Some(Section::Manifest), "{pointer}/surprise");
                for key in map.keys() {
                    let mut changed = manifest.clone();
                    changed.pointer_mut(pointer).unwrap().as_object_mut().unwrap().remove(key);
                    image.set_manifest(&serde_json::to_vec(&changed).unwrap());
                    let opened = probe.open(&image).is_ok();
                    // Without these keys it is a bundle of before there were such, or one that says nothing of them.
                    let optional = [
                        "bos",
                        "scaling",
                        "thresholds",
                        "up_activated",
                        "special_tokens",
                        "wide_kv",
                        "chat",
                        "sampling",
                        "temperature",
                        "top_k",
                    ];
                    let is_a_name = matches!(pointer.as_str(), "/chat/templates" | "/chat/special_tokens");
                    assert!(!opened || is_a_name || optional.contains(&key.as_str()), "without {pointer}/{key}");
                }
            }
        }
        for json in [&b"{"[..], b"[]", b"null", b"\xff", b"{}"] {
            let mut image = whole.clone();
            image.set_manifest(json);
            assert_eq!(probe.fault(&image, "no manifest").0, Some(Section::Manifest));
        }
    }
}

/// What a manifest claims of layers is refused by its place, and never made first.
#[test]
fn lies_of_the_layers() {
    let probe = Probe::new();
    let whole = Image::of(&Small::layered());
    let manifest = whole.manifest();
    let runs = manifest["model"]["layers"].as_array().unwrap().clone();
    assert_eq!(runs.iter().map(|run| run["repeat"].as_u64().unwrap()).collect::<Vec<_>>(), [2, 1]);
    let fault = |pointer: &str, lie: Value| {
        let mut changed = manifest.clone();
        *changed.pointer_mut(pointer).unwrap() = lie.clone();
        let mut image = whole.clone();
        image.set_manifest(&serde_json::to_vec(&changed).unwrap());
        match probe.open(&image) {
            Err(BundleError::Corrupt { fault, .. }) if fault.section == Some(Section::Manifest) => fault.to_string(),
            other => panic!("{pointer} = {lie}: {other:?}"),
        }
    };
    for (pointer, lie, expected) in [
        ("/model/layers", json!([]), "layers: 1 to 16384 layers expected, found 0"),
        ("/model/layers", json!(3), "final_norm: expected true or false where layers is a number"),
        ("/model/layers/1/repeat", json!(0), "layers[1].repeat: 1 or more expected, found 0"),
        ("/model/layers/1/repeat", json!(1u64 << 60), "layers: 1 to 16384 layers expected, found 1152921504606846978"),
        ("/model/layers/0/repeat", json!(16_384), "layers: 1 to 16384 layers expected, found 16385"),
        ("/model/layers/1/feed_forward/dense/size", json!(6), "layer 2: ffn.size: expected 5, as in layer 0, found 6"),
        (
            "/model/layers/1/feed_forward/dense/activation",
            json!("relu2"),
            "layer 2: ffn.activation: expected FatRelu(0.01)",
        ),
        ("/model/layers/1/feed_forward", json!({"experts": {}}), "unknown variant `experts`, expected `dense`"),
        (
            "/model/layers/1/attention/head_dim",
            json!(8),
            "layer 2: attention.head_dim: expected 6, as in layer 0, found 8",
        ),
        ("/model/layers/1/attention/kv_heads", json!(3), "layer 2: attention.kv_heads: expected a divisor"),
        ("/model/layers/1/attention/qk_norm/bias", json!(true), "layer 2: attention.qk_norm.bias: expected false"),
        ("/model/layers/1/norm/eps", json!(-1.0), "layer 2: norm.eps: expected a number not below 0"),
        (
            "/model/layers/0/positions/rotary/dims",
            json!(5),
            "layer 0: positions.dims: expected an even number, found 5",
        ),
    ] {
        let fault = fault(pointer, lie);
        assert!(fault.contains(expected), "{pointer}: {fault}");
    }
    let turned = (0..17).map(|number| {
        let mut run = runs[0].clone();
        run["positions"]["rotary"]["theta"] = json!(1000 + number);
        run
    });
    let fault = fault("/model/layers", turned.collect());
    assert!(fault.contains("kinds of positions in the layers: expected 1 to 16, found 17"), "{fault}");
}

#[test]
fn lies_of_the_resident_table() {
    let probe = Probe::new();
    let whole = Image::of(&Small::opt());
    let (at, len) = whole.extent(Section::Resident);
    let json_len = whole.u64(at) as usize;
    let text = String::from_utf8(whole.0[at + 8..at + 8 + json_len].to_vec()).unwrap();
    let refused = |lie: &str, image: &Image| {
        assert_eq!(probe.fault(image, lie).0, Some(Section::Resident), "{lie}");
    };
    for lie in [0, 1, len as u64, json_len as u64 - 1, json_len as u64 + 1, json_len as u64 + 64, u64::MAX] {
        let mut image = whole.clone();
        image.set_u64(at, lie);
        refused(&format!("header length {lie}"), &image);
    }
    let first = r#""embed.tokens":{"dtype":"F16","shape":[11,6],"data_offsets":[0,132]}"#;
    assert!(text.contains(first));
    for (from, to) in [
        ("F16", "F32"),
        ("F16", "I16"),
        ("F16", "XXX"),
        ("[11,6]", "[6,11]"),
        ("[11,6]", "[66]  "),
        ("[11,6]", "[0,66]"),
        ("[0,132]", "[0,131]"),
        ("[0,132]", "[1,132]"),
        ("[0,132]", "[132,0]"),
        ("[0,132]", "[9,141]"),
        ("embed.tokens", "embed.Tokens"),
        ("\"dtype\"", "\"dtypo\""),
    ] {
        let mut lie = first.replace(from, to);
        let mut changed = text.replace(first, &lie);
        // The spaces at the end give way to what has become longer.
        while changed.len() > json_len {
            assert_eq!(changed.pop(), Some(' '));
        }
        changed.extend(std::iter::repeat_n(' ', json_len - changed.len()));
        let mut image = whole.clone();
        image.0[at + 8..at + 8 + json_len].copy_from_slice(changed.as_bytes());
        lie.truncate(100);
        refused(&lie, &image);
    }
    let mut image = whole.clone();
    let without = text.replacen(&format!("{first},"), &" ".repeat(first.len() + 1), 1);
    image.0[at + 8..at + 8 + json_len].copy_from_slice(without.as_bytes());
    refused("a tensor less", &image);
}

#[test]
fn lies_about_quantised_weights() {
    let probe = Probe::new();
    let whole = Image::of(&Small::quantised());
    for (pointer, lies) in [
        ("/ffn/dtype", ["int4/33", "int4/16", "int4/64", "int4/128", "int8/32", "f16", "int4/32/1", "int4/1000000007"]),
        ("/resident", ["int8/32", "int8/128", "int8", "int4/64", "f16", "bf16", "int8/0", "int8/-64"]),
    ] {
        for lie in lies {
            let mut manifest = whole.manifest();
            *manifest.pointer_mut(pointer).unwrap() = json!(lie);
            let mut image = whole.clone();
            image.set_manifest(&serde_json::to_vec(&manifest).unwrap());
            // Both formats have one group in the narrow embedding: there a longer group changes nothing.
            let found = probe.open(&image);
            let same = pointer == "/resident" && lie == "int8/128";
            let refused = matches!(found, Err(BundleError::Corrupt { .. }));
            assert!(refused || same, "{pointer} = {lie}: {found:?}");
        }
    }
    let opens = |resident: serde_json::Value| {
        let mut manifest = whole.manifest();
        manifest["resident"] = resident;
        let mut image = whole.clone();
        image.set_manifest(&serde_json::to_vec(&manifest).unwrap());
        probe.open(&image)
    };
    opens(json!({ "matrices": "int8/64", "embedding": "int8/64" })).unwrap();
    for lie in [
        json!({ "matrices": "int8/64" }),
        json!({ "embedding": "int8/64" }),
        json!({ "matrices": "int8/64", "embedding": "int4/32" }),
        json!({ "matrices": "int8/64", "embedding": "f16" }),
        json!({ "matrices": "int8/64", "embedding": "int8/64", "head": "int8/64" }),
        json!({}),
        json!(["int8/64"]),
    ] {
        let found = opens(lie.clone());
        assert!(matches!(found, Err(BundleError::Corrupt { .. })), "resident = {lie}: {found:?}");
    }
    let (at, _) = whole.extent(Section::Resident);
    let json_len = whole.u64(at) as usize;
    let text = String::from_utf8(whole.0[at + 8..at + 8 + json_len].to_vec()).unwrap();
    for (from, to) in [
        (r#""embed.tokens":{"dtype":"I8""#, r#""embed.tokens":{"dtype":"U8""#),
        (r#""embed.tokens.scales":{"dtype":"BF16""#, r#""embed.tokens.scales":{"dtype":"F32" "#),
        (
            r#""layers.0.ffn.scales":{"dtype":"BF16","shape":[37,4]"#,
            r#""layers.0.ffn.scales":{"dtype":"BF16","shape":[4,37]"#,
        ),
        (r#""layers.1.ffn.scales""#, r#""layers.1.ffn.scalez""#),
    ] {
        assert!(text.contains(from), "{from}");
        let mut image = whole.clone();
        image.0[at + 8..at + 8 + json_len].copy_from_slice(text.replacen(from, to, 1).as_bytes());
        assert_eq!(probe.fault(&image, to).0, Some(Section::Resident), "{to}");
    }
    // Scales that are no numbers open, and `verify` names them.
    fs::write(&probe.path, &whole.0).unwrap();
    let bundle = Bundle::open(&probe.path).unwrap();
    let tokens = bundle.resident_tensor("embed.tokens").unwrap().scales.unwrap();
    for (place, name) in [(tokens, "scales of embed.tokens"), (bundle.ffn_scales(1).unwrap(), "FFN of layer 1")] {
        for (lie, wrong) in [(0x7f80u16, true), (0xff80, true), (0x7fc1, true), (0x7f7f, false), (0xff7f, false)] {
            let mut image = whole.clone();
            let last = place.end() as usize - 2;
            image.0[last..last + 2].copy_from_slice(&lie.to_le_bytes());
            image.seal(Section::Resident);
            fs::write(&probe.path, &image.0).unwrap();
            let damages = verify(&probe.path, &mut |_, _| ()).unwrap().damages;
            assert_eq!(damages.len(), usize::from(wrong), "{lie:04x} in {name}");
            assert!(!wrong || damages[0].to_string().contains(name), "{damages:?}");
        }
    }
}

#[test]
fn every_flipped_byte_is_reported() {
    let probe = Probe::new();
    // Of those that are mostly padding, every seventh byte, and fewer of the last.
    for (small, step) in Small::all().into_iter().zip([1, 7, 7, 29]) {
        let whole = Image::of(&small);
        fs::write(&probe.path, &whole.0).unwrap();
        assert!(!probe.reported());
        let file = OpenOptions::new().write(true).open(&probe.path).unwrap();
        for (at, byte) in whole.0.iter().enumerate().step_by(step) {
            let flipped = byte ^ (1 << (at % 8));
            file.write_all_at(&[flipped], at as u64).unwrap();
            assert!(probe.reported(), "byte {at}: {byte:02x} -> {flipped:02x}");
            file.write_all_at(&[*byte], at as u64).unwrap();
        }
        assert!(!probe.reported());
    }
}

#[test]
fn damage_is_reported_with_its_place() {
    let probe = Probe::new();
    let mut image = Image::of(&Small::opt());
    probe.open(&image).unwrap();
    let bundle = Bundle::open(&probe.path).unwrap();
    let groups = [(0, 0), (0, 4), (1, 3)];
    for (layer, group) in groups {
        image.0[bundle.group(layer, group).offset as usize + 9] ^= 1;
    }
    let resident = bundle.resident_tensors().last().unwrap().extent;
    image.0[resident.offset as usize] ^= 1;
    let flash = bundle.flash();
    image.0[flash.end() as usize - 1] ^= 1;
    image.0[700] = 9;
    fs::write(&probe.path, &image.0).unwrap();
    let report = verify(&probe.path, &mut |_, _| ()).unwrap();
    let places: Vec<_> = report.damages.iter().map(|fault| fault.to_string()).collect();
    assert_eq!(places.len(), 6, "{places:#?}");
    for (layer, group) in groups {
        assert!(places.iter().any(|p| p.contains(&format!("layer {layer}, group {group} at byte"))), "{places:#?}");
    }
    assert!(places.iter().any(|p| p.starts_with("resident: ")));
    assert!(places.iter().any(|p| p.starts_with("flash: padding after layer 1")));
    assert!(places.iter().any(|p| p.contains("padding between sections, byte 700")));
}

#[test]
fn verify_counts_to_the_end() {
    let probe = Probe::new();
    probe.open(&Image::of(&Small::gated())).unwrap();
    let mut last = (0, 0);
    verify(&probe.path, &mut |done, total| {
        assert!(done >= last.0 && done <= total);
        last = (done, total);
    })
    .unwrap();
    assert_eq!(last.0, last.1);
    assert_eq!(last.1, fs::metadata(&probe.path).unwrap().len());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Random damage with the header, and one small section, sealed again: opened or refused, without a panic.
    #[test]
    fn random_damage_never_panics(
        gated: bool,
        damage in prop::collection::vec((0usize..60_000, any::<u8>()), 1..6),
        in_header: bool,
        seal in 0usize..4,
    ) {
        let small = if gated { Small::gated() } else { Small::opt() };
        let mut image = Image::of(&small);
        let section = [Section::Manifest, Section::Tokenizer, Section::Index, Section::Resident][seal];
        let (at, len) = image.extent(section);
        for (place, value) in damage {
            let place = if in_header { 8 + place % 496 } else { at + place % len };
            image.0[place] = value;
        }
        if in_header { image.seal_header() } else { image.seal(section) }
        let probe = Probe::new();
        fs::write(&probe.path, &image.0).unwrap();
        let _ = verify(&probe.path, &mut |_, _| ());
    }
}
