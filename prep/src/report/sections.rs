//! What the page says, section by section. Titles are written from the figures, so that they hold for every model.

mod activity;
mod predictors;
mod storage;

use flashlm_formats::model::ModelSpec;
use maud::html;

use super::html::{Section, facts, paragraph};
use super::{Facts, Made, ReportError, WEIGHT_BYTES, chart};

/// All sections in order.
pub(super) fn all(facts: &Facts) -> Result<Vec<Section>, ReportError> {
    Ok(vec![
        summary(facts),
        activity::sparsity(facts)?,
        activity::frequency(facts)?,
        activity::reuse(facts)?,
        storage::coactivation(facts)?,
        storage::runs(facts)?,
        predictors::section(facts)?,
        storage::budget(facts)?,
    ])
}

/// The model in a few words.
pub(super) fn model_name(model: &ModelSpec) -> String {
    let gated = if model.ffn().gated { ", gated" } else { "" };
    format!("{} model, {} layers of {} neurons{gated}", model.family, model.layers.len(), model.ffn().size)
}

fn summary(all: &Facts) -> Section {
    let (info, model) = (all.input.info, &all.input.info.model);
    let layers = all.layers;
    let active = mean(layers.iter().map(|l| l.active_fraction));
    let ffn_bytes =
        (model.ffn().vectors() * model.hidden_size * model.ffn().size * WEIGHT_BYTES * model.layers.len()) as f64;
    let mut rows = vec![
        ("Model", format!("{}, hidden size {}", model_name(model), model.hidden_size)),
        (
            "Recorded",
            format!(
                "{} tokens in {} sequences of {} documents; {} of {} layers",
                info.tokens,
                info.sequences,
                info.documents,
                layers.len(),
                model.layers.len()
            ),
        ),
        ("Active neurons", format!("{} of a layer at a token, on average over tokens and layers", percent(active))),
        ("What that means", (all.input.verdict)(active)),
        (
            "Feed-forward weights",
            format!(
                "{} in all at 2 bytes a weight; a token needs {} of them",
                bytes(ffn_bytes),
                bytes(ffn_bytes * active)
            ),
        ),
    ];
    if let Some(made) = all.input.made {
        let Made { model, command, date } = made;
        let version = env!("CARGO_PKG_VERSION");
        rows.insert(0, ("Name", model.clone()));
        rows.insert(1, ("Made", format!("on {date} by flashlm-prep {version}: {command}")));
    }
    if let Some(text) = predictors::in_short(all) {
        rows.push(("Predictors", text));
    }
    rows.push(("Reading", storage::in_short(all)));
    let sampled = if all.sampled_tokens < info.tokens as usize {
        format!(
            "Sparsity and frequency are counted on all tokens. Reuse, runs and replays look at whole sequences of {} tokens in all, \
             spread evenly over the recording, or over what is held out of it where orders were made from the rest.",
            all.sampled_tokens
        )
    } else {
        "Everything is counted on all tokens of the recording.".into()
    };
    let text = html! { (facts(&rows)) (paragraph(&sampled)) };
    Section { id: "summary", name: "Summary", heading: "Summary", text, figures: Vec::new() }
}

fn some_layers(all: usize) -> &'static str {
    if all > chart::LINES_MAX { " Some layers are drawn, the table has them all." } else { "" }
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0u32), |(sum, count), v| (sum + v, count + 1));
    if count == 0 { 0.0 } else { sum / count as f64 }
}

/// A share as percent: one decimal from 10 % on, two below.
fn percent(share: f64) -> String {
    let value = 100.0 * share;
    if value >= 9.995 { format!("{value:.1} %") } else { format!("{value:.2} %") }
}

/// A share as percent, small ones with two digits that say something.
fn fine_percent(share: f64) -> String {
    let value = 100.0 * share;
    if value >= 0.095 || value <= 0.0 {
        return percent(share);
    }
    let decimals = ((1.0 - value.log10().floor()) as usize).min(8);
    format!("{value:.decimals$} %")
}

fn bytes(count: f64) -> String {
    match count {
        c if c >= 1e9 => format!("{:.2} GB", c / 1e9),
        c if c >= 1e6 => format!("{:.1} MB", c / 1e6),
        c => format!("{:.0} kB", c / 1e3),
    }
}

/// An axis' number: no more decimals than it needs.
fn plain(value: f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        assert_eq!(
            [0.0, 0.01234, 0.09994, 0.09996, 1.0].map(percent),
            ["0.00 %", "1.23 %", "9.99 %", "10.0 %", "100.0 %"]
        );
        assert_eq!([0.0, 0.00025, 0.0000213, 0.0039].map(fine_percent), ["0.00 %", "0.025 %", "0.0021 %", "0.39 %"]);
        assert_eq!([0.0, 0.5, 10.0, 2.25, 100.0].map(plain), ["0", "0.5", "10", "2.25", "100"]);
        assert_eq!([900e6, 3.2e9, 12e3].map(bytes), ["900.0 MB", "3.20 GB", "12 kB"]);
    }
}
