//! Attacks 1 to 6: damaged bytes and cut files, in everything that is read.

use std::fs;
use std::path::Path;

use flashlm::error::Result;
use flashlm::load::load;
use flashlm::options::{FfnChoice, LoadOptions};
use flashlm_formats::bundle::{Bundle, verify};
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::ids::NeuronId;
use flashlm_formats::orders::OrderFile;
use flashlm_formats::recording::Recording;
use flashlm_prep::pack::{PackOptions, pack};
use flashlm_prep::predictors::assemble;
use flashlm_tests::{copied, fixtures, options, run, scratch};
use half::f16;

use crate::mini::{Mini, contents, write_checkpoint};
use crate::{Dice, Outcomes, rounds};

/// The ways in which neurons are read.
const WAYS: [FfnChoice; 3] = [FfnChoice::Flash, FfnChoice::Streamed, FfnChoice::Resident];

/// Loads a bundle and writes some text, after a prompt that is streamed and one that is decoded.
fn text(bundle: &Bundle, ffn: FfnChoice) -> Result<Vec<u32>> {
    let options = LoadOptions { threads: std::num::NonZeroUsize::MIN, ..options(64, ffn) };
    let mut model = load(bundle, &options, &mut |_, _| ())?.forward;
    let mut ids = Vec::new();
    for prompt in [(5..30).collect::<Vec<u32>>(), vec![7, 8, 9]] {
        model.truncate(0);
        // An error first, as `continuation` takes none for an answer.
        model.feed(&prompt)?;
        let mut id = 11;
        for _ in 0..12 {
            let logits = model.feed(&[id])?;
            id = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap() as u32;
            ids.push(id);
        }
    }
    Ok(ids)
}

/// What becomes of a damaged bundle: where it is reported, and that nothing else comes of it.
fn bundle_outcome(path: &Path, reference: &[Vec<u32>], way: usize) -> &'static str {
    let name = path.file_name().unwrap().to_str().unwrap();
    let bundle = match Bundle::open(path) {
        Ok(bundle) => bundle,
        Err(error) => {
            assert!(error.to_string().contains(name), "{error}");
            return "reported at opening";
        }
    };
    let report = verify(path, &mut |_, _| ()).expect("it was opened a moment ago");
    let mut refused = false;
    match text(&bundle, WAYS[way]) {
        Ok(ids) => assert_eq!(ids, reference[way], "another text with {:?}", WAYS[way]),
        Err(error) => {
            let said = error.to_string();
            let has_place = said.contains("layer") || said.contains("section") || said.contains("offset");
            assert!(said.contains(name) && has_place, "{said}");
            refused = true;
        }
    }
    match (report.damages.is_empty(), refused) {
        (false, true) => "reported by verify, and by reading it",
        (false, false) => "reported by verify; no read met it",
        (true, true) => panic!("reading refused what verify lets pass"),
        (true, false) => "without meaning: unused space",
    }
}

#[test]
fn a01_flipped_bytes_of_a_bundle() {
    let bundle = Mini::get().bundle();
    let whole = fs::read(&bundle).unwrap();
    let reference = WAYS.map(|way| text(&Bundle::open(&bundle).unwrap(), way).unwrap());
    let unused = verify(&bundle, &mut |_, _| ()).unwrap().unused_bytes;
    assert!(unused > 0, "the campaign is to meet unused space as well");
    let dir = scratch();
    let path = dir.path().join("damaged.flashlm");
    let (mut dice, mut outcomes) = (Dice::of("flips in a bundle"), Outcomes::default());
    for round in 0..rounds(150, 10_000) {
        let mut bytes = whole.clone();
        let at = dice.flip(&mut bytes);
        fs::write(&path, &bytes).unwrap();
        let outcome = bundle_outcome(&path, &reference, round % WAYS.len());
        if outcome.starts_with("without") {
            // The bytes are really unused: with all of them changed it is the same bundle.
            assert!(bundle_is_unused_at(&bundle, at as u64), "byte {at} is not unused");
        }
        outcomes.add(outcome);
    }
    outcomes.print("flips in a bundle");
    assert!(outcomes.of("reported by verify, and by reading it") > 0, "no damage was read");
}

/// Whether a byte lies outside all sections and after the padding after them.
fn bundle_is_unused_at(path: &Path, at: u64) -> bool {
    use flashlm_formats::bundle::Section;
    let bundle = Bundle::open(path).unwrap();
    let extents = Section::ALL.into_iter().filter_map(|section| bundle.section(section)).map(|info| info.extent);
    at >= 4096 && extents.into_iter().all(|extent| at < extent.offset || at >= extent.end().next_multiple_of(4096))
}

