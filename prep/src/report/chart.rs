//! Charts as SVG: lines, bars and heat maps, drawn by plotters, and the numbers that each was drawn from. Knows nothing of what
//! is drawn.

mod axes;
mod colours;
mod heat_map;
mod picture;

use maud::{Markup, html};
use plotters::prelude::*;

use super::ReportError;
use axes::{MARGIN, axes, draw, failed, spread};
pub(super) use colours::dark as dark_style;
use colours::{SERIES, TEXT};
pub(super) use heat_map::{Cells, heat_map};
pub(super) use picture::Chart;
use picture::Numbers;

/// Size of a chart in its own units. Small, so that text stays legible when a phone scales it down.
const WIDTH: u32 = 430;
const HEIGHT: u32 = 300;
/// As many lines as can be told apart in one chart.
pub(super) const LINES_MAX: usize = SERIES.len();

/// One axis.
pub(super) struct Axis {
    pub(super) label: String,
    /// Bounds; of a logarithmic axis their logarithms to base 10, whole decades.
    pub(super) from: f64,
    pub(super) to: f64,
    pub(super) is_logarithmic: bool,
    /// Ticks at most.
    pub(super) ticks: usize,
    pub(super) format: fn(f64) -> String,
}

impl Axis {
    /// From `from` to `to`.
    pub(super) fn between(label: &str, from: f64, to: f64, ticks: usize, format: fn(f64) -> String) -> Self {
        Axis { label: label.into(), from, to, is_logarithmic: false, ticks, format }
    }

    /// From 0 on; a little more than `largest`.
    pub(super) fn from_zero(label: &str, largest: f64, format: fn(f64) -> String) -> Self {
        Self::between(label, 0.0, if largest > 0.0 { largest * 1.08 } else { 1.0 }, 6, format)
    }

    /// Where a value lies. Nothing lies below a logarithmic axis.
    fn place(&self, value: f64) -> f64 {
        if self.is_logarithmic { value.log10().max(self.from) } else { value }
    }
}

/// A line with its name, and points on it that are marked.
pub(super) struct Series {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
    pub(super) marks: Vec<(f64, f64)>,
}

/// Lines, each named at its right end, as many of them as can be told apart. `alt` says in words what is to be seen.
pub(super) fn lines(
    name: &'static str,
    x: &Axis,
    y: &Axis,
    series: &[Series],
    alt: String,
) -> Result<Chart, ReportError> {
    let mut numbers = Numbers::new(["line", &x.label, &y.label, "marked"]);
    for line in series {
        let points = line.points.iter().map(|p| (p, false)).chain(line.marks.iter().map(|p| (p, true)));
        points.for_each(|(p, marked)| {
            numbers.row([line.name.clone(), p.0.to_string(), p.1.to_string(), marked.to_string()]);
        });
    }
    let drawn: Vec<&Series> = spread_over(series.len()).into_iter().map(|at| &series[at]).collect();
    let longest = drawn.iter().map(|s| s.name.chars().count()).max().unwrap_or(0) as u32;
    let right = MARGIN + 24 + longest * 7;
    let place = |p: &(f64, f64)| (x.place(p.0), y.place(p.1));
    let content = draw((WIDTH, HEIGHT), |area| {
        let mut context = axes(area, x, y, right)?;
        let mut ends: Vec<(i32, usize)> = Vec::new();
        for (at, line) in drawn.iter().enumerate() {
            let color = SERIES[at].light;
            let points = line.points.iter().map(place);
            context.draw_series(LineSeries::new(points, color.stroke_width(2))).map_err(failed)?;
            let dots = line.marks.iter().map(|p| Circle::new(place(p), 4, color.filled()));
            context.draw_series(dots).map_err(failed)?;
            if let Some(end) = line.points.last() {
                ends.push((context.backend_coord(&place(end)).1, at));
            }
        }
        let (_, rows) = context.plotting_area().get_pixel_range();
        let x = (WIDTH - right) as i32 + 4;
        Ok(html! {
            @for (row, at) in spread(ends, rows.start + 4, rows.end) {
                line x1=(x) y1=(row) x2=(x + 14) y2=(row) stroke=(SERIES[at].hex()) stroke-width="3" {}
                text x=(x + 18) y=(row + 4) font-size="13" fill=(TEXT.hex()) { (drawn[at].name) }
            }
        })
    })?;
    Ok(Chart { name, alt, size: (WIDTH, HEIGHT), content, numbers })
}

