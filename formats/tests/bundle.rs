//! Bundles: what is written is read back, and every lie is found.

mod bundle_support;

use bundle_support::{Small, ramp};
use flashlm_formats::bundle::{Bundle, Section, verify};

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
        for (seed, entry) in bundle.resident_tensors().iter().enumerate() {
            assert_eq!(
                bundle.read_tensor(entry).unwrap(),
                ramp(seed as u64, entry.extent.bytes as usize),
                "{}",
                entry.name
            );
            assert_eq!(bundle.resident_tensor(&entry.name), Some(entry));
        }
        assert_eq!(bundle.resident_tensors()[0].extent.offset % 64, 0);
        let layout = *bundle.layout();
        for layer in 0..bundle.spec().layers {
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
        let blob = std::fs::read(&path).unwrap()[resident.offset as usize..resident.end() as usize].to_vec();
        assert_eq!(safetensors::SafeTensors::deserialize(&blob).unwrap().len(), small.plan.resident_dtypes.len());
        let report = verify(&path, &mut |_, _| ()).unwrap();
        assert!(report.damages.is_empty(), "{report:?}");
        assert_eq!((report.unused_bytes, report.checked_bytes), (0, bundle.file_bytes()));
    }
}
