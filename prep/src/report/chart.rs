//! Charts as inline SVG: lines, bars and heat maps, drawn by plotters.
//!
//! Colours are those of the light page; [`style`] lets the page's own colours, light or dark, take their place. Knows nothing
//! of what is drawn.

use maud::{Markup, PreEscaped, html};
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use super::ReportError;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Context<'a> = ChartContext<'a, SVGBackend<'a>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// Size of a chart in its own units. Small, so that text stays legible when a phone scales it down.
const WIDTH: u32 = 430;
const HEIGHT: u32 = 300;
const LEFT: u32 = 60;
const BOTTOM: u32 = 46;
const MARGIN: u32 = 10;
/// plotters writes 1 / 1.24 of this as font size: 13 units.
const FONT: f64 = 16.0;
/// Distance of labels after the lines, from base line to base line.
const LABEL_PITCH: i32 = 15;

const TEXT: RGBColor = RGBColor(0x1C, 0x1F, 0x24);
const AXIS: RGBColor = RGBColor(0x8A, 0x90, 0x99);
const GRID: RGBColor = RGBColor(0xE1, 0xE4, 0xE8);
/// Colours of the series on a light page and on a dark one.
const SERIES: [(RGBColor, &str); 8] = [
    (RGBColor(0x0B, 0x62, 0xC4), "#6CB2FF"),
    (RGBColor(0xC2, 0x41, 0x0C), "#FF9A5C"),
    (RGBColor(0x0F, 0x7B, 0x5F), "#4FD1A5"),
    (RGBColor(0x8B, 0x3F, 0xBF), "#C79BFF"),
    (RGBColor(0x66, 0x75, 0x00), "#C9D64A"),
    (RGBColor(0xBE, 0x18, 0x5D), "#FF85B5"),
    (RGBColor(0x0E, 0x74, 0x90), "#56CCE0"),
    (RGBColor(0x52, 0x5A, 0x66), "#AAB2BF"),
];
/// Bounds of an axis are not beyond this.
const DRAWABLE_MAX: f64 = 1e15;
/// As many lines as can be told apart in one chart.
pub(super) const LINES_MAX: usize = SERIES.len();
/// Steps of a heat map, the empty one included.
pub(super) const HEAT_LEVELS: usize = 9;

/// One axis. A logarithmic one is given the logarithms to base 10, whole decades as bounds.
pub(super) struct Axis {
    pub(super) label: String,
    pub(super) from: f64,
    pub(super) to: f64,
    /// Ticks at most.
    pub(super) ticks: usize,
    pub(super) format: fn(f64) -> String,
}

impl Axis {
    /// From 0 on; a little more than `largest`.
    pub(super) fn from_zero(label: &str, largest: f64, format: fn(f64) -> String) -> Self {
        let to = if largest > 0.0 { largest * 1.08 } else { 1.0 };
        Axis { label: label.into(), from: 0.0, to, ticks: 6, format }
    }
}

/// A line with its name, and points on it that are marked.
pub(super) struct Series {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
    pub(super) marks: Vec<(f64, f64)>,
}

/// Lines, each named at its right end. `alt` says in words what is to be seen.
pub(super) fn lines(x: &Axis, y: &Axis, series: &[Series], alt: &str) -> Result<Markup, ReportError> {
    let longest = series.iter().map(|s| s.name.chars().count()).max().unwrap_or(0) as u32;
    let right = MARGIN + 24 + longest * 7;
    draw((WIDTH, HEIGHT), alt, |area| {
        let mut context = axes(area, x, y, right)?;
        let mut ends: Vec<(i32, usize)> = Vec::new();
        for (at, line) in series.iter().enumerate() {
            let color = SERIES[at % LINES_MAX].0;
            let style = color.stroke_width(2);
            context.draw_series(LineSeries::new(line.points.iter().copied(), style)).map_err(failed)?;
            let dots = line.marks.iter().map(|&p| Circle::new(p, 4, color.filled()));
            context.draw_series(dots).map_err(failed)?;
            if let Some(&end) = line.points.last() {
                ends.push((context.backend_coord(&end).1, at));
            }
        }
        let (_, rows) = context.plotting_area().get_pixel_range();
        let x = (WIDTH - right) as i32 + 4;
        Ok(html! {
            @for (row, at) in spread(ends, rows.start + 4, rows.end) {
                line x1=(x) y1=(row) x2=(x + 14) y2=(row) stroke=(hex(SERIES[at % LINES_MAX].0)) stroke-width="3" {}
                text x=(x + 18) y=(row + 4) font-size="13" fill=(hex(TEXT)) { (series[at].name) }
            }
        })
    })
}

