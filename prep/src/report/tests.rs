use std::path::{Path, PathBuf};

use flashlm_formats::ids::NeuronId;
use flashlm_formats::orders::OrderFile;
use flashlm_formats::predictors::TrainReportError;
use flashlm_formats::recording::LayerRecording;

use super::*;

fn fixture() -> Recording {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/recording-tiny-opt");
    Recording::open(&dir).unwrap()
}

fn report(recording: &Recording, predictors: Option<&TrainReport>, orders: Option<&Orders>) -> Report {
    let orders = orders.map(|orders| (orders, orders.summary()));
    let input = ReportInput {
        info: recording.info(),
        verdict: |mean| format!("mean <{mean:.3}> & more"),
        predictors,
        orders: orders.map(|(_, summary)| summary),
        disk: None,
        made: None,
    };
    let layers = measure_all(recording, orders.map(|(orders, _)| orders), &input, 100_000, &|| ()).unwrap();
    Report::new(&input, &layers).unwrap()
}

fn page(recording: &Recording, predictors: Option<&TrainReport>, orders: Option<&Orders>) -> String {
    report(recording, predictors, orders).page()
}

/// Predictors for both layers of the fixture, with made-up figures.
fn predictors(dir: &Path) -> TrainReport {
    let point = |missed: f64| {
        format!(
            r#"{{"threshold": 0.5, "false_negative_rate": {missed}, "false_positive_rate": 0.02, "predicted_fraction": 0.125,
                "active_fraction": 0.1, "over_fetch": 1.25, "energy_recall": 0.99, "precision": 0.8}}"#
        )
    };
    let layer = |layer: usize, missed: f64| {
        format!(
            r#"{{"layer": {layer}, "rank": 16, "dtype": "int8", "bytes": 20000, "ffn_bytes": 1048576, "held_out": {0},
                "validation": null, "later": 1, "curves": [{{"dtype": "int8", "bytes": 20000, "points": [{0}, {1}]}}]}}"#,
            point(missed),
            point(0.1)
        )
    };
    let json = format!(
        r#"{{"format": "flashlm-predictors", "version": 1, "recording": "x", "predictor_bytes": 40000, "ffn_bytes": 2097152, "layers": [{}, {}]}}"#,
        layer(0, 0.0425),
        layer(1, 0.0375)
    );
    std::fs::write(dir.join("predictors.json"), json).unwrap();
    TrainReport::read(dir).unwrap()
}

#[test]
fn numbers_that_cannot_be_drawn_are_an_error() {
    let dir = tempfile::tempdir().unwrap();
    predictors(dir.path());
    let path = dir.path().join("predictors.json");
    let json = std::fs::read_to_string(&path).unwrap();
    for huge in ["1e308", "-1e308", "1e16"] {
        std::fs::write(&path, json.replace("0.125", huge).replace("20000", "18446744073709551615")).unwrap();
        let (recording, predictors) = (fixture(), TrainReport::read(dir.path()).unwrap());
        let input = ReportInput {
            info: recording.info(),
            verdict: |_| String::new(),
            predictors: Some(&predictors),
            orders: None,
            disk: None,
            made: None,
        };
        // What lies below an axis that begins at zero is not drawn.
        let built = Report::new(&input, &measure_all(&recording, None, &input, 100_000, &|| ()).unwrap());
        assert!(matches!(built, Err(ReportError::Chart(_))) || huge.starts_with('-') && built.is_ok(), "{huge}");
    }
}

