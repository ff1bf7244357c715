//! The page as HTML: tables, figures, the frame with its style sheet. maud escapes what is text. Knows nothing of what is reported.

use flashlm_formats::destination::REPORT_MARK;
use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::chart::{Chart, dark_style};

/// Running text: a number stays with its percent sign.
fn prose(text: &str) -> String {
    text.replace(" %", "\u{a0}%")
}

/// Rows under a head.
#[derive(Default)]
pub(super) struct Table {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(head: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Table { head: head.into_iter().map(Into::into).collect(), rows: Vec::new() }
    }

    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// In a box of its own that scrolls when the page is narrow.
    fn html(&self) -> Markup {
        html! {
            div class="scroll" {
                table {
                    thead { tr { @for name in &self.head { th { (name) } } } }
                    tbody { @for row in &self.rows { tr { @for cell in row { td { (cell) } } } } }
                }
            }
        }
    }
}

/// A chart with what it shows.
pub(super) struct Figure {
    /// What is found, as a sentence.
    pub(super) title: String,
    /// How to read it.
    pub(super) text: String,
    /// One chart, or several side by side with their names.
    pub(super) charts: Vec<(String, Chart)>,
    /// The numbers.
    pub(super) table: Table,
}

impl Figure {
    fn html(&self) -> Markup {
        html! {
            figure {
                figcaption {
                    h3 { (prose(&self.title)) }
                    p { (prose(&self.text)) }
                }
                div class="charts" {
                    @for (name, chart) in &self.charts {
                        div {
                            @if !name.is_empty() { p class="name" { (name) } }
                            (chart.html())
                        }
                    }
                }
                details {
                    summary { "The numbers" }
                    (self.table.html())
                }
            }
        }
    }
}

/// A part of the page.
pub(super) struct Section {
    pub(super) id: &'static str,
    /// In the list at the top.
    pub(super) name: &'static str,
    pub(super) heading: &'static str,
    pub(super) text: Markup,
    /// Side by side where the page is wide enough.
    pub(super) figures: Vec<Figure>,
}

impl Section {
    fn html(&self) -> Markup {
        html! {
            section id=(self.id) {
                h2 { (self.heading) }
                (self.text)
                @if !self.figures.is_empty() {
                    div class="figures" { @for figure in &self.figures { (figure.html()) } }
                }
            }
        }
    }
}

/// Plain text as a paragraph.
pub(super) fn paragraph(text: &str) -> Markup {
    html! { p { (prose(text)) } }
}

/// A sentence about what is not there and the command that makes it.
pub(super) fn missing(text: &str, command: &str) -> Markup {
    html! { p class="missing" { (text) " " code { (command) } } }
}

/// Names with values.
pub(super) fn facts(facts: &[(&str, String)]) -> Markup {
    html! {
        table class="facts" {
            tbody { @for (name, value) in facts { tr { th { (name) } td { (prose(value)) } } } }
        }
    }
}

/// The whole page.
pub(super) fn page(title: &str, sections: &[Section]) -> String {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                (PreEscaped("<meta charset=\"utf-8\"/>"))
                (PreEscaped(REPORT_MARK))
                (PreEscaped("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>"))
                (PreEscaped("<meta name=\"color-scheme\" content=\"light dark\"/>"))
                title { (title) }
                style { (PreEscaped(STYLE)) (PreEscaped(dark_style())) }
            }
            body {
                main {
                    h1 { (title) }
                    // Space between the links, where lines may break.
                    nav { @for section in sections { a href={ "#" (section.id) } { (section.name) } " " } }
                    @for section in sections { (section.html()) }
                }
            }
        }
    };
    page.into_string() + "\n"
}

const STYLE: &str = include_str!("style.css");