#[test]
fn a02_bundles_cut_short() {
    let bundle = Mini::get().bundle();
    let whole = fs::read(&bundle).unwrap();
    let dir = scratch();
    let path = dir.path().join("cut.flashlm");
    let mut dice = Dice::of("truncations of a bundle");
    for _ in 0..rounds(60, 1000) {
        let length = dice.below(whole.len());
        fs::write(&path, &whole[..length]).unwrap();
        let error = Bundle::open(&path).expect_err("a cut bundle opened").to_string();
        assert!(error.contains("cut short") || error.contains("not a flashlm bundle"), "{length}: {error}");
    }
}

/// Everything that a recording says, read as training reads it.
fn recorded(dir: &Path) -> Result<String, String> {
    let recording = Recording::open(dir).map_err(|e| e.to_string())?;
    let mut all = format!("{:?}{:?}{:?}", recording.info(), recording.tokens(), recording.documents());
    for layer in 0..recording.info().model.layers.len() {
        let mut layer = recording.layer(layer).map_err(|e| e.to_string())?;
        let mut inputs = vec![f16::ZERO; layer.tokens() * layer.hidden()];
        layer.read_inputs(0..layer.tokens(), &mut inputs).map_err(|e| e.to_string())?;
        all += &format!("{:?}{inputs:?}", layer.summary());
        for token in 0..layer.tokens() {
            all += &format!("{:?}{:?}", layer.activity(token), layer.magnitudes(token));
        }
    }
    Ok(all)
}

/// Damages files of a directory one byte at a time, and cuts them; `read` gives everything that they say.
fn damage_files(name: &str, from: &Path, counts: (usize, usize), read: &dyn Fn(&Path) -> Result<String, String>) {
    let dir = copied(from);
    let reference = read(dir.path()).unwrap();
    let files = contents(dir.path());
    let (mut dice, mut outcomes) = (Dice::of(name), Outcomes::default());
    let total: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
    for round in 0..counts.0 + counts.1 {
        // Files are hit as often as they are long, but small ones, too.
        let mut at = dice.below(total);
        let pick = files.iter().position(|(_, bytes)| {
            let here = at < bytes.len();
            at = at.saturating_sub(bytes.len());
            here
        });
        let pick = if round % 4 == 0 { dice.below(files.len()) } else { pick.unwrap() };
        let (file, whole) = &files[pick];
        let mut bytes = whole.clone();
        let flipped = round < counts.0;
        let at = if flipped { dice.flip(&mut bytes) } else { dice.below(whole.len()) };
        if !flipped {
            bytes.truncate(at);
        }
        fs::write(dir.path().join(file), &bytes).unwrap();
        match read(dir.path()) {
            Err(error) => {
                let named = file.file_name().unwrap().to_str().unwrap();
                // Two files that contradict each other are both named.
                let is_said = [named, "layer", "belongs to recording"].iter().any(|word| error.contains(word));
                assert!(is_said, "{error} does not say {named}");
                outcomes.add(if flipped { "flips reported" } else { "cuts reported" });
            }
            Ok(found) if found == reference => {
                outcomes.add(if flipped { "flips without meaning" } else { "cuts without meaning" });
            }
            Ok(_) => panic!("{}: byte {at} changed (flip: {flipped}), and nobody noticed", file.display()),
        }
        fs::write(dir.path().join(file), whole).unwrap();
    }
    outcomes.print(name);
}

#[test]
fn a03_damaged_recordings() {
    let counts = (rounds(150, 10_000), rounds(40, 1000));
    damage_files("recordings", &Mini::get().path("recording"), counts, &recorded);
}

#[test]
fn a04_damaged_predictors() {
    let spec = Bundle::open(Mini::get().bundle()).unwrap().spec().clone();
    let orders = vec![(0..spec.ffn().size as u32).map(NeuronId).collect::<Vec<_>>(); spec.layers.len()];
    let read = |dir: &Path| assemble(dir, &spec, &orders).map(|all| format!("{all:?}")).map_err(|e| e.to_string());
    let dir = copied(&Mini::get().path("predictors"));
    // The report beside them is for people.
    for (file, _) in contents(dir.path()) {
        if !file.to_str().unwrap().starts_with("predictor-") {
            fs::remove_file(dir.path().join(file)).unwrap();
        }
    }
    damage_files("predictors", dir.path(), (rounds(150, 10_000), rounds(40, 1000)), &read);
}

