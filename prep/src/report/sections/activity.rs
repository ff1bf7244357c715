//! Sections on the activity alone: sparsity, frequency, reuse.

use maud::Markup;

use super::super::chart::{Axis, Series, bars, lines};
use super::super::html::{Figure, Section, Table};
use super::super::measures::WINDOWS;
use super::super::{Facts, ReportError};
use super::{mean, percent, plain, some_layers};
use crate::coactivation::{LayerActivity, WindowReuse};

/// Points of a frequency curve.
const CURVE_POINTS: usize = 160;
/// The window that titles speak of, in tokens.
const TYPICAL_WINDOW: usize = 4;

pub(super) fn sparsity(all: &Facts) -> Result<Section, ReportError> {
    let values: Vec<(usize, f64)> = all.layers.iter().map(|l| (l.layer, 100.0 * l.active_fraction)).collect();
    let by_value = |a: &&(usize, f64), b: &&(usize, f64)| a.1.total_cmp(&b.1);
    let least = values.iter().min_by(by_value).copied().unwrap_or_default();
    let most = values.iter().max_by(by_value).copied().unwrap_or_default();
    let mut table = Table::new(["layer", "active", "99th percentile of tokens", "never active"]);
    for layer in all.layers {
        let neurons = layer.activity.neurons as f64;
        table.row([
            layer.layer.to_string(),
            percent(layer.active_fraction),
            percent(layer.activity.active_p99 as f64 / neurons),
            layer.rates.iter().filter(|&&r| r == 0.0).count().to_string(),
        ]);
    }
    let title = format!(
        "A token uses {} of the neurons in layer {} and {} in layer {}",
        percent(least.1 / 100.0),
        least.0,
        percent(most.1 / 100.0),
        most.0
    );
    let alt = format!("Bars of the share of active neurons for each layer. {title}.");
    let figure = Figure {
        text: "Share of a layer's neurons that are active at a token, on average over all recorded tokens. The rest need not \
               be read."
            .into(),
        charts: vec![(
            String::new(),
            bars("sparsity", "layer", &Axis::from_zero("active neurons (%)", most.1, plain), &values, alt)?,
        )],
        title,
        table,
    };
    Ok(section("sparsity", "Sparsity", "Sparsity per layer", vec![figure]))
}

pub(super) fn frequency(all: &Facts) -> Result<Section, ReportError> {
    // In percent.
    let least = 100.0 / all.input.info.tokens as f64;
    let floor = least.log10().floor().max(-4.0);
    let series: Vec<Series> = all
        .layers
        .iter()
        .map(|layer| {
            let neurons = layer.rates.len();
            let point = |at: usize| {
                let rank = at * (neurons - 1) / (CURVE_POINTS - 1);
                let rate = 100.0 * layer.rates[rank];
                (rate > 0.0).then_some((100.0 * rank as f64 / neurons as f64, rate))
            };
            let points = (0..CURVE_POINTS).filter_map(point).collect();
            Series { name: format!("layer {}", layer.layer), points, marks: Vec::new() }
        })
        .collect();
    let x = Axis::between("neurons, hottest first (%)", 0.0, 100.0, 6, plain);
    let decades = (2.0 - floor) as usize + 1;
    let y = Axis { is_logarithmic: true, ..Axis::between("fires at (% of tokens)", floor, 2.0, decades, power) };
    let hottest = mean(all.layers.iter().map(|l| l.activity.hottest_share[2]));
    let title = format!("The hottest tenth of a layer's neurons does {} of its firing", percent(hottest));
    let alt =
        format!("Falling curves of firing rate against rank on a logarithmic scale, one for each layer. {title}.");
    let head =
        LayerActivity::HOTTEST.iter().flat_map(|p| [format!("top {p} %: share of firing"), format!("rate at {p} %")]);
    let mut table = Table::new(["layer".to_string()].into_iter().chain(head));
    for layer in all.layers {
        let a = &layer.activity;
        let cells =
            a.hottest_share.iter().zip(a.rate_at_rank).flat_map(|(&share, rate)| [percent(share), percent(rate)]);
        table.row([layer.layer.to_string()].into_iter().chain(cells));
    }
    let figure = Figure {
        title,
        text: format!(
            "How often each neuron fires, sorted. Neurons far to the left are worth keeping in memory; the long tail is read when \
             needed.{}",
            some_layers(all.layers.len())
        ),
        charts: vec![(String::new(), lines("frequency", &x, &y, &series, alt)?)],
        table,
    };
    Ok(section("frequency", "Frequency", "How often neurons fire", vec![figure]))
}

pub(super) fn reuse(all: &Facts) -> Result<Section, ReportError> {
    let new = windows(
        all,
        "reuse-new",
        "not in the last k tokens (%)",
        |w| w.new_fraction,
        |mean| {
            format!(
                "{} of a token's active neurons were not active at any of the last {TYPICAL_WINDOW} tokens",
                percent(mean)
            )
        },
        "A cache that keeps the active neurons of the last k tokens reads these for the next one.",
    )?;
    let union = windows(
        all,
        "reuse-union",
        "active at any of k tokens (%)",
        |w| w.union_fraction,
        |mean| format!("{TYPICAL_WINDOW} successive tokens together use {} of a layer", percent(mean)),
        "This is what such a cache holds: the price in memory for reading less.",
    )?;
    Ok(section("reuse", "Reuse", "Reuse from token to token", vec![new, union]))
}

fn windows(
    all: &Facts,
    name: &'static str,
    axis: &str,
    of: fn(&WindowReuse) -> f64,
    title: impl Fn(f64) -> String,
    text: &str,
) -> Result<Figure, ReportError> {
    let curve = |windows: &[WindowReuse]| windows.iter().map(|w| (w.tokens as f64, 100.0 * of(w))).collect();
    let series: Vec<Series> = all
        .layers
        .iter()
        .map(|l| Series { name: format!("layer {}", l.layer), points: curve(&l.activity.windows), marks: Vec::new() })
        .collect();
    let most = series.iter().flat_map(|s| &s.points).fold(0.0, |most: f64, p| most.max(p.1));
    let x = Axis::between("window k (tokens)", 1.0, WINDOWS as f64, WINDOWS, plain);
    let typical = mean(all.layers.iter().map(|l| of(&l.activity.windows[TYPICAL_WINDOW - 1])));
    let title = title(typical);
    let alt = format!("Curves over windows of 1 to {WINDOWS} tokens, one for each layer. {title}.");
    let mut table = Table::new(["layer".to_string()].into_iter().chain((1..=WINDOWS).map(|k| format!("k = {k}"))));
    for layer in all.layers {
        let cells = layer.activity.windows.iter().map(|w| percent(of(w)));
        table.row([layer.layer.to_string()].into_iter().chain(cells));
    }
    Ok(Figure {
        title,
        text: format!("{text} Mean over layers.{}", some_layers(all.layers.len())),
        charts: vec![(String::new(), lines(name, &x, &Axis::from_zero(axis, most, plain), &series, alt)?)],
        table,
    })
}

/// A power of ten, written out.
fn power(exponent: f64) -> String {
    let decimals = (-exponent).round().max(0.0) as usize;
    format!("{:.decimals$}", 10f64.powf(exponent))
}

fn section(id: &'static str, name: &'static str, heading: &'static str, figures: Vec<Figure>) -> Section {
    Section { id, name, heading, text: Markup::default(), figures }
}
