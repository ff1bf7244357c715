//! Quantised bundles: close to the model that they were made of, and the same bits however they are run.

use std::num::NonZeroUsize;
use std::path::Path;

use flashlm::error::RuntimeError;
use flashlm::options::{FfnChoice, LoadOptions};
use flashlm::plan::plan;
use flashlm::sampler::Sampling;
use flashlm_formats::bundle::{Bundle, verify};
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::ids::NeuronId;
use flashlm_formats::weight_format::ResidentFormats;
use flashlm_io::{DirectIo, EngineChoice};
use flashlm_prep::pack::{PackOptions, pack};
use flashlm_tests::{
    continuation, loaded, logits, options, pack_checkpoint, root, run, scratch, tiny_falcon, tiny_opt,
};

fn quantised(checkpoint: &Path, bundle: &Path, (ffn, resident): (&str, &str), reversed: bool) -> Bundle {
    let checkpoint = Checkpoint::open(checkpoint).unwrap();
    let spec = checkpoint.spec();
    let orders = reversed.then(|| {
        ("reversed".into(), vec![(0..spec.ffn().size as u32).rev().map(NeuronId).collect(); spec.layers.len()])
    });
    let format = |name: &str| (!name.is_empty()).then(|| name.parse().unwrap());
    let options = PackOptions {
        tokenizer: b"{}".to_vec(),
        orders,
        ffn: format(ffn),
        resident: ResidentFormats::new(format(resident), None),
        overwrite: true,
        ..PackOptions::default()
    };
    pack(&checkpoint, bundle, options, &mut |_, _| {}).unwrap();
    let report = verify(bundle, &mut |_, _| {}).unwrap();
    assert!(report.damages.is_empty() && report.unused_bytes == 0, "{report:?}");
    Bundle::open(bundle).unwrap()
}

fn prompts() -> [Vec<u32>; 2] {
    // One that goes through matrix products, and one that is decoded.
    [37, 5].map(|n| (0..n).map(|i| 2 + i * 97 % 4000).collect())
}

/// Root of the mean squared difference, against the mean square of the centred reference.
fn difference(found: &[f32], reference: &[f32]) -> f64 {
    let mean = reference.iter().map(|v| f64::from(*v)).sum::<f64>() / reference.len() as f64;
    let size: f64 = reference.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum();
    let error: f64 = found.iter().zip(reference).map(|(f, r)| f64::from(f - r).powi(2)).sum();
    (error / size).sqrt()
}

#[test]
fn logits_are_close_to_the_models() {
    let dir = scratch();
    let path = dir.path().join("model.flashlm");
    for checkpoint in [tiny_opt(), tiny_falcon()] {
        let plain = pack_checkpoint(&checkpoint, &dir.path().join("plain.flashlm"));
        let reference = logits(&mut loaded(&plain, &options(128, FfnChoice::Resident)), &prompts()[0]);
        std::fs::remove_file(plain.path()).unwrap();
        for (formats, most) in [
            (("int8", ""), 0.01),
            (("", "int8"), 0.02),
            (("int8", "int8"), 0.02),
            (("int4", ""), 0.12),
            (("int4/32", "int4/32"), 0.25),
        ] {
            for reversed in [false, true] {
                let bundle = quantised(&checkpoint, &path, formats, reversed);
                let embedding = bundle.resident_tensor("embed.tokens").unwrap().format.to_string();
                assert_eq!(embedding, if formats.1.is_empty() { "f16" } else { "int8/32" });
                let found = logits(&mut loaded(&bundle, &options(128, FfnChoice::Resident)), &prompts()[0]);
                let difference = difference(&found, &reference);
                assert!(difference < most, "{formats:?} of {}: {difference}", checkpoint.display());
                assert!(difference > most / 100.0, "{formats:?} of {}: {difference}", checkpoint.display());
            }
        }
    }
}