#[test]
fn a05_damaged_orders() {
    let spec = Bundle::open(Mini::get().bundle()).unwrap().spec().clone();
    let read = |dir: &Path| {
        let orders = (0..spec.layers.len()).map(|layer| OrderFile::read(dir, layer, spec.ffn().size));
        orders.collect::<Result<Vec<_>, _>>().map(|all| format!("{all:?}")).map_err(|e| e.to_string())
    };
    let dir = copied(&Mini::get().path("orders"));
    for (file, _) in contents(dir.path()) {
        if !file.to_str().unwrap().ends_with(".order.safetensors") {
            fs::remove_file(dir.path().join(file)).unwrap();
        }
    }
    damage_files("orders", dir.path(), (rounds(100, 10_000), rounds(40, 1000)), &read);
}

/// A checkpoint has no checksums of its own: damage is refused, or makes a bundle that names another source.
#[test]
fn a06_damaged_checkpoints() {
    let dir = scratch();
    write_checkpoint(&dir.path().join("safetensors"));
    let torch = dir.path().join("torch");
    fs::create_dir(&torch).unwrap();
    fs::copy(fixtures().join("torch/plain/pytorch_model.bin"), torch.join("pytorch_model.bin")).unwrap();
    fs::copy(fixtures().join("quirks/opt-125m/config.json"), torch.join("config.json")).unwrap();
    let out = dir.path().join("out.flashlm");
    let make = |from: &Path| -> Result<(Vec<u8>, String), String> {
        let checkpoint = Checkpoint::open(from).map_err(|e| e.to_string())?;
        let options = PackOptions { tokenizer: b"{}".to_vec(), overwrite: true, ..PackOptions::default() };
        let manifest = pack(&checkpoint, &out, options, &mut |_, _| ()).map_err(|e| e.to_string())?.manifest;
        Ok((fs::read(&out).unwrap(), format!("{:?} {}", manifest.model, manifest.provenance.content_hash)))
    };
    for kind in ["safetensors", "torch"] {
        let name = format!("checkpoints ({kind})");
        let (mut dice, mut outcomes) = (Dice::of(&name), Outcomes::default());
        let reference = make(&dir.path().join(kind)).unwrap();
        let files: Vec<_> = contents(&dir.path().join(kind));
        let files: Vec<_> = files.into_iter().filter(|(file, _)| file.to_str() != Some("tokenizer.json")).collect();
        let cuts = rounds(20, 500);
        for round in 0..rounds(60, 5000) + cuts {
            let (file, whole) = &files[if round % 8 == 0 { dice.below(files.len()) } else { files.len() - 1 }];
            let mut bytes = whole.clone();
            // Headers are small, and most of what can go wrong is there.
            let at = match round {
                _ if round < cuts => {
                    bytes.truncate(dice.below(whole.len()));
                    bytes.len()
                }
                _ if round % 2 == 0 => dice.flip(&mut bytes),
                _ => {
                    let head = whole.len().min(6000);
                    dice.flip(&mut bytes[..head])
                }
            };
            let path = dir.path().join(kind).join(file);
            fs::write(&path, &bytes).unwrap();
            let what = if round < cuts { "cut" } else { "flip" };
            match make(&dir.path().join(kind)) {
                Err(_) => outcomes.add(format!("{what}: refused")),
                Ok(found) if found.0 == reference.0 => {
                    outcomes.add(format!("{what}: without meaning, the same bundle"))
                }
                Ok(found) if found.1 != reference.1 => {
                    outcomes.add(format!("{what}: another model by its content hash"))
                }
                Ok(_) => panic!("{}: byte {at}: another bundle that claims the same source", path.display()),
            }
            fs::write(&path, whole).unwrap();
        }
        outcomes.print(&name);
    }
}

/// The checks of what is read are on, in the library and in the program, and the flag is the only way to be without them.
#[test]
fn a07_checks_are_on_unless_told() {
    assert!(LoadOptions::new(8).verify);
    let dir = scratch();
    let path = dir.path().join("damaged.flashlm");
    fs::copy(Mini::get().bundle(), &path).unwrap();
    // The lowest bits of all neurons: numbers that nothing but a checksum tells from the right ones.
    let flash = Bundle::open(&path).unwrap().flash();
    let mut bytes = fs::read(&path).unwrap();
    bytes[flash.offset as usize..][..flash.bytes as usize].iter_mut().step_by(2).for_each(|low| *low ^= 1);
    fs::write(&path, bytes).unwrap();
    for ffn in ["flash", "streamed", "resident"] {
        let run = |more: &[&str]| {
            let args = ["run", path.to_str().unwrap(), "--ids", "5,6,7", "-n", "9", "--ignore-eos", "--ffn", ffn];
            run("flashlm", &[&args[..], more].concat(), "")
        };
        run(&[]).failed(1, &["damaged", "layer"]);
        // What is read while loading is checked without being asked, too.
        match ffn {
            "resident" => run(&["--no-verify"]).failed(1, &["damaged", "layer"]),
            _ => run(&["--no-verify"]).succeeded(),
        };
    }
}