/// Orders that turn both layers of the fixture round.
fn orders(dir: &Path, recording: &Recording) -> Orders {
    let info = recording.info();
    for layer in 0..2 {
        let order = (0..info.model.ffn().size as u32).rev().map(NeuronId).collect();
        OrderFile { layer, strategy: "path".into(), recording: info.id.clone(), groups: None, order }
            .write(dir)
            .unwrap();
    }
    let layer = |layer: usize| {
        format!(
            r#"{{"layer": {layer}, "chosen": "path", "file": "layer-00{layer}.order.safetensors", "strategies": []}}"#
        )
    };
    let json = format!(
        r#"{{"format": "flashlm-orders", "version": 1, "recording": "{0}", "scored_on": "{0}", "training_tokens": 1,
            "scored_tokens": 1, "records_per_group": 4, "group_bytes": 4096, "policy": "lru", "slots": 1,
            "request_ns": 20000.0, "byte_ns": 1.0, "later": 1, "layers": [{1}, {2}]}}"#,
        info.id,
        layer(0),
        layer(1)
    );
    std::fs::write(dir.join("orders.json"), json).unwrap();
    Orders::read(dir).unwrap()
}

fn full_report() -> Report {
    let recording = fixture();
    let dir = tempfile::tempdir().unwrap();
    report(&recording, Some(&predictors(dir.path())), Some(&orders(dir.path(), &recording)))
}

fn full_page() -> String {
    full_report().page()
}

const SECTIONS: [&str; 8] =
    ["summary", "sparsity", "frequency", "reuse", "coactivation", "runs", "predictors", "budget"];

/// The section's rows, cell by cell, of all its tables.
fn rows(page: &str, section: &str) -> Vec<Vec<String>> {
    let (_, rest) = page.split_once(&format!("<section id=\"{section}\">")).unwrap();
    let (section, _) = rest.split_once("</section>").unwrap();
    let row = |row: &str| -> Vec<String> {
        row.split("<td>").skip(1).map(|cell| cell.split("</td>").next().unwrap().to_string()).collect()
    };
    section.split("<tr>").skip(1).map(row).filter(|cells| !cells.is_empty()).collect()
}

/// Which neurons are active at each token, straight from the bits.
fn bits(layer: &LayerRecording) -> Vec<Vec<bool>> {
    let token = |t: usize| (0..layer.ffn()).map(|n| layer.activity(t)[n / 8] >> (n % 8) & 1 == 1).collect();
    (0..layer.tokens()).map(token).collect()
}

fn percent_of(share: f64) -> String {
    let decimals = if share >= 0.09995 { 1 } else { 2 };
    format!("{:.decimals$} %", share * 100.0)
}

/// XML has elements that close in turn, attributes in quotes, and no stray characters.
fn assert_well_formed(text: &str) {
    let mut open: Vec<&str> = Vec::new();
    let mut rest = text;
    while let Some((text, tail)) = rest.split_once('<') {
        assert!(!text.contains('>') || open.last() == Some(&"style"), "stray > in {text:?}");
        let (tag, tail) = tail.split_once('>').unwrap();
        assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "</{name}> closes another element");
        } else if !tag.ends_with('/') {
            open.push(tag.split_whitespace().next().unwrap());
        }
        for entity in text.split('&').skip(1) {
            let known = ["amp;", "lt;", "gt;", "quot;"].iter().any(|e| entity.starts_with(e));
            assert!(known, "bare & in {text:?}");
        }
        rest = tail;
    }
    assert!(open.is_empty(), "{open:?} stay open");
}

#[test]
fn the_page_is_well_formed() {
    let recording = fixture();
    for page in [full_page(), page(&recording, None, None)] {
        assert_well_formed(page.strip_prefix("<!DOCTYPE html>").unwrap());
        let mut ids: Vec<&str> = page.split(" id=\"").skip(1).map(|p| p.split('"').next().unwrap()).collect();
        ids.sort_unstable();
        assert!(ids.windows(2).all(|w| w[0] != w[1]), "{ids:?}");
    }
}