#[test]
fn every_way_to_run_a_quantised_bundle_gives_the_same_bits() {
    let dir = scratch();
    let path = dir.path().join("model.flashlm");
    for (checkpoint, formats) in
        [(tiny_opt(), ("int8", "int8")), (tiny_opt(), ("int4/32", "int4")), (tiny_falcon(), ("int4/128", "int8/32"))]
    {
        let bundle = quantised(&checkpoint, &path, formats, true);
        let flash = LoadOptions { predict: false, ..options(128, FfnChoice::Flash) };
        // An engine of threads takes more than a ring.
        let most = LoadOptions { budget: Some(1), engines: EngineChoice::Threads.into(), ..flash.clone() };
        let smallest = match plan(&bundle, &most) {
            Err(RuntimeError::BudgetTooSmall { needed, .. }) => needed,
            other => panic!("{:?}", other.map(|planned| planned.plan)),
        };
        let threads = |threads| NonZeroUsize::new(threads).unwrap();
        let mut ways = vec![options(128, FfnChoice::Resident)];
        ways.push(LoadOptions { threads: threads(1), ..ways[0].clone() });
        ways.push(LoadOptions { threads: threads(3), ..options(128, FfnChoice::Streamed) });
        for budget in [smallest, smallest + bundle.file_bytes() / 8, 4 * smallest] {
            ways.push(LoadOptions { budget: Some(budget), ..flash.clone() });
            let (engines, direct) = (EngineChoice::Threads.into(), DirectIo::Disabled);
            ways.push(LoadOptions { budget: Some(budget), threads: threads(1), engines, direct, ..flash.clone() });
        }
        let mut first = None;
        for way in ways {
            let mut model = loaded(&bundle, &way);
            let text = |model: &mut _, prompt: &[u32]| continuation(model, prompt, 20, Sampling::default());
            let found = prompts().map(|prompt| (logits(&mut model, &prompt), text(&mut model, &prompt)));
            let expected = first.get_or_insert_with(|| found.clone());
            for (found, expected) in found.iter().zip(expected.iter()) {
                assert_eq!(found.1, expected.1, "ids of {formats:?} with {way:?}");
                assert!(found.0 == expected.0, "logits of {formats:?} with {way:?}");
            }
        }
    }
}

/// Every geometry: head sizes, tied and untied heads, projections of the embedding, rows that are no multiple of a block.
#[test]
fn miniatures_of_every_kind_are_quantised() {
    let dir = scratch();
    let path = dir.path().join("model.flashlm");
    let mut count = 0;
    for quirk in std::fs::read_dir(root().join("tests/fixtures/quirks")).unwrap() {
        let checkpoint = quirk.unwrap().path();
        if !checkpoint.join("model.safetensors").exists() {
            continue;
        }
        count += 1;
        let ids: Vec<u32> = (3..30).collect();
        let mut found = Vec::new();
        for formats in [("", ""), ("int8/32", "int8/32")] {
            let bundle = quantised(&checkpoint, &path, formats, false);
            let mut dense = loaded(&bundle, &options(32, FfnChoice::Resident));
            let flash = LoadOptions { predict: false, ..options(32, FfnChoice::Flash) };
            found.push(logits(&mut dense, &ids));
            assert!(logits(&mut loaded(&bundle, &flash), &ids) == found[found.len() - 1], "{}", checkpoint.display());
        }
        let difference = difference(&found[1], &found[0]);
        assert!(difference > 0.0 && difference < 0.05, "{}: {difference}", checkpoint.display());
    }
    assert!(count >= 8, "{count} miniatures");
}

/// What the options say is what the bundle holds, and what `convert` says of it.
#[test]
fn every_part_has_the_format_that_is_asked_for() {
    let dir = scratch();
    let path = dir.path().join("model.flashlm");
    let (model, output) = (tiny_opt(), path.to_str().unwrap().to_owned());
    let convert = |more: &[&str]| {
        let args = [&["convert", model.to_str().unwrap(), "-o", &output, "--force"], more].concat();
        run("flashlm-prep", &args, "")
    };
    let said = convert(&["--dtype", "int4", "--resident-dtype", "int4/64", "--json"]).succeeded();
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    let parts = said["parts"].as_array().unwrap();
    let dtypes: Vec<_> = parts.iter().map(|part| (part["part"].as_str().unwrap(), &part["dtype"])).collect();
    assert_eq!(
        dtypes,
        [("FFN", &"int4/32".into()), ("attention", &"int4/64".into()), ("embedding and head", &"int8/64".into())]
    );
    let number = |part: usize, key: &str| parts[part][key].as_f64().unwrap();
    // Scales are two bytes: half a bit a weight in groups of 32.
    for (part, bits) in [(0, 4.5), (1, 4.25), (2, 8.25)] {
        assert_eq!(8.0 * number(part, "bytes"), bits * number(part, "weights"));
    }
    let errors = [0, 1, 2].map(|part| number(part, "relative_squared_error"));
    assert!(errors[0] > 2e-3 && errors[1] > errors[0] && errors[1] < 2e-2, "{errors:?}");
    assert!(errors[2] > 1e-6 && errors[2] < 1e-4, "{errors:?}");
    let bundle = Bundle::open(&path).unwrap();
    let of = |name: &str| bundle.resident_tensor(name).unwrap().format.to_string();
    assert_eq!([of("embed.tokens"), of("layers.0.attention.qkv.weight")], ["int8/64", "int4/64"]);

    let said = convert(&["--embedding-dtype", "int4"]);
    assert_eq!(Bundle::open(&path).unwrap().manifest().resident.embedding.unwrap().to_string(), "int4/32");
    assert!(said.stderr.contains("  attention: f16, ") && said.stderr.contains(", 16.00 bits a weight\n"), "{said:?}");
    assert!(said.stderr.contains("  embedding and head: int4/32, "), "{said:?}");
    assert!(said.stderr.contains(", 4.50 bits a weight, relative squared error "), "{said:?}");
    assert!(!convert(&[]).stderr.contains("bits a weight"), "of what is not quantised there is nothing to say");
}

