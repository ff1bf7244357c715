//! Heat maps: how much goes with what, in few steps.

use maud::html;

use super::axes::{MARGIN, axes, draw};
use super::colours::{SERIES, TEXT};
use super::picture::Numbers;
use super::{Axis, Chart};
use crate::report::ReportError;

/// Steps, the empty one included.
const LEVELS: u8 = 9;
/// Side of the map with its axes, and the height of the key below it.
const SIDE: (u32, u32) = (420, 400);
const KEY: u32 = 30;
/// Width of a step in the key.
const STEP: usize = 12;

/// The values of a heat map, and which of them are told apart.
pub(in crate::report) struct Cells<'a> {
    /// `shares[row][column]`, the first row at the bottom.
    pub(in crate::report) shares: &'a [Vec<f64>],
    /// Neurons that each side stands for.
    pub(in crate::report) neurons: usize,
    /// The shares with the faintest and the strongest colour.
    pub(in crate::report) range: (f64, f64),
    /// What a share is, for the numbers.
    pub(in crate::report) what: &'static str,
    pub(in crate::report) format: fn(f64) -> String,
}

/// A square of cells whose colours go in equal ratios; both axes count neurons.
pub(in crate::report) fn heat_map(
    name: &'static str,
    cells: &Cells,
    axis: &str,
    alt: String,
) -> Result<Chart, ReportError> {
    let (low, high) = cells.range;
    let mut numbers = Numbers::new(["row from neuron", "column from neuron", cells.what]);
    let bins = cells.shares.len().max(1);
    let start = |bin: usize| (bin * cells.neurons).div_ceil(bins).to_string();
    for (row, shares) in cells.shares.iter().enumerate() {
        for (column, share) in shares.iter().enumerate() {
            numbers.row([start(row), start(column), share.to_string()]);
        }
    }
    let levels: Vec<Vec<u8>> =
        cells.shares.iter().map(|row| row.iter().map(|&share| level(share, low, high)).collect()).collect();
    let side = Axis::between(axis, 0.0, cells.neurons as f64, 5, |v| format!("{v:.0}"));
    let colour = SERIES[0].hex();
    let opacity = |level: u8| format!("{:.3}", f64::from(level) / f64::from(LEVELS - 1));
    let key_row = SIDE.1 + 8;
    let content = draw((SIDE.0, SIDE.1 + KEY), |area| {
        let (map, _) = area.split_vertically(SIDE.1);
        let context = axes(&map, &side, &side, MARGIN + 14)?;
        let (columns, rows) = context.plotting_area().get_pixel_range();
        let scale = |span: &std::ops::Range<i32>| f64::from(span.end - span.start) / bins as f64;
        let place =
            format!("translate({} {}) scale({:.4} {:.4})", columns.start, rows.start, scale(&columns), scale(&rows));
        let paths = (1..LEVELS).map(|level| (level, cells_of(&levels, level)));
        let key = 110;
        Ok(html! {
            g fill=(colour) shape-rendering="crispEdges" transform=(place) {
                @for (level, path) in paths.filter(|(_, path)| !path.is_empty()) {
                    path fill-opacity=(opacity(level)) d=(path) {}
                }
            }
            g fill=(colour) {
                @for level in 1..LEVELS {
                    rect fill-opacity=(opacity(level)) x=(key + STEP * usize::from(level - 1)) y=(key_row)
                        width=(STEP) height="14" {}
                }
            }
            text x=(key - 6) y=(key_row + 12) font-size="12" text-anchor="end" fill=(TEXT.hex()) { ((cells.format)(low)) }
            text x=(key + STEP * usize::from(LEVELS - 1) + 6) y=(key_row + 12) font-size="12" fill=(TEXT.hex()) {
                ((cells.format)(high)) " of tokens, in equal ratios"
            }
        })
    })?;
    Ok(Chart { name, alt, size: (SIDE.0, SIDE.1 + KEY), content, numbers })
}

/// The step of a share, in equal ratios between two.
fn level(share: f64, low: f64, high: f64) -> u8 {
    let top = f64::from(LEVELS - 1);
    let along = (share / low).ln() / (high / low).ln();
    if share <= 0.0 { 0 } else { (along * top).round().clamp(0.0, top) as u8 }
}

/// The cells of one level as a path; neighbours in a row make one rectangle.
fn cells_of(levels: &[Vec<u8>], level: u8) -> String {
    let mut path = String::new();
    for (row, cells) in levels.iter().rev().enumerate() {
        let mut column = 0;
        for run in cells.chunk_by(|a, b| a == b) {
            if run[0] == level {
                path += &format!("M{column} {row}h{0}v1h-{0}z", run.len());
            }
            column += run.len();
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_of_a_level_are_rectangles_from_the_bottom_up() {
        let levels = vec![vec![1, 1, 0], vec![0, 2, 1], vec![0, 0, 0]];
        assert_eq!(cells_of(&levels, 1), "M2 1h1v1h-1zM0 2h2v1h-2z");
        assert_eq!(cells_of(&levels, 2), "M1 1h1v1h-1z");
    }

    #[test]
    fn steps_are_equal_ratios() {
        assert_eq!([0.0, 1e-9, 1.0, 16.0, 256.0, 1e9].map(|share| level(share, 1.0, 256.0)), [0, 0, 0, 4, 8, 8]);
    }

    #[test]
    fn numbers_are_the_shares_and_where_their_bins_begin() {
        let shares = [vec![0.5, 0.25], vec![0.25, 0.0]];
        let cells = Cells { shares: &shares, neurons: 5, range: (0.1, 1.0), what: "share", format: |v| v.to_string() };
        let csv = heat_map("a", &cells, "neuron", String::new()).unwrap().csv();
        assert_eq!(csv, "row from neuron,column from neuron,share\n0,0,0.5\n0,3,0.25\n3,0,0.25\n3,3,0\n");
    }
}