#[test]
fn every_section_is_there_and_nothing_is_loaded() {
    let recording = fixture();
    for page in [full_page(), page(&recording, None, None)] {
        for section in SECTIONS {
            assert!(page.contains(&format!("<section id=\"{section}\">")), "{section}");
            assert!(page.contains(&format!("href=\"#{section}\"")), "{section}");
        }
        for outside in ["http:", "https:", "//", "<script", "<link", "<img", "src=", "url(", "@import", "xlink"] {
            assert!(!page.contains(outside), "{outside}");
        }
        // Each chart has words and numbers.
        let charts = page.matches("role=\"img\"").count();
        assert_eq!(charts, page.matches(" aria-label=\"").count());
        assert_eq!(page.matches("<figure>").count(), page.matches("<details>").count());
        assert!(!page.contains("NaN") && !page.contains("inf "));
    }
}

#[test]
fn what_is_missing_names_the_command_that_makes_it() {
    let bare = page(&fixture(), None, None);
    assert!(
        bare.contains("flashlm-prep train RECORDING -o DIR") && bare.contains("flashlm-prep order RECORDING -o DIR")
    );
    assert!(!full_page().contains("class=\"missing\""));
}

#[test]
fn the_same_inputs_give_the_same_page() {
    assert_eq!(full_page(), full_page());
}

#[test]
fn sparsity_is_what_the_bits_say() {
    let recording = fixture();
    let rows = rows(&full_page(), "sparsity");
    assert_eq!(rows.len(), 2);
    for (at, row) in rows.iter().enumerate() {
        let bits = bits(&recording.layer(at).unwrap());
        let neurons = bits[0].len();
        let active: usize = bits.iter().flatten().filter(|b| **b).count();
        let mut sizes: Vec<usize> = bits.iter().map(|t| t.iter().filter(|b| **b).count()).collect();
        sizes.sort_unstable();
        let never = (0..neurons).filter(|&n| bits.iter().all(|t| !t[n])).count();
        let expected = [
            at.to_string(),
            percent_of(active as f64 / (bits.len() * neurons) as f64),
            percent_of(sizes[bits.len() * 99 / 100] as f64 / neurons as f64),
            never.to_string(),
        ];
        assert_eq!(row[..], expected);
    }
}

#[test]
fn reuse_and_unions_are_what_the_bits_say() {
    let recording = fixture();
    let rows = rows(&full_page(), "reuse");
    for at in 0..2 {
        let bits = bits(&recording.layer(at).unwrap());
        let neurons = bits[0].len();
        for k in 1..=8 {
            let (mut new, mut active, mut union, mut spans) = (0, 0, 0, 0);
            for sequence in recording.sequences() {
                for t in sequence.clone() {
                    if t >= sequence.start + k {
                        active += (0..neurons).filter(|&n| bits[t][n]).count();
                        new += (0..neurons).filter(|&n| bits[t][n] && !(t - k..t).any(|p| bits[p][n])).count();
                    }
                    if t + 1 >= sequence.start + k {
                        spans += neurons;
                        union += (0..neurons).filter(|&n| (t + 1 - k..=t).any(|p| bits[p][n])).count();
                    }
                }
            }
            assert_eq!(rows[at][k], percent_of(new as f64 / active as f64), "layer {at}, window {k}");
            assert_eq!(rows[2 + at][k], percent_of(union as f64 / spans as f64), "union, layer {at}, window {k}");
        }
    }
}

#[test]
fn runs_are_what_the_bits_say() {
    let recording = fixture();
    let rows = rows(&full_page(), "runs");
    assert_eq!(rows.len(), 2 * 3 + 3);
    for at in 0..2 {
        let bits = bits(&recording.layer(at).unwrap());
        let (mut runs, mut active) = (0, 0);
        for token in &bits {
            active += token.iter().filter(|b| **b).count();
            runs += (0..token.len()).filter(|&n| token[n] && (n == 0 || !token[n - 1])).count();
        }
        let mean = format!("{:.3}", active as f64 / runs as f64);
        assert_eq!(rows[3 * at][1..3], ["identity".to_string(), mean.clone()]);
        // The chosen order is identity reversed: the runs are the same.
        assert_eq!(rows[3 * at + 2][1..3], ["chosen (path)".to_string(), mean]);
        assert_eq!(rows[3 * at][3], "100.0 %");
    }
}