/// The divergence from the model, rounded each weight for itself and for the inputs of a text; threads change no byte.
#[test]
fn weights_rounded_for_their_inputs_lose_less() {
    let dir = scratch();
    let name = |path: &Path| path.to_str().unwrap().to_owned();
    let model = name(&tiny_opt());
    // Another part than that to round for.
    let whole = std::fs::read_to_string(root().join("examples/synthetic.txt")).unwrap();
    let [text, other] =
        [("text.txt", &whole[..12_000]), ("other.txt", &whole[whole.len() - 4000..])].map(|(file, part)| {
            let path = dir.path().join(file);
            std::fs::write(&path, part).unwrap();
            name(&path)
        });
    let convert = |bundle: &str, more: &[&str]| {
        let output = name(&dir.path().join(bundle));
        let said = run("flashlm-prep", &[&["convert", &model, "-o", &output], more].concat(), "");
        (output, said)
    };
    let divergence = |output: &str| {
        let args = ["evaluate", output, "--against", &model, "--text", &other, "--predictor", "all", "--tokens", "600"];
        let found = run("flashlm-prep", &[&args[..], &["--json"]].concat(), "").succeeded();
        serde_json::from_str::<serde_json::Value>(&found).unwrap()["kl_mean"].as_f64().unwrap()
    };
    for formats in [["--dtype", "int4"], ["--resident-dtype", "int4"]] {
        let (itself, said) = convert("itself.flashlm", &[&formats[..], &["--force"]].concat());
        assert!(said.stderr.contains("--calibrate TEXT"), "{said:?}");
        let calibrated = [&formats[..], &["--force", "--calibrate", &text]].concat();
        let (for_inputs, said) = convert("for-inputs.flashlm", &calibrated);
        assert!(said.code == Some(0) && !said.stderr.contains("--calibrate"), "{said:?}");
        let (itself, for_inputs) = (divergence(&itself), divergence(&for_inputs));
        assert!(for_inputs < 0.5 * itself, "{formats:?}: {for_inputs}, {itself} each for itself");
    }
    // The preparation has a text.
    let (bundle, work) = (name(&dir.path().join("prepared.flashlm")), name(&dir.path().join("work")));
    let prepare = ["prepare", &model, "-o", &bundle, "--text", &text, "--tokens", "1500", "--dtype", "int4"];
    let said = run("flashlm-prep", &[&prepare[..], &["--work", &work]].concat(), "");
    assert_eq!(said.code, Some(0), "{said:?}");
    let parts = [&work[..], "/predictors"].concat();
    let orders = [&work[..], "/orders"].concat();
    let packed = name(&dir.path().join("packed.flashlm"));
    let pack = ["pack", &model, "--predictors", &parts, "--orders", &orders, "--dtype", "int4", "-o", &packed];
    run("flashlm-prep", &pack, "").succeeded();
    let (prepared, packed) = (divergence(&bundle), divergence(&packed));
    assert!(prepared < 0.5 * packed, "{prepared}, {packed} each for itself");

    let (_, said) = convert("plain.flashlm", &["--calibrate", &text]);
    said.failed(1, &["expected --dtype or --resident-dtype"]);
}
