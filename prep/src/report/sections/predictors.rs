//! The section on predictors.

use flashlm_formats::predictors::{LayerReport, OperatingPoint, PredictorForm};

use super::super::chart::{Axis, Series, lines};
use super::super::html::{Figure, Section, Table, missing, paragraph};
use super::super::{Facts, ReportError};
use super::{bytes, mean, percent, plain, some_layers};

/// One sentence for the summary.
pub(super) fn in_short(all: &Facts) -> Option<String> {
    let layers = &all.input.predictors?.layers;
    let of = |f: fn(&OperatingPoint) -> f64| mean(layers.iter().map(|l| f(l.judged())));
    let size: u64 = layers.iter().map(|l| l.bytes).sum();
    let ffn: u64 = layers.iter().map(|l| l.ffn_bytes).sum();
    Some(format!(
        "{} ({} of the feed-forward weights) miss {} of the active neurons and fetch {} of the inactive ones: {} of a layer is \
         predicted",
        bytes(size as f64),
        percent(size as f64 / ffn.max(1) as f64),
        percent(of(|p| p.false_negative_rate)),
        percent(of(|p| p.false_positive_rate)),
        percent(of(|p| p.predicted_fraction))
    ))
}

pub(super) fn section(all: &Facts) -> Result<Section, ReportError> {
    let section =
        |text, figures| Section { id: "predictors", name: "Predictors", heading: "Predictors", text, figures };
    let Some(predictors) = all.input.predictors.filter(|p| !p.layers.is_empty()) else {
        let text = missing(
            "There are no predictors here. This command trains them; then give DIR to this one with --predictors:",
            "flashlm-prep train RECORDING -o DIR",
        );
        return Ok(section(text, Vec::new()));
    };
    let layers = &predictors.layers;
    let of = |f: fn(&OperatingPoint) -> f64| mean(layers.iter().map(|l| f(l.judged())));
    let (misses, alarms) = (of(|p| p.false_negative_rate), of(|p| p.false_positive_rate));
    let (predicted, active) = (of(|p| p.predicted_fraction), of(|p| p.active_fraction));
    let note = some_layers(layers.len());
    let recall = curves(
        "predictor-recall",
        layers,
        ["predicted neurons (% of the layer)", "active neurons found (%)"],
        |p| (100.0 * p.predicted_fraction, 100.0 * (1.0 - p.false_negative_rate)),
        format!(
            "Predicting {} of a layer finds {} of its active neurons; {} are active",
            percent(predicted),
            percent(1.0 - misses),
            percent(active)
        ),
        format!(
            "Every threshold of a layer's predictor is a point of its curve; the dot is the chosen one. Upper left is better.{note}"
        ),
        table(layers),
    )?;
    let errors = curves(
        "predictor-errors",
        layers,
        ["false positives (% of the inactive)", "false negatives (% of the active)"],
        |p| (100.0 * p.false_positive_rate, 100.0 * p.false_negative_rate),
        format!("At the chosen points {} are missed and {} fetched for nothing", percent(misses), percent(alarms)),
        format!(
            "False negatives cost quality, false positives cost reads; means over layers. Missed neurons are weak ones: {} of the \
             energy is kept. Lower left is better.{note}",
            percent(of(|p| p.energy_recall))
        ),
        points_table(layers),
    )?;
    let own = all.input.info.id == predictors.recording;
    let validated = layers.iter().all(|l| l.validation.is_some());
    let source = match (validated, own) {
        (true, _) => "Measured on a recording of other text than the predictors were trained on.",
        (false, true) => "Measured on documents of this recording that were held out of the training.",
        (false, false) => "Trained on another recording, and measured on documents held out of it.",
    };
    Ok(section(paragraph(source), vec![recall, errors]))
}

fn curves(
    name: &'static str,
    layers: &[LayerReport],
    [x, y]: [&str; 2],
    of: fn(&OperatingPoint) -> (f64, f64),
    title: String,
    text: String,
    table: Table,
) -> Result<Figure, ReportError> {
    let series: Vec<Series> = layers
        .iter()
        .map(|layer| {
            let mut points: Vec<(f64, f64)> = layer.stored_curve().iter().map(of).collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            Series { name: format!("layer {}", layer.layer), points, marks: vec![of(layer.judged())] }
        })
        .collect();
    let all = || series.iter().flat_map(|s| s.points.iter().chain(&s.marks));
    let most = |values: &dyn Fn(&(f64, f64)) -> f64| all().map(values).fold(0.0, f64::max);
    let least = all().map(|p| p.1).fold(100.0, f64::min);
    let x = Axis::from_zero(x, most(&|p| p.0), plain);
    // Recall begins where there is something to see.
    let y = match least {
        least if least > 50.0 => Axis::between(y, least.floor() - 1.0, 100.0, 7, plain),
        _ => Axis::from_zero(y, most(&|p| p.1), plain),
    };
    let alt = format!(
        "Curves of {} against {}, one for each layer, with the chosen points marked. {title}.",
        y.label, x.label
    );
    let charts = vec![(String::new(), lines(name, &x, &y, &series, alt)?)];
    Ok(Figure { title, text, charts, table })
}

fn table(layers: &[LayerReport]) -> Table {
    let head = [
        "layer",
        "rank",
        "stored as",
        "size",
        "of the FFN",
        "neurons without a row",
        "missed",
        "false alarms",
        "predicted",
        "active",
        "energy kept",
    ];
    let mut table = Table::new(head);
    for layer in layers {
        let p = layer.judged();
        table.row([
            layer.layer.to_string(),
            match layer.form() {
                PredictorForm::LowRank(rank) => rank.to_string(),
                PredictorForm::Projection(_) => "projection".into(),
            },
            layer.dtype.name().into(),
            bytes(layer.bytes as f64),
            percent(layer.bytes as f64 / layer.ffn_bytes.max(1) as f64),
            layer.rows.map_or(0, |rows| layer.neurons.saturating_sub(rows)).to_string(),
            percent(p.false_negative_rate),
            percent(p.false_positive_rate),
            percent(p.predicted_fraction),
            percent(p.active_fraction),
            percent(p.energy_recall),
        ]);
    }
    table
}

fn points_table(layers: &[LayerReport]) -> Table {
    let mut table = Table::new(["layer", "missed", "false alarms", "predicted", "energy kept"]);
    for layer in layers {
        for p in layer.stored_curve() {
            table.row([
                layer.layer.to_string(),
                percent(p.false_negative_rate),
                percent(p.false_positive_rate),
                percent(p.predicted_fraction),
                percent(p.energy_recall),
            ]);
        }
    }
    table
}
