//! Sections on the storage order: co-activation, runs, time against memory.

use flashlm::cache::PolicyKind;
use maud::{Markup, html};

use super::super::chart::{Axis, Cells, Series, heat_map, lines};
use super::super::html::{Figure, Section, Table, missing, paragraph};
use super::super::measures::{CACHE_PERCENT, LayerMeasures, Matrix, OrderMeasures, RunLengths};
use super::super::{Facts, ReportError};
use super::{bytes, fine_percent, mean, percent, plain};

/// Where the title of the budget looks, as an index of [`CACHE_PERCENT`].
const TYPICAL_CACHE: usize = 4;
/// Run lengths in the table.
const RUNS_SHOWN: [usize; 7] = [1, 2, 3, 4, 8, 16, 32];
/// Rows and columns of a matrix in its table.
const TABLE_BINS: usize = 16;

/// The orders that every layer has, by place in [`LayerMeasures::orders`].
fn orders_everywhere(layers: &[LayerMeasures]) -> Vec<(usize, &str)> {
    let fewest = layers.iter().map(|l| l.orders.len()).min().unwrap_or(0);
    layers.first().map_or(Vec::new(), |l| l.orders[..fewest].iter().map(|o| o.name.as_str()).enumerate().collect())
}

/// Sums the layers' times and bytes at each size of the cache.
fn sum(layers: &[LayerMeasures], order: usize, of: fn(&OrderMeasures) -> &[f64]) -> Vec<f64> {
    let at = |size: usize| layers.iter().map(|l| of(&l.orders[order])[size]).sum();
    (0..CACHE_PERCENT.len()).map(at).collect()
}

/// The cache of all recorded layers at each size, in MB.
fn cache_mb(all: &Facts) -> Vec<f64> {
    let groups = (all.input.info.model.ffn().size as u64).div_ceil(all.storage.records_per_group as u64);
    let bytes = |percent: u32| groups * percent as u64 / 100 * all.storage.group_bytes * all.layers.len() as u64;
    CACHE_PERCENT.iter().map(|&percent| bytes(percent) as f64 / 1e6).collect()
}

/// One sentence for the summary.
pub(super) fn in_short(all: &Facts) -> String {
    let orders = orders_everywhere(all.layers);
    let (best, name) = orders[orders.len() - 1];
    let at = |order| sum(all.layers, order, |o| &o.ms_per_token)[TYPICAL_CACHE];
    format!(
        "{:.2} ms a token in {name} order with a neuron cache of {} % of the layers, {:.2} ms in the checkpoint's order; predicted by \
         a replay for {}",
        at(best),
        CACHE_PERCENT[TYPICAL_CACHE],
        at(0),
        all.cost_source
    )
}

fn no_orders(all: &Facts) -> Markup {
    if orders_everywhere(all.layers).len() > 2 {
        return Markup::default();
    }
    missing(
        "There is no chosen order for every layer here; the frequency order takes its place. This command makes orders; then give \
         DIR to this one with --orders:",
        "flashlm-prep order RECORDING -o DIR",
    )
}

/// What is to be said of the tokens that the orders are judged on.
fn seen_before(all: &Facts) -> &'static str {
    let own = all.input.orders.is_some_and(|orders| orders.recording == all.input.info.id);
    if own {
        "Counted on held-out documents: the chosen order was made from the others of this recording. "
    } else {
        ""
    }
}

