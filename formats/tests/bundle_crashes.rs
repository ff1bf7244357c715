//! Power fails at every operation of a writer: what is left is the old bundle, the new one, or no bundle.

mod bundle_support;

use std::fs;
use std::path::Path;

use bundle_support::lossy::{Disk, Lossy};
use bundle_support::{Small, ramp};
use flashlm_formats::bundle::{
    Bundle, BundleError, BundleWriter, Extras, Manifest, remove_trailing_bytes, replace_predictors,
    replace_predictors_on, verify,
};

const COINS: u64 = 12;

/// Whether `image` is a bundle without any damage.
fn is_whole(path: &Path, image: &[u8]) -> bool {
    fs::write(path, image).unwrap();
    verify(path, &mut |_, _| ()).is_ok_and(|report| report.damages.is_empty())
}

/// Writes the small bundle until power fails.
fn write_until(small: &Small, power: Option<usize>) -> (Lossy, bool) {
    let disk = Lossy::default();
    disk.0.borrow_mut().power = power;
    let written = try_write(small, disk.clone()).is_ok();
    (disk, written)
}

fn try_write(small: &Small, disk: Lossy) -> Result<Manifest, BundleError> {
    let mut writer = BundleWriter::on(disk, small.plan.clone())?;
    for (seed, (tensor, dtype)) in
        small.plan.model.resident_tensors().iter().zip(&small.plan.resident_dtypes).enumerate()
    {
        writer.resident(&ramp(seed as u64, tensor.shape.iter().product::<usize>() * dtype.bytes()))?;
    }
    for layer in 0..small.plan.model.layers.len() {
        writer.begin_layer(small.order(layer))?;
        let groups = small.groups(writer.layout(), layer);
        writer.groups(&groups)?;
    }
    writer.finish(Extras { provenance: small.provenance(), ..Extras::default() })
}

#[test]
fn a_new_bundle_is_whole_before_it_has_a_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.flashlm");
    let small = Small::opt();
    let (whole, written) = write_until(&small, None);
    assert!(written && whole.0.borrow().published);
    let operations = whole.0.borrow().operations;
    assert!(operations > 10);
    let mut opened = 0;
    for power in 0..operations {
        let (disk, written) = write_until(&small, Some(power));
        assert!(!written && !disk.0.borrow().published);
        for coin in 0..COINS {
            let image = disk.0.borrow().after_crash(coin);
            fs::write(&path, &image).unwrap();
            // The header may have arrived although its synchronisation was cut off; then all else is durable.
            if Bundle::open(&path).is_ok() {
                assert!(is_whole(&path, &image), "power {power}, coin {coin}");
                opened += 1;
            }
        }
    }
    assert!(opened < 4 * COINS, "only the last operations may leave something that opens, not {opened} images");
}

#[test]
fn replacing_leaves_the_old_or_the_new() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.flashlm");
    let probe = dir.path().join("probe.flashlm");
    let small = Small::opt();
    small.write(&path, Some(ramp(1, 9000)));
    // Twice: the second time the new sections go to where the first ones were.
    for (round, bytes) in [5000, 3000, 100_000].into_iter().enumerate() {
        let bundle = Bundle::open(&path).unwrap();
        let old = bundle.manifest().clone();
        let mut new = old.clone();
        new.predictors = Some(small.predictor_info(5 + round));
        let blob = ramp(40 + round as u64, bytes);
        let before = fs::read(&path).unwrap();
        let run = |power| {
            let mut disk = Lossy::default();
            *disk.0.borrow_mut() = Disk::holding(before.clone());
            disk.0.borrow_mut().power = power;
            let result = replace_predictors_on(&mut disk, &bundle, Some(&blob), &new);
            (disk, result.is_ok())
        };
        let (whole, replaced) = run(None);
        assert!(replaced);
        let (mut olds, mut news) = (0, 0);
        for power in 0..whole.0.borrow().operations {
            let (disk, replaced) = run(Some(power));
            assert!(!replaced);
            for coin in 0..COINS {
                let image = disk.0.borrow().after_crash(coin);
                assert!(is_whole(&probe, &image), "round {round}, power {power}, coin {coin}");
                let found = Bundle::open(&probe).unwrap().manifest().clone();
                assert!(found == old || found == new);
                if found == old { olds += 1 } else { news += 1 }
            }
        }
        assert!(olds > 0 && news > 0, "{olds} old, {news} new");
        replace_predictors(&path, Some(&blob), &new).unwrap();
        let replaced = Bundle::open(&path).unwrap();
        assert_eq!(replaced.manifest(), &new);
        assert_eq!(replaced.read_predictors().unwrap().unwrap(), blob);
        assert!(is_whole(&probe, &fs::read(&path).unwrap()));
    }
}

#[test]
fn replacing_again_and_again_does_not_grow_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.flashlm");
    let small = Small::opt();
    let without = small.write(&path, None);
    let first = fs::metadata(&path).unwrap().len();
    let mut with = without.clone();
    with.predictors = Some(small.predictor_info(3));
    let mut lengths = Vec::new();
    for round in 0..9u64 {
        replace_predictors(&path, Some(&ramp(round, 20_000)), &with).unwrap();
        lengths.push(fs::metadata(&path).unwrap().len());
        assert!(verify(&path, &mut |_, _| ()).unwrap().damages.is_empty());
    }
    assert!(*lengths.iter().max().unwrap() < first + 3 * 24_576, "{lengths:?}");
    replace_predictors(&path, None, &without).unwrap();
    assert!(Bundle::open(&path).unwrap().predictors().is_none());
}

#[test]
fn garbage_of_an_interrupted_replacement_is_never_taken_for_padding() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.flashlm");
    let small = Small::opt();
    let manifest = small.write(&path, None);
    let mut bytes = fs::read(&path).unwrap();
    bytes.extend(ramp(3, 50_000));
    fs::write(&path, &bytes).unwrap();
    let report = verify(&path, &mut |_, _| ()).unwrap();
    assert_eq!((report.damages.len(), report.unused_bytes, report.trailing_bytes), (0, 0, 50_000));
    assert!(!report.is_whole() && Bundle::open(&path).unwrap().trailing_bytes() == 50_000);
    assert_eq!(remove_trailing_bytes(&path).unwrap(), 50_000);
    assert!(fs::read(&path).unwrap() == bytes[..bytes.len() - 50_000] && remove_trailing_bytes(&path).unwrap() == 0);
    assert!(verify(&path, &mut |_, _| ()).unwrap().is_whole());
    fs::write(&path, &bytes).unwrap();
    let mut with = manifest.clone();
    with.predictors = Some(small.predictor_info(3));
    replace_predictors(&path, Some(&ramp(9, 10)), &with).unwrap();
    assert!(verify(&path, &mut |_, _| ()).unwrap().damages.is_empty());
}

#[test]
fn refuses_another_model() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.flashlm");
    let manifest = Small::opt().write(&path, None);
    let mut other = manifest.clone();
    other.model.max_positions += 1;
    assert!(matches!(replace_predictors(&path, None, &other), Err(BundleError::WrongInput { .. })));
    let mut undescribed = manifest.clone();
    undescribed.predictors = Some(Small::opt().predictor_info(1));
    assert!(matches!(replace_predictors(&path, None, &undescribed), Err(BundleError::WrongInput { .. })));
    assert!(matches!(replace_predictors(&path, Some(b"x"), &manifest), Err(BundleError::WrongInput { .. })));
    assert_eq!(Bundle::open(&path).unwrap().manifest(), &manifest);
}