/// A bar for each of `values`, named by the layer that it stands for.
pub(super) fn bars(x: &str, y: &Axis, values: &[(usize, f64)], alt: &str) -> Result<Markup, ReportError> {
    let last = values.last().map_or(0, |v| v.0) as f64;
    let whole = |v: f64| if (v - v.round()).abs() < 1e-6 { format!("{v:.0}") } else { String::new() };
    let x = Axis { label: x.into(), from: -0.6, to: last + 0.6, ticks: (values.len() + 1).min(12), format: whole };
    draw((WIDTH, HEIGHT), alt, |area| {
        let mut context = axes(area, &x, y, MARGIN + 6)?;
        let bar = |&(layer, value): &(usize, f64)| {
            Rectangle::new([(layer as f64 - 0.38, 0.0), (layer as f64 + 0.38, value)], SERIES[0].0.filled())
        };
        context.draw_series(values.iter().map(bar)).map_err(failed)?;
        Ok(Markup::default())
    })
}

/// A square of cells, `levels[row][column]` below [`HEAT_LEVELS`], the first row at the bottom; both axes count neurons.
pub(super) fn heat_map(levels: &[Vec<u8>], neurons: usize, axis: &str, alt: &str) -> Result<Markup, ReportError> {
    let ticks = |v: f64| format!("{v:.0}");
    let side = |label: &str| Axis { label: label.into(), from: 0.0, to: neurons as f64, ticks: 5, format: ticks };
    draw((420, 400), alt, |area| {
        let context = axes(area, &side(axis), &side(axis), MARGIN + 14)?;
        let (columns, rows) = context.plotting_area().get_pixel_range();
        let scale = |span: &std::ops::Range<i32>| (span.end - span.start) as f64 / levels.len().max(1) as f64;
        let place =
            format!("translate({} {}) scale({:.4} {:.4})", columns.start, rows.start, scale(&columns), scale(&rows));
        let paths = (1..HEAT_LEVELS as u8).map(|level| (level, cells_of(levels, level)));
        Ok(html! {
            g class="heat" shape-rendering="crispEdges" transform=(place) {
                @for (level, path) in paths.filter(|(_, path)| !path.is_empty()) {
                    path class={ "h" (level) } d=(path) {}
                }
            }
        })
    })
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

/// The style sheet's part for charts.
pub(super) fn style() -> String {
    let mut light = String::new();
    let mut dark = String::new();
    let mut rules = String::new();
    for (at, (color, on_dark)) in SERIES.iter().enumerate() {
        let on_light = hex(*color);
        light += &format!("--s{at}:{on_light};");
        dark += &format!("--s{at}:{on_dark};");
        rules += &format!(
            "svg [stroke=\"{on_light}\"]{{stroke:var(--s{at})}}svg [fill=\"{on_light}\"]{{fill:var(--s{at})}}\n"
        );
    }
    for level in 1..HEAT_LEVELS {
        rules += &format!(".h{level}{{fill:var(--s0);fill-opacity:{:.3}}}\n", level as f64 / (HEAT_LEVELS - 1) as f64);
    }
    rules += &format!("svg text{{fill:var(--text)}}svg [stroke=\"{}\"]{{stroke:var(--axis)}}", hex(AXIS));
    rules += &format!("svg [stroke=\"{}\"]{{stroke:var(--grid)}}\n", hex(GRID));
    format!(":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{rules}")
}

fn hex(color: RGBColor) -> String {
    format!("#{:02X}{:02X}{:02X}", color.0, color.1, color.2)
}

fn failed(error: impl std::fmt::Display) -> ReportError {
    ReportError::Chart(error.to_string())
}

/// Draws, and makes what comes out part of a page: scaled by it, and with words for those who do not see it. What `paint` returns
/// lies above what it draws.
fn draw(
    size: (u32, u32),
    alt: &str,
    paint: impl FnOnce(&Area) -> Result<Markup, ReportError>,
) -> Result<Markup, ReportError> {
    let mut svg = String::new();
    let above = {
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        let above = paint(&area)?;
        area.present().map_err(failed)?;
        above
    };
    let content = svg.split_once('>').and_then(|(_, content)| content.trim_end().strip_suffix("</svg>"));
    let content = content.ok_or_else(|| failed("what was drawn is no picture"))?;
    Ok(html! {
        svg viewBox={ "0 0 " (size.0) " " (size.1) } role="img" aria-label=(alt) { (PreEscaped(content)) (above) }
    })
}

fn axes<'a>(area: &Area<'a>, x: &Axis, y: &Axis, right: u32) -> Result<Context<'a>, ReportError> {
    for axis in [x, y] {
        // The drawing library counts along an axis, and does not end where a step is too small to count.
        let is_drawable = |bound: f64| bound.abs() <= DRAWABLE_MAX;
        if !(is_drawable(axis.from) && is_drawable(axis.to) && axis.from < axis.to) {
            return Err(ReportError::Chart(format!("{} from {} to {}: no such axis", axis.label, axis.from, axis.to)));
        }
    }
    let mut context = ChartBuilder::on(area)
        .margin_top(MARGIN)
        .margin_right(right)
        .margin_left(2)
        .margin_bottom(2)
        .x_label_area_size(BOTTOM)
        .y_label_area_size(LEFT)
        .build_cartesian_2d(x.from..x.to, y.from..y.to)
        .map_err(failed)?;
    let font = || ("sans-serif", FONT).into_font().color(&TEXT);
    context
        .configure_mesh()
        .x_labels(x.ticks)
        .y_labels(y.ticks)
        .x_desc(&x.label)
        .y_desc(&y.label)
        .x_label_formatter(&|v| (x.format)(*v))
        .y_label_formatter(&|v| (y.format)(*v))
        .label_style(font())
        .axis_desc_style(font())
        .axis_style(AXIS)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .draw()
        .map_err(failed)?;
    Ok(context)
}