pub(super) fn coactivation(all: &Facts) -> Result<Section, ReportError> {
    let section = |figures| Section {
        id: "coactivation",
        name: "Co-activation",
        heading: "Which neurons fire together",
        text: no_orders(all),
        figures,
    };
    let Some(layer) = all.layers.iter().find(|l| l.layer == all.matrix_layer) else { return Ok(section(Vec::new())) };
    let (before, after) = (&layer.orders[0], &layer.orders[layer.orders.len() - 1]);
    let (Some(first), Some(second)) = (&before.matrix, &after.matrix) else { return Ok(section(Vec::new())) };
    let mut shares: Vec<f64> =
        [first, second].iter().flat_map(|m| m.together.iter().flatten().copied()).filter(|&s| s > 0.0).collect();
    shares.sort_by(f64::total_cmp);
    let at = |share: f64| shares.get((shares.len() as f64 * share) as usize).copied().unwrap_or(1.0);
    let (low, high) = (at(0.05), at(0.995).max(at(0.05) * 1.01));
    let times = second.neighbours / first.neighbours.max(f64::MIN_POSITIVE);
    let title = format!(
        "Layer {}: neighbours fire together {} times as often in {} order, at {} of the tokens instead of {}",
        layer.layer,
        if times < 9.95 { format!("{times:.1}") } else { format!("{times:.0}") },
        after.name,
        fine_percent(second.neighbours),
        fine_percent(first.neighbours)
    );
    let draw = |file: &'static str, matrix: &Matrix, name: &str| {
        let alt = format!(
            "Heat map of how often pairs of neurons of layer {} fire together, {name} order. Neighbours fire together at {} of the tokens.",
            layer.layer,
            fine_percent(matrix.neighbours)
        );
        let cells = Cells {
            shares: &matrix.together,
            neurons: matrix.neurons,
            range: (low, high),
            what: "share of tokens with both",
            format: fine_percent,
        };
        heat_map(file, &cells, "position in storage (neurons)", alt)
    };
    let mut head = vec!["order, from neuron".to_string()];
    let starts = |matrix: &Matrix| -> Vec<usize> {
        let bins = matrix.together.len().min(TABLE_BINS);
        (0..bins).map(|b| b * matrix.neurons / bins).collect()
    };
    head.extend(starts(first).iter().map(|s| s.to_string()));
    let mut table = Table::new(head);
    for (order, matrix) in [(before, first), (after, second)] {
        for (start, row) in starts(matrix).iter().zip(coarse(matrix)) {
            table.row([format!("{}, {start}", order.name)].into_iter().chain(row.into_iter().map(fine_percent)));
        }
    }
    let bins = first.together.len();
    let figure = Figure {
        title,
        text: format!(
            "Each cell is a pair of {bins} x {bins} bins of neurons that lie together; its colour says how often a neuron of one and \
             a neuron of the other fire at the same token. A strong diagonal means that neurons needed together lie together; \
             empty rows are neurons that never fire. \
             {}The table has the matrix in {TABLE_BINS} x {TABLE_BINS} bins.",
            seen_before(all)
        ),
        charts: vec![
            ("Before: the checkpoint's order".into(), draw("coactivation-before", first, &before.name)?),
            (
                format!("After: {} order ({})", after.name, after.strategy),
                draw("coactivation-after", second, &after.name)?,
            ),
        ],
        table,
    };
    Ok(section(vec![figure]))
}

/// The matrix in few bins, for its table.
fn coarse(matrix: &Matrix) -> Vec<Vec<f64>> {
    let bins = matrix.together.len();
    let coarse = bins.min(TABLE_BINS);
    let range = |at: usize| at * bins / coarse..(at + 1) * bins / coarse;
    let cell =
        |row: usize, column: usize| mean(range(row).flat_map(|r| matrix.together[r][range(column)].iter().copied()));
    (0..coarse).map(|row| (0..coarse).map(|column| cell(row, column)).collect()).collect()
}

pub(super) fn runs(all: &Facts) -> Result<Section, ReportError> {
    let orders = orders_everywhere(all.layers);
    let pooled: Vec<RunLengths> = orders
        .iter()
        .map(|&(at, _)| {
            let mut sum = RunLengths::default();
            all.layers.iter().for_each(|l| sum.add(&l.orders[at].runs));
            sum
        })
        .collect();
    let longest = (2..48).find(|&length| pooled.iter().all(|runs| runs.share_from(length) < 0.01)).unwrap_or(48).max(6);
    let series: Vec<Series> = orders
        .iter()
        .zip(&pooled)
        .map(|(&(_, name), runs)| Series {
            name: name.into(),
            points: (1..=longest).map(|length| (length as f64, 100.0 * runs.share_from(length))).collect(),
            marks: Vec::new(),
        })
        .collect();
    let (first, last) = (pooled[0].mean(), pooled[pooled.len() - 1].mean());
    let title = format!(
        "A run of adjacent active neurons has {last:.2} of them in {} order and {first:.2} in the checkpoint's",
        orders[orders.len() - 1].1
    );
    let alt = format!(
        "Falling curves of the share of active neurons in runs of a length or longer, one for each order. {title}."
    );
    let x = Axis::between("run length (neurons)", 1.0, longest as f64, 8, plain);
    let y = Axis::between("active neurons in such runs (%)", 0.0, 100.0, 6, plain);
    let head = ["layer", "order", "mean run"].map(String::from).into_iter();
    let mut table = Table::new(head.chain(RUNS_SHOWN.iter().map(|length| format!("in runs of {length}+"))));
    let mut row = |layer: String, order: String, runs: &RunLengths| {
        let shares = RUNS_SHOWN.iter().map(|&length| percent(runs.share_from(length)));
        table.row([layer, order, format!("{:.3}", runs.mean())].into_iter().chain(shares));
    };
    for layer in all.layers {
        for order in &layer.orders {
            let name = if order.name == order.strategy {
                order.name.clone()
            } else {
                format!("{} ({})", order.name, order.strategy)
            };
            row(layer.layer.to_string(), name, &order.runs);
        }
    }
    for (&(_, name), runs) in orders.iter().zip(&pooled) {
        row("all".into(), name.into(), runs);
    }
    let figure = Figure {
        title,
        text: format!(
            "A run is read in one request. The curves say which share of a token's active neurons lies in runs of that length or \
             longer, nothing cached and no gap read, over all layers. {}The frequency order is taken from this recording.",
            seen_before(all)
        ),
        charts: vec![(String::new(), lines("runs", &x, &y, &series, alt)?)],
        table,
    };
    let (id, heading) = ("runs", "Runs in storage order");
    Ok(Section { id, name: "Runs", heading, text: no_orders(all), figures: vec![figure] })
}

