//! What charts share: the area, the axes, labels that keep apart.

use maud::{Markup, PreEscaped, html};
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use super::Axis;
use super::colours::{AXIS, GRID, TEXT};
use crate::report::ReportError;

pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
pub(super) type Context<'a> = ChartContext<'a, SVGBackend<'a>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

const BOTTOM: u32 = 46;
const LEFT: u32 = 60;
pub(super) const MARGIN: u32 = 10;
/// plotters writes 1 / 1.24 of this as font size: 13 units.
const FONT: f64 = 16.0;
/// Distance of labels after the lines, from base line to base line.
const LABEL_PITCH: i32 = 15;
/// Bounds of an axis are not beyond this.
const DRAWABLE_MAX: f64 = 1e15;

pub(super) fn failed(error: impl std::fmt::Display) -> ReportError {
    ReportError::Chart(error.to_string())
}

/// What `paint` draws; what it returns lies above that.
pub(super) fn draw(
    size: (u32, u32),
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
    Ok(html! { (PreEscaped(content)) (above) })
}

pub(super) fn axes<'a>(area: &Area<'a>, x: &Axis, y: &Axis, right: u32) -> Result<Context<'a>, ReportError> {
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
    let font = || ("sans-serif", FONT).into_font().color(&TEXT.light);
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
        .axis_style(AXIS.light)
        .bold_line_style(GRID.light)
        .light_line_style(TRANSPARENT)
        .draw()
        .map_err(failed)?;
    Ok(context)
}

/// Moves labels apart so that none covers another, in the order of their lines' ends.
pub(super) fn spread(mut ends: Vec<(i32, usize)>, top: i32, bottom: i32) -> Vec<(i32, usize)> {
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
}