/// A bar for each of `values`, named by the layer that it stands for.
pub(super) fn bars(
    name: &'static str,
    x: &str,
    y: &Axis,
    values: &[(usize, f64)],
    alt: String,
) -> Result<Chart, ReportError> {
    let mut numbers = Numbers::new([x, &y.label]);
    values.iter().for_each(|(layer, value)| numbers.row([layer.to_string(), value.to_string()]));
    let last = values.last().map_or(0, |v| v.0) as f64;
    let whole = |v: f64| if (v - v.round()).abs() < 1e-6 { format!("{v:.0}") } else { String::new() };
    let x = Axis::between(x, -0.6, last + 0.6, (values.len() + 1).min(12), whole);
    let content = draw((WIDTH, HEIGHT), |area| {
        let mut context = axes(area, &x, y, MARGIN + 6)?;
        let bar = |&(layer, value): &(usize, f64)| {
            Rectangle::new([(layer as f64 - 0.38, 0.0), (layer as f64 + 0.38, value)], SERIES[0].light.filled())
        };
        context.draw_series(values.iter().map(bar)).map_err(failed)?;
        Ok(Markup::default())
    })?;
    Ok(Chart { name, alt, size: (WIDTH, HEIGHT), content, numbers })
}

/// Which of `count` lines a chart shows, first and last among them.
fn spread_over(count: usize) -> Vec<usize> {
    let lines = count.min(LINES_MAX);
    (0..lines).map(|at| if lines == 1 { 0 } else { at * (count - 1) / (lines - 1) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_chosen_over_all_layers() {
        assert_eq!(spread_over(3), [0, 1, 2]);
        assert_eq!(spread_over(32), [0, 4, 8, 13, 17, 22, 26, 31]);
        assert_eq!(spread_over(1), [0]);
    }

    #[test]
    fn every_colour_in_a_chart_has_one_for_dark_pages() {
        let axis = |label: &str| Axis::from_zero(label, 1.0, |v| format!("{v:.1}"));
        let line =
            |name: &str| Series { name: name.into(), points: vec![(0.0, 0.1), (1.0, 0.9)], marks: vec![(0.5, 0.5)] };
        let series: Vec<Series> = (0..LINES_MAX).map(|n| line(&format!("line {n}"))).collect();
        let chart = lines("a", &axis("x"), &axis("y"), &series, "a <chart>".into()).unwrap();
        let svg = chart.svg();
        let (style, picture) = svg.split_once("</style>").unwrap();
        for part in picture.split("=\"#").skip(1) {
            let color = &part[..6];
            assert!(style.contains(color), "{color}");
        }
        assert!(chart.html().into_string().contains("a &lt;chart&gt;") && picture.contains("line 7"));
    }

    #[test]
    fn numbers_are_those_that_were_given_of_all_lines() {
        let y = Axis { is_logarithmic: true, ..Axis::between("y", -1.0, 2.0, 4, |v| v.to_string()) };
        let series: Vec<Series> = (0..20)
            .map(|n| Series { name: n.to_string(), points: vec![(0.0, 0.003), (1.0, 1e2 / 3.0)], marks: vec![] })
            .collect();
        let csv = lines("a", &Axis::from_zero("x", 1.0, |v| v.to_string()), &y, &series, String::new()).unwrap().csv();
        assert_eq!(csv.lines().count(), 1 + 2 * 20);
        assert!(csv.starts_with("line,x,y,marked\n0,0,0.003,false\n0,1,33.333333333333336,false\n1,"), "{csv}");
    }
}