pub(super) fn budget(all: &Facts) -> Result<Section, ReportError> {
    let orders = orders_everywhere(all.layers);
    let mb = cache_mb(all);
    let times: Vec<Vec<f64>> = orders.iter().map(|&(at, _)| sum(all.layers, at, |o| &o.ms_per_token)).collect();
    let read: Vec<Vec<f64>> = orders.iter().map(|&(at, _)| sum(all.layers, at, |o| &o.bytes_per_token)).collect();
    let series: Vec<Series> = orders
        .iter()
        .zip(&times)
        .map(|(&(_, name), ms)| Series {
            name: name.into(),
            points: mb.iter().copied().zip(ms.iter().copied()).collect(),
            marks: Vec::new(),
        })
        .collect();
    let most = times.iter().flatten().copied().fold(0.0, f64::max);
    let last = orders.len() - 1;
    let title = format!(
        "With {} of neurons cached, a token waits {:.2} ms for reads in {} order and {:.2} ms in the checkpoint's",
        bytes(mb[TYPICAL_CACHE] * 1e6),
        times[last][TYPICAL_CACHE],
        orders[last].1,
        times[0][TYPICAL_CACHE]
    );
    let alt =
        format!("Falling curves of predicted milliseconds per token against the size of the neuron cache. {title}.");
    let x = Axis {
        ticks: 6,
        to: mb[mb.len() - 1].max(f64::MIN_POSITIVE),
        ..Axis::from_zero("neuron cache (MB)", 1.0, plain)
    };
    let y = Axis::from_zero("reading (ms per token)", most, plain);
    let mut table = Table::new(["cache".to_string(), "MB".into()].into_iter().chain(
        orders.iter().flat_map(|&(_, name)| [format!("{name}: ms per token"), format!("{name}: kB per token")]),
    ));
    for (size, percent) in CACHE_PERCENT.iter().enumerate() {
        let cells = times
            .iter()
            .zip(&read)
            .flat_map(|(ms, read)| [format!("{:.3}", ms[size]), format!("{:.1}", read[size] / 1e3)]);
        table.row([format!("{percent} %"), format!("{:.1}", mb[size])].into_iter().chain(cells));
    }
    let cost = &all.storage.cost;
    let figure = Figure {
        title,
        text: "Time for reading alone, over all recorded layers; computing is not included. The cache is divided equally among the layers.".into(),
        charts: vec![(String::new(), lines("budget", &x, &y, &series, alt)?)],
        table,
    };
    let note = format!(
        "This is a prediction. The recorded active neurons are replayed through the runtime's cache ({}) and read planner, as if \
         predictors made no mistakes; the first half of the tokens fills the cache and is not counted. Groups of {} neurons take {} bytes. A \
         read costs {:.1} \u{b5}s and {:.2} GB/s, from {}. {}",
        PolicyKind::DEFAULT,
        all.storage.records_per_group,
        all.storage.group_bytes,
        cost.request_ns() / 1e3,
        1.0 / cost.byte_ns(),
        all.cost_source,
        seen_before(all)
    );
    let text = html! { (paragraph(note.trim_end())) (no_orders(all)) };
    let heading = "Time per token against memory";
    Ok(Section { id: "budget", name: "Memory budget", heading, text, figures: vec![figure] })
}
