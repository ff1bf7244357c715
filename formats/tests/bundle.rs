//! Bundles: what is written is read back, and every lie is found.

mod bundle_support;

use std::fs;
use std::path::{Path, PathBuf};

use bundle_support::{Small, ramp, scales};
use flashlm_formats::bundle::{
    Bundle, BundleError, BundlePlan, BundleWriter, Extras, FORMAT_VERSION, LayoutOptions, Section, verify,
};
use flashlm_formats::ids::NeuronId;
use flashlm_formats::model::{DType, LAYERS_MAX};
use flashlm_formats::weight_format::ResidentFormats;
use proptest::prelude::*;

#[test]
fn reads_what_was_written() {
    for small in Small::all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.flashlm");
        let manifest = small.write(&path, None);
        let bundle = Bundle::open(&path).unwrap();
        assert_eq!(bundle.manifest(), &manifest);
        assert_eq!(bundle.spec(), &small.plan.model);
        assert_eq!(bundle.tokenizer(), small.plan.tokenizer);
        assert!(bundle.predictors().is_none() && bundle.read_predictors().unwrap().is_none());
        assert_eq!(bundle.resident_tensors().len(), small.plan.resident_dtypes.len());
        let mut stored = bundle.resident_tensors().len();
        for (seed, entry) in bundle.resident_tensors().iter().enumerate() {
            let expected = ramp(seed as u64, entry.extent.bytes as usize);
            assert_eq!(bundle.read_part(entry.extent).unwrap(), expected, "{}", entry.name);
            assert_eq!(entry.scales.is_some(), entry.format.is_quantised(), "{}", entry.name);
            if let Some(extent) = entry.scales {
                assert_eq!(bundle.read_part(extent).unwrap(), scales(extent.bytes as usize / 2), "{}", entry.name);
                stored += 1;
            }
            assert_eq!(bundle.resident_tensor(&entry.name), Some(entry));
        }
        assert_eq!(bundle.resident_tensors()[0].extent.offset % 64, 0);
        let layout = *bundle.layout();
        for layer in 0..bundle.spec().layers.len() {
            assert_eq!(bundle.ffn_scales(layer).is_some(), small.plan.ffn_dtype.is_quantised());
            if let Some(extent) = bundle.ffn_scales(layer) {
                let groups = small.plan.ffn_dtype.scales(bundle.spec().hidden_size);
                let expected = scales(bundle.layout().neurons() * bundle.layout().vectors() * groups);
                assert_eq!(bundle.read_part(extent).unwrap(), expected);
                stored += 1;
            }
            let order = bundle.storage_order(layer);
            assert_eq!(order, small.order(layer));
            let mut data = vec![0; layout.layer_bytes()];
            bundle.read_at(bundle.layer(layer).offset, &mut data).unwrap();
            for (position, neuron) in order.iter().enumerate() {
                for vector in 0..layout.vectors() {
                    let at = layout.vector_offset(position, vector);
                    let expected = small.row(layer, *neuron, vector);
                    assert_eq!(data[at..at + layout.row_bytes()], expected, "layer {layer} neuron {neuron}");
                }
            }
            for group in 0..layout.groups() {
                let extent = bundle.group(layer, group);
                let start = layout.group_offset(group);
                let bytes = &data[start..start + layout.group_bytes()];
                assert_eq!(extent.offset % layout.alignment() as u64, 0);
                assert_eq!(bundle.group_checksums(layer)[group], flashlm_formats::bundle::checksum(bytes));
            }
        }
        let resident = bundle.section(Section::Resident).unwrap().extent;
        let blob = fs::read(&path).unwrap()[resident.offset as usize..resident.end() as usize].to_vec();
        assert_eq!(safetensors::SafeTensors::deserialize(&blob).unwrap().len(), stored);
        let report = verify(&path, &mut |_, _| ()).unwrap();
        assert!(report.damages.is_empty(), "{report:?}");
        assert_eq!((report.unused_bytes, report.checked_bytes), (0, bundle.file_bytes()));
    }
}

#[test]
fn the_same_inputs_give_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str| {
        let path = dir.path().join(name);
        Small::opt().write(&path, Some(ramp(8, 5000)));
        fs::read(path).unwrap()
    };
    assert!(write("a.flashlm") == write("b.flashlm"));
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("tests/fixtures").join(name)
}

/// Format version 1 has to open forever.
#[test]
fn version_1_opens() {
    let (path, small) = (fixture("bundle-v1.flashlm"), Small::opt());
    let bundle = Bundle::open(&path).unwrap();
    assert_eq!(bundle.spec(), &small.plan.model);
    assert_eq!(bundle.read_predictors().unwrap().unwrap(), ramp(8, 5000));
    assert!(verify(&path, &mut |_, _| ()).unwrap().damages.is_empty());
}

