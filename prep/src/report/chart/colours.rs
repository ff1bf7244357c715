//! The colours of charts. Those of a light page are drawn; [`dark`] is the style sheet that replaces them on a dark one.

use plotters::style::RGBColor;

/// A colour on a light page, as it is drawn, and on a dark one.
#[derive(Clone, Copy)]
pub(super) struct Colour {
    pub(super) light: RGBColor,
    dark: &'static str,
}

const fn colour(r: u8, g: u8, b: u8, dark: &'static str) -> Colour {
    Colour { light: RGBColor(r, g, b), dark }
}

pub(super) const BACK: Colour = colour(0xFF, 0xFF, 0xFF, "#14171B");
pub(super) const TEXT: Colour = colour(0x1C, 0x1F, 0x24, "#E6E9ED");
pub(super) const AXIS: Colour = colour(0x8A, 0x90, 0x99, "#6D7681");
pub(super) const GRID: Colour = colour(0xE1, 0xE4, 0xE8, "#2C3239");
/// One for each line.
pub(super) const SERIES: [Colour; 8] = [
    colour(0x0B, 0x62, 0xC4, "#6CB2FF"),
    colour(0xC2, 0x41, 0x0C, "#FF9A5C"),
    colour(0x0F, 0x7B, 0x5F, "#4FD1A5"),
    colour(0x8B, 0x3F, 0xBF, "#C79BFF"),
    colour(0x66, 0x75, 0x00, "#C9D64A"),
    colour(0xBE, 0x18, 0x5D, "#FF85B5"),
    colour(0x0E, 0x74, 0x90, "#56CCE0"),
    colour(0x52, 0x5A, 0x66, "#AAB2BF"),
];

impl Colour {
    /// As it stands in a chart.
    pub(super) fn hex(self) -> String {
        let RGBColor(r, g, b) = self.light;
        format!("#{r:02X}{g:02X}{b:02X}")
    }
}

/// Rules for charts on a dark page.
pub(in crate::report) fn dark() -> String {
    let rule = |colour: &Colour| {
        let (drawn, dark) = (colour.hex(), colour.dark);
        format!("svg [stroke=\"{drawn}\"]{{stroke:{dark}}}svg [fill=\"{drawn}\"]{{fill:{dark}}}\n")
    };
    let rules: String = [BACK, TEXT, AXIS, GRID].iter().chain(&SERIES).map(rule).collect();
    format!("@media (prefers-color-scheme:dark){{\n{rules}}}\n")
}