#[test]
fn predictors_and_budget_are_what_was_given() {
    let page = full_page();
    let rows_of = rows(&page, "predictors");
    assert_eq!(rows_of[0][..7], ["0", "16", "int8", "20 kB", "1.91 %", "0", "4.25 %"]);
    assert!(page.contains("At the chosen points 4.00\u{a0}% are missed and 2.00\u{a0}% fetched for nothing"));
    let budget = rows(&page, "budget");
    assert_eq!(budget.len(), measures::CACHE_PERCENT.len());
    // Two layers of 256 groups of 4096 bytes.
    assert_eq!(budget[10][..2], ["100 %", "2.1"]);
    // Nothing cached: the bytes of all groups of active neurons are read at least.
    let recording = fixture();
    let mut groups = 0;
    let tokens = recording.tokens().len();
    for at in 0..2 {
        for token in &bits(&recording.layer(at).unwrap())[tokens / 2..] {
            groups += token.chunks(4).filter(|group| group.contains(&true)).count();
        }
    }
    let least = groups as f64 * 4.096 / (tokens - tokens / 2) as f64;
    let read: f64 = budget[0][3].parse().unwrap();
    assert!(read >= least - 0.1 && read < 4.0 * least, "{read} kB read, {least} kB wanted");
}

#[test]
fn files_of_another_kind_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let missing: PathBuf = dir.path().join("nowhere");
    assert!(matches!(TrainReport::read(&missing), Err(TrainReportError::Io { .. })));
    std::fs::write(dir.path().join("orders.json"), "{\"layers\": []}").unwrap();
    assert!(matches!(Orders::read(dir.path()), Err(OrderFileError::Json { .. })));
    let mut stray = predictors(dir.path());
    stray.layers[1].layer = 99;
    let recording = fixture();
    let input = ReportInput {
        info: recording.info(),
        verdict: |_| String::new(),
        predictors: Some(&stray),
        orders: None,
        disk: None,
        made: None,
    };
    let layers = measure_all(&recording, None, &input, 1, &|| ()).unwrap();
    assert!(matches!(Report::new(&input, &layers), Err(ReportError::NoSuchLayer { layer: 99, layers: 8 })));
}

#[test]
fn layers_may_be_measured_one_by_one_and_kept_as_json() {
    let (recording, dir) = (fixture(), tempfile::tempdir().unwrap());
    let orders = orders(dir.path(), &recording);
    let made = Made { model: "me/<model>".into(), command: "flashlm-prep prepare".into(), date: "2026-12-01".into() };
    let input = ReportInput {
        info: recording.info(),
        verdict: |_| String::new(),
        predictors: None,
        orders: Some(orders.summary()),
        disk: None,
        made: Some(&made),
    };
    let storage = storage(&input).unwrap().0;
    let one_by_one = (0..2).map(|layer| {
        let order = orders.layer(layer, recording.info().model.ffn().size).unwrap().unwrap();
        let measured = measure_layer(&recording, layer, &order, &storage).unwrap();
        serde_json::from_slice(&serde_json::to_vec(&measured).unwrap()).unwrap()
    });
    let one_by_one: Vec<LayerMeasures> = one_by_one.collect();
    let at_once = measure_all(&recording, Some(&orders), &input, SAMPLE_TOKENS, &|| ()).unwrap();
    // Of two recorded layers the second is the middle, of eight the fifth: nothing but the matrix differs.
    let page = |layers: &[LayerMeasures]| Report::new(&input, layers).unwrap().page();
    let (one_by_one, at_once) = (page(&one_by_one), page(&at_once));
    for id in ["sparsity", "frequency", "reuse", "runs", "budget"] {
        assert_eq!(rows(&one_by_one, id), rows(&at_once, id), "{id}");
    }
    assert!(one_by_one.contains("me/&lt;model&gt;") && one_by_one.contains("on 2026-12-01 by flashlm-prep"));
}

