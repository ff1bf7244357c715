//! The page as text: escaping, tables, figures, the frame with its style sheet. Knows nothing of what is reported.

use flashlm_formats::destination::REPORT_MARK;

use super::chart;

/// Text as it may stand in content and in quoted attributes.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
    }
    out
}

/// Running text: a number stays with its percent sign.
fn prose(text: &str) -> String {
    escape(text).replace(" %", "\u{a0}%")
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
    fn html(&self) -> String {
        let cells = |tag: &str, cells: &[String]| -> String {
            cells.iter().map(|c| format!("<{tag}>{}</{tag}>", escape(c))).collect()
        };
        let mut out =
            format!("<div class=\"scroll\"><table><thead><tr>{}</tr></thead><tbody>\n", cells("th", &self.head));
        for row in &self.rows {
            out += &format!("<tr>{}</tr>\n", cells("td", row));
        }
        out + "</tbody></table></div>\n"
    }
}

/// A chart with what it shows.
pub(super) struct Figure {
    /// What is found, as a sentence.
    pub(super) title: String,
    /// How to read it.
    pub(super) text: String,
    /// One chart, or several beside each other with their names.
    pub(super) charts: Vec<(String, String)>,
    /// Behind the charts, as HTML.
    pub(super) key: String,
    /// The numbers.
    pub(super) table: Table,
}

impl Figure {
    pub(super) fn html(&self) -> String {
        let mut out = format!(
            "<figure>\n<figcaption><h3>{}</h3><p>{}</p></figcaption>\n<div class=\"charts\">\n",
            prose(&self.title),
            prose(&self.text)
        );
        for (name, svg) in &self.charts {
            let name = if name.is_empty() { String::new() } else { format!("<p class=\"name\">{}</p>", escape(name)) };
            out += &format!("<div>{name}{svg}</div>\n");
        }
        out + &format!(
            "</div>\n{}<details><summary>The numbers</summary>\n{}</details>\n</figure>\n",
            self.key,
            self.table.html()
        )
    }
}

/// A part of the page with a heading; what is in `body` is HTML.
pub(super) fn section(id: &str, heading: &str, body: &str) -> String {
    format!("<section id=\"{id}\">\n<h2>{}</h2>\n{body}</section>\n", escape(heading))
}

/// Plain text as a paragraph.
pub(super) fn paragraph(text: &str) -> String {
    format!("<p>{}</p>\n", prose(text))
}

/// A sentence about what is not there and the command that makes it.
pub(super) fn missing(text: &str, command: &str) -> String {
    format!("<p class=\"missing\">{} <code>{}</code></p>\n", escape(text), escape(command))
}

/// Names with values.
pub(super) fn facts(facts: &[(&str, String)]) -> String {
    let rows: String = facts
        .iter()
        .map(|(name, value)| format!("<tr><th>{}</th><td>{}</td></tr>\n", escape(name), prose(value)))
        .collect();
    format!("<table class=\"facts\"><tbody>\n{rows}</tbody></table>\n")
}

/// The whole page.
pub(super) fn page(title: &str, body: &str) -> String {
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         {REPORT_MARK}\n<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <meta name=\"color-scheme\" content=\"light dark\"/>\n<title>{0}</title>\n<style>\n{STYLE}{1}</style>\n</head>\n\
         <body>\n<main>\n<h1>{0}</h1>\n{body}</main>\n</body>\n</html>\n",
        escape(title),
        chart::style()
    )
}

const STYLE: &str = include_str!("style.css");
