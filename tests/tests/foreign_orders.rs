//! Storage orders of other programs, from arrays of numpy to a bundle that runs.

use std::fs;
use std::path::Path;

use flashlm_formats::bundle::Bundle;
use flashlm_formats::ids::NeuronId;
use flashlm_formats::orders::{OrderFile, OrderSummary};
use flashlm_prep::npy;
use flashlm_tests::{fixtures, root, run, scratch, tiny_opt};

fn numpy(order: &[NeuronId]) -> Vec<u8> {
    npy::encode(&order.iter().map(|neuron| neuron.0).collect::<Vec<_>>())
}

#[test]
fn imported_orders_are_judged_and_packed() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let model = tiny_opt().to_str().unwrap().to_owned();
    let text = root().join("examples/synthetic.txt").to_str().unwrap().to_owned();
    let (recording, own, mine, imported) = (path("recording"), path("own"), path("mine"), path("imported"));
    let prep = |args: &[&str]| run("flashlm-prep", args, "").succeeded();
    prep(&["record", &model, "--text", &text, "-o", &recording, "--tokens", "1000", "--sequence-tokens", "128"]);
    prep(&["order", &recording, "--strategy", "frequency", "-o", &own]);

    // The same orders as arrays get the same scores.
    fs::create_dir(&mine).unwrap();
    let layers = OrderSummary::read(Path::new(&own)).unwrap().layers;
    for layer in 0..layers.len() {
        let order = OrderFile::read(Path::new(&own), layer, 1024).unwrap().order;
        fs::write(Path::new(&mine).join(format!("order_{layer}.npy")), numpy(&order)).unwrap();
    }
    let said = prep(&["import-order", &mine, "--recording", &recording, "-o", &imported]);
    assert!(said.contains("made elsewhere, judged on") && said.contains("imported"), "{said}");
    for (found, expected) in OrderSummary::read(Path::new(&imported)).unwrap().layers.iter().zip(&layers) {
        assert_eq!(found.strategies[0], expected.strategies[0]);
        let mut own = expected.strategies[1].clone();
        own.strategy = "imported".into();
        assert_eq!((found.chosen.as_str(), &found.strategies[1]), ("imported", &own));
    }
    // So do the files that `order` wrote.
    prep(&["import-order", &own, "--recording", &recording, "-o", &path("again")]);
    let summaries = [&imported, &path("again")].map(|dir| fs::read(Path::new(dir).join("orders.json")).unwrap());
    assert!(summaries[0] == summaries[1]);

    let bundle = path("model.flashlm");
    prep(&["train", &recording, "--rank", "8", "--epochs", "1", "-o", &path("predictors")]);
    prep(&["pack", &model, "--predictors", &path("predictors"), "--orders", &imported, "-o", &bundle]);
    let opened = Bundle::open(Path::new(&bundle)).unwrap();
    assert_eq!(opened.manifest().ffn.order, "imported");
    let order = OrderFile::read(Path::new(&own), 3, 1024).unwrap().order;
    assert_eq!(opened.storage_order(3), order);

    let mut wrong = order;
    wrong[7] = wrong[2];
    fs::write(Path::new(&mine).join("order_3.npy"), numpy(&wrong)).unwrap();
    let import =
        |from: &str, to: &str| run("flashlm-prep", &["import-order", from, "--recording", &recording, "-o", to], "");
    let refused = import(&mine, &path("x"));
    refused.failed(1, &["layer 3:", &format!("has neuron {} at position 7, as at position 2", wrong[2].0)]);
    assert!(!Path::new(&path("x")).exists());
    import(&mine, &mine).failed(1, &["layer 3:"]);
    import(&own, &own).failed(1, &["which this command reads"]);
    let of_none = fixtures();
    import(of_none.to_str().unwrap(), &path("x")).failed(1, &["one file for each of 8 layers, such as layer-000.npy"]);
}