/// Moves labels apart so that none covers another, in the order of their lines' ends.
fn spread(mut ends: Vec<(i32, usize)>, top: i32, bottom: i32) -> Vec<(i32, usize)> {
    ends.sort();
    let mut least = top;
    for end in &mut ends {
        end.0 = end.0.max(least);
        least = end.0 + LABEL_PITCH;
    }
    let mut most = bottom;
    for end in ends.iter_mut().rev() {
        end.0 = end.0.min(most);
        most = end.0 - LABEL_PITCH;
    }
    ends
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_keep_their_distance_and_order() {
        let ends = spread(vec![(100, 0), (101, 1), (99, 2), (300, 3)], 10, 300);
        assert_eq!(ends, [(99, 2), (114, 0), (129, 1), (300, 3)]);
        let crowded = spread(vec![(290, 0), (295, 1), (299, 2)], 10, 300);
        assert_eq!(crowded, [(270, 0), (285, 1), (300, 2)]);
    }

    #[test]
    fn cells_of_a_level_are_rectangles_from_the_bottom_up() {
        let levels = vec![vec![1, 1, 0], vec![0, 2, 1], vec![0, 0, 0]];
        assert_eq!(cells_of(&levels, 1), "M2 1h1v1h-1zM0 2h2v1h-2z");
        assert_eq!(cells_of(&levels, 2), "M1 1h1v1h-1z");
    }

    #[test]
    fn every_colour_in_a_chart_is_one_that_the_page_replaces() {
        let axis = |label: &str| Axis::from_zero(label, 1.0, |v| format!("{v:.1}"));
        let line =
            |name: &str| Series { name: name.into(), points: vec![(0.0, 0.1), (1.0, 0.9)], marks: vec![(0.5, 0.5)] };
        let series: Vec<Series> = (0..LINES_MAX).map(|n| line(&format!("line {n}"))).collect();
        let svg = lines(&axis("x"), &axis("y"), &series, "a <chart>").unwrap().into_string();
        let style = style();
        for part in svg.split("=\"#").skip(1) {
            let color = &part[..6];
            assert!(style.contains(color) || color == &hex(TEXT)[1..], "{color}");
        }
        assert!(svg.contains("a &lt;chart&gt;") && svg.contains("line 7"));
    }
}