/// The cells of a CSV below its head, none of which needs quotes.
fn csv_rows(dir: &Path, name: &str) -> Vec<Vec<String>> {
    let text = std::fs::read_to_string(dir.join(name).with_extension("csv")).unwrap();
    text.lines().skip(1).map(|line| line.split(',').map(String::from).collect()).collect()
}

#[test]
fn charts_are_written_with_the_numbers_that_they_show() {
    let (dir, report, recording) = (tempfile::tempdir().unwrap(), full_report(), fixture());
    report.write_data(dir.path()).unwrap();
    let list: serde_json::Value =
        serde_json::from_slice(&std::fs::read(dir.path().join("report.json")).unwrap()).unwrap();
    let names: Vec<&str> = list["charts"].as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()).collect();
    assert_eq!(names, data::CHARTS);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1 + 2 * names.len());
    let page = report.page();
    for name in names {
        let svg = std::fs::read_to_string(dir.path().join(name).with_extension("svg")).unwrap();
        assert_well_formed(&svg);
        // What is drawn in the page is what is drawn in the file.
        let (_, drawn) = svg.split_once("</rect>").unwrap();
        assert!(page.contains(drawn.trim_end()), "{name}");
        assert!(svg.contains("xmlns=") && !svg.contains("var(") && !svg.contains("url("), "{name}");
    }

    let sparsity = csv_rows(dir.path(), "sparsity");
    let reuse = csv_rows(dir.path(), "reuse-new");
    for (at, row) in sparsity.iter().enumerate() {
        let bits = bits(&recording.layer(at).unwrap());
        let active = bits.iter().flatten().filter(|b| **b).count() as f64 / (bits.len() * bits[0].len()) as f64;
        assert_eq!(row[0], at.to_string());
        assert!((row[1].parse::<f64>().unwrap() - 100.0 * active).abs() < 1e-9);
        // As the page rounds them.
        let shown = &rows(&page, "reuse")[at][1..];
        let of_layer = reuse.iter().filter(|row| row[0] == format!("layer {at}"));
        let numbers: Vec<String> = of_layer.map(|row| percent_of(row[2].parse::<f64>().unwrap() / 100.0)).collect();
        assert_eq!(numbers, shown);
    }
    let budget = csv_rows(dir.path(), "budget");
    let shown = rows(&page, "budget");
    assert_eq!(budget.len(), 3 * measures::CACHE_PERCENT.len());
    for (size, cells) in shown.iter().enumerate() {
        for (order, name) in ["identity", "frequency", "chosen"].into_iter().enumerate() {
            let row = &budget[order * measures::CACHE_PERCENT.len() + size];
            assert_eq!((row[0].as_str(), row[3].as_str()), (name, "false"));
            assert_eq!(format!("{:.3}", row[2].parse::<f64>().unwrap()), cells[2 + 2 * order]);
        }
    }
    let errors = csv_rows(dir.path(), "predictor-errors");
    assert_eq!(
        errors.iter().filter(|row| row[3] == "true").map(|row| row[2].as_str()).collect::<Vec<_>>(),
        ["4.25", "3.75"]
    );
    assert_eq!(csv_rows(dir.path(), "coactivation-before").len(), 128 * 128);
}

#[test]
fn charts_of_an_earlier_report_do_not_stay() {
    let dir = tempfile::tempdir().unwrap();
    full_report().write_data(dir.path()).unwrap();
    std::fs::write(dir.path().join("my.csv"), "mine").unwrap();
    report(&fixture(), None, None).write_data(dir.path()).unwrap();
    assert!(!dir.path().join("predictor-errors.svg").exists() && !dir.path().join("predictor-recall.csv").exists());
    assert!(dir.path().join("my.csv").exists() && dir.path().join("budget.csv").exists());
}
