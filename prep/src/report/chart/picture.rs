//! A chart that is drawn: as part of a page, as a file of its own, and as its numbers.

use maud::{Markup, PreEscaped, html};

use super::colours::{self, BACK};

/// What was drawn, and what from.
pub(in crate::report) struct Chart {
    /// The name of its files.
    pub(in crate::report) name: &'static str,
    /// What is to be seen, in words.
    pub(in crate::report) alt: String,
    pub(super) size: (u32, u32),
    pub(super) content: Markup,
    pub(super) numbers: Numbers,
}

impl Chart {
    /// Part of a page, which scales and colours it.
    pub(in crate::report) fn html(&self) -> Markup {
        let (width, height) = self.size;
        html! {
            svg viewBox={ "0 0 " (width) " " (height) } role="img" aria-label=(self.alt) { (self.content) }
        }
    }

    /// A file of its own, which needs nothing else.
    pub(in crate::report) fn svg(&self) -> String {
        let (width, height) = self.size;
        let picture = html! {
            svg xmlns="http://www.w3.org/2000/svg" viewBox={ "0 0 " (width) " " (height) } width=(width) height=(height)
                font-family="sans-serif" role="img" aria-label=(self.alt)
            {
                style { (PreEscaped(colours::dark())) }
                rect width="100%" height="100%" fill=(BACK.hex()) {}
                (self.content)
            }
        };
        picture.into_string() + "\n"
    }

    /// The numbers that it was drawn from.
    pub(in crate::report) fn csv(&self) -> String {
        self.numbers.csv()
    }
}

/// Rows under a head. Numbers have as many digits as tell them from all others.
pub(super) struct Numbers {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Numbers {
    pub(super) fn new<const N: usize>(head: [&str; N]) -> Self {
        Numbers { head: head.map(String::from).to_vec(), rows: Vec::new() }
    }

    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.to_vec());
    }

    /// As RFC 4180 has it, lines ending as on Unix.
    fn csv(&self) -> String {
        let quoted = |cell: &String| match cell {
            cell if cell.contains([',', '"', '\n', '\r']) => format!("\"{}\"", cell.replace('"', "\"\"")),
            cell => cell.clone(),
        };
        let line = |cells: &Vec<String>| cells.iter().map(quoted).collect::<Vec<_>>().join(",") + "\n";
        std::iter::once(&self.head).chain(&self.rows).map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_quoted_where_they_must_be() {
        let mut numbers = Numbers::new(["line", "a \"size\", in kB"]);
        numbers.row(["0".into(), 0.1f64.to_string()]);
        assert_eq!(numbers.csv(), "line,\"a \"\"size\"\", in kB\"\n0,0.1\n");
    }
}