/// Format version 2 has to open forever, with gates and quantised.
#[test]
fn version_2_opens() {
    opens("bundle-v2.flashlm", &Small::gated_with_everything(), false);
    opens("bundle-v2-quantised.flashlm", &Small::quantised(), false);
}

fn opens(name: &str, small: &Small, wide_kv: bool) {
    let bundle = Bundle::open(fixture(name)).unwrap();
    assert_eq!(bundle.spec(), &small.plan.model);
    assert_eq!(bundle.manifest().wide_kv, wide_kv);
    assert_eq!(bundle.read_predictors().unwrap().unwrap(), ramp(8, 5000));
    assert!(verify(bundle.path(), &mut |_, _| ()).unwrap().damages.is_empty());
}

/// So does version 3, also from before layers were data.
#[test]
fn version_3_opens() {
    opens("bundle-v3.flashlm", &Small::layered(), true);
    opens("bundle-v3-number-of-layers.flashlm", &Small::gated_with_everything(), true);
    assert_eq!(Bundle::open(fixture("bundle-v3.flashlm")).unwrap().manifest().chat, None);
}

/// Format version 4 has to open forever. `FLASHLM_BLESS=1` writes the file again: only when the version was never published.
#[test]
fn version_4_opens() {
    let (name, small, blob) = ("bundle-v4.flashlm", Small::layered(), ramp(8, 5000));
    let path = fixture(name);
    if std::env::var_os("FLASHLM_BLESS").is_some() {
        let _ = fs::remove_file(&path);
        small.write(&path, Some(blob.clone()));
    }
    opens(name, &small, true);
    let manifest = Bundle::open(&path).unwrap().manifest().clone();
    assert_eq!((manifest.chat, manifest.sampling), Small::chat());
    // As long as version 4 is what is written, it is written like this.
    assert_eq!(FORMAT_VERSION, 4);
    let dir = tempfile::tempdir().unwrap();
    let again = dir.path().join("again.flashlm");
    small.write(&again, Some(blob));
    assert!(fs::read(&path).unwrap() == fs::read(&again).unwrap(), "the format changed without a new version");
}

/// A reader written from docs/bundle-format.md alone, without a line of the crate.
#[test]
fn a_reader_by_the_book_finds_every_row() {
    let dir = tempfile::tempdir().unwrap();
    for small in Small::all() {
        let path = dir.path().join("m.flashlm");
        let _ = fs::remove_file(&path);
        small.write(&path, None);
        let file = fs::read(&path).unwrap();
        let u32_at = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap()) as usize;
        let u64_at = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap()) as usize;
        let xxh3 = xxhash_rust::xxh3::xxh3_64;
        assert_eq!(&file[..8], [0x89, 0x46, 0x4C, 0x4D, 0x0D, 0x0A, 0x1A, 0x0A]);
        assert_eq!((u32_at(8), u32_at(12), u64_at(16)), (4, 6, file.len()));
        assert_eq!(u64_at(504) as u64, xxh3(&file[..504]));
        let section = |at: usize| &file[u64_at(at)..u64_at(at) + u64_at(at + 8)];
        for at in [24, 48, 72, 120] {
            assert_eq!(u64_at(at + 16) as u64, xxh3(section(at)));
        }
        let manifest: serde_json::Value = serde_json::from_slice(section(24)).unwrap();
        let number = |pointer: &str| manifest.pointer(pointer).unwrap().as_u64().unwrap() as usize;
        let runs = manifest["model"]["layers"].as_array().unwrap();
        let layers = runs.iter().map(|run| run["repeat"].as_u64().unwrap() as usize).sum();
        let vectors = if runs[0]["feed_forward"]["dense"]["gated"] == true { 3 } else { 2 };
        let neurons = number("/model/layers/0/feed_forward/dense/size");
        let hidden = number("/model/hidden_size");
        let row_bytes = match manifest["ffn"]["dtype"].as_str().unwrap() {
            "f32" => 4 * hidden,
            "int4/32" => hidden.div_ceil(32) * 16,
            _ => 2 * hidden,
        };
        let (per_group, alignment) = (number("/ffn/records_per_group"), number("/ffn/alignment"));
        let record_bytes = row_bytes * vectors;
        let group_bytes = (per_group * record_bytes).next_multiple_of(alignment);
        let groups = neurons.div_ceil(per_group);
        let index = u64_at(120);
        assert_eq!([u32_at(index), u32_at(index + 4), u32_at(index + 8)], [layers, neurons, groups]);
        let mut table = index + 16;
        let mut all_sums = Vec::new();
        for layer in 0..layers {
            let base = u64_at(table);
            for position in 0..neurons {
                let neuron = u32_at(table + 8 + 4 * position);
                for v in 0..vectors {
                    let at = base
                        + (position / per_group) * group_bytes
                        + (position % per_group) * record_bytes
                        + v * row_bytes;
                    assert_eq!(&file[at..at + row_bytes], small.row(layer, NeuronId(neuron as u32), v));
                }
            }
            let sums = table + (8 + 4 * neurons).next_multiple_of(8);
            for group in 0..groups {
                let at = base + group * group_bytes;
                assert_eq!(u64_at(sums + 8 * group) as u64, xxh3(&file[at..at + group_bytes]));
            }
            all_sums.extend(&file[sums..sums + 8 * groups]);
            table = sums + 8 * groups;
        }
        assert_eq!(table, index + u64_at(128));
        assert_eq!(u64_at(144 + 16) as u64, xxh3(&all_sums));
    }
}

#[test]
fn a_writer_takes_only_what_fits() {
    let wrong = |result: Result<(), BundleError>| assert!(matches!(result, Err(BundleError::WrongInput { .. })));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.flashlm");
    let small = Small::opt();
    let create = || BundleWriter::create(&path, small.plan.clone(), false);
    let layout = *create().unwrap().layout();
    let neurons = layout.neurons() as u32;

    let mut writer = create().unwrap();
    assert!(matches!(create(), Err(BundleError::Busy { .. })));
    wrong(writer.groups(&vec![0; layout.group_bytes()]));
    wrong(writer.begin_layer((1..neurons).map(NeuronId).collect()));
    wrong(writer.begin_layer((1..=neurons).map(NeuronId).collect()));
    wrong(writer.begin_layer(vec![NeuronId(0); neurons as usize]));
    writer.begin_layer((0..neurons).map(NeuronId).collect()).unwrap();
    wrong(writer.begin_layer((0..neurons).map(NeuronId).collect()));
    wrong(writer.groups(&vec![0; layout.group_bytes() - 1]));
    wrong(writer.groups(&vec![0; layout.layer_bytes() + layout.group_bytes()]));
    wrong(writer.groups(&vec![1; layout.group_bytes()]));
    wrong(writer.resident(&vec![0; 1 << 20]));
    wrong(writer.finish(Extras::default()).map(drop));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "a writer that fails leaves nothing");

    let plans: [fn(&mut BundlePlan); 6] = [
        |plan| plan.tokenizer.clear(),
        |plan| plan.resident_dtypes.truncate(3),
        |plan| plan.model.layers.clear(),
        |plan| plan.model.layers.iter_mut().for_each(|layer| layer.attention.heads = 3),
        |plan| plan.model.layers = vec![plan.model.layers[0]; LAYERS_MAX + 1],
        |plan| plan.model.layers.iter_mut().for_each(|layer| layer.attention.head_dim = usize::MAX),
    ];
    for change in plans {
        let mut plan = small.plan.clone();
        change(&mut plan);
        wrong(BundleWriter::create(&path, plan, false).map(drop));
    }
    let mut plan = small.plan.clone();
    plan.layout.alignment = 100;
    assert!(matches!(BundleWriter::create(&path, plan, false), Err(BundleError::Layout(_))));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn any_shape_is_read_back(
        layers in 1usize..4, neurons in 1usize..50, hidden in 1usize..70, gated: bool, formats in 0usize..8,
        shift in 9u32..14, group_bytes in 0usize..3000, predictors in prop::option::of(1usize..9000),
    ) {
        let mut small = if gated { Small::gated() } else { Small::opt() };
        let mut layer = small.plan.model.layers[0];
        layer.ffn_mut().size = neurons;
        small.plan.model.layers = vec![layer; layers];
        small.plan.model.hidden_size = hidden;
        small.plan.layout = LayoutOptions { alignment: 1 << shift, group_bytes };
        small.plan.resident_dtypes = vec![DType::F16; small.plan.model.resident_tensors().len()];
        let quantised = ["int8/32", "int4/64"].map(|format| format.parse().unwrap());
        if formats & 1 != 0 {
            small.plan.ffn_dtype = quantised[formats / 2 % 2];
        }
        // The embedding as the matrices, otherwise, or not at all.
        small.plan.resident = ResidentFormats {
            matrices: (formats & 2 != 0).then_some(quantised[formats % 2]),
            embedding: (formats & 4 != 0).then_some(quantised[0]),
        };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.flashlm");
        let blob = predictors.map(|bytes| ramp(1, bytes));
        let manifest = small.write(&path, blob.clone());
        let bundle = Bundle::open(&path).unwrap();
        prop_assert_eq!(bundle.manifest(), &manifest);
        prop_assert_eq!(bundle.read_predictors().unwrap(), blob);
        let report = verify(&path, &mut |_, _| ()).unwrap();
        prop_assert_eq!(report.damages, vec![]);
        prop_assert_eq!(report.unused_bytes, 0);
        let layout = *bundle.layout();
        for layer in 0..layers {
            prop_assert_eq!(bundle.layer(layer).offset % 4096, 0);
            let mut data = vec![0; layout.layer_bytes()];
            bundle.read_at(bundle.layer(layer).offset, &mut data).unwrap();
            prop_assert!(data == small.groups(&layout, layer));
        }
    }
}
