//! The charts of a report as files in a directory: NAME.svg and NAME.csv of each, and `report.json`, which lists them.

use std::path::Path;

use flashlm_formats::destination::REPORT_DATA_FORMAT;
use flashlm_formats::publish::{publish_bytes, sync_name};
use serde::Serialize;

use super::{Report, ReportError};

const LIST: &str = "report.json";

/// The names of all charts, whether or not a report has them.
pub(super) const CHARTS: [&str; 10] = [
    "sparsity",
    "frequency",
    "reuse-new",
    "reuse-union",
    "coactivation-before",
    "coactivation-after",
    "runs",
    "predictor-recall",
    "predictor-errors",
    "budget",
];

/// `report.json`.
#[derive(Serialize)]
struct Contents<'a> {
    format: &'static str,
    version: u32,
    title: &'a str,
    recording: &'a str,
    charts: Vec<Entry<'a>>,
}

/// A chart in it.
#[derive(Serialize)]
struct Entry<'a> {
    name: &'a str,
    /// What is found, as a sentence, and how to read the chart.
    title: &'a str,
    text: &'a str,
    /// What is to be seen, in words.
    alt: &'a str,
    svg: String,
    csv: String,
}

impl Report {
    /// Writes the charts into `dir`, in place of those of an earlier report: each file whole, and `report.json`, which lists none
    /// before all are there.
    ///
    /// # Errors
    /// `Io`.
    pub fn write_data(&self, dir: &Path) -> Result<(), ReportError> {
        self.write_list(dir, Vec::new())?;
        for name in CHARTS {
            for path in [dir.join(svg(name)), dir.join(csv(name))] {
                remove(&path).map_err(|source| ReportError::Io { path, source })?;
            }
        }
        let figures = self.sections.iter().flat_map(|section| &section.figures);
        let mut charts = Vec::new();
        for (figure, chart) in figures.flat_map(|f| f.charts.iter().map(move |(_, chart)| (f, chart))) {
            let entry = Entry {
                name: chart.name,
                title: &figure.title,
                text: &figure.text,
                alt: &chart.alt,
                svg: svg(chart.name),
                csv: csv(chart.name),
            };
            write(&dir.join(&entry.svg), chart.svg().as_bytes())?;
            write(&dir.join(&entry.csv), chart.csv().as_bytes())?;
            charts.push(entry);
        }
        self.write_list(dir, charts)
    }

    fn write_list(&self, dir: &Path, charts: Vec<Entry>) -> Result<(), ReportError> {
        let contents =
            Contents { format: REPORT_DATA_FORMAT, version: 1, title: &self.title, recording: &self.recording, charts };
        let mut json = serde_json::to_vec_pretty(&contents).expect("plain data serialises");
        json.push(b'\n');
        write(&dir.join(LIST), &json)
    }
}

fn svg(name: &str) -> String {
    format!("{name}.svg")
}

fn csv(name: &str) -> String {
    format!("{name}.csv")
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), ReportError> {
    publish_bytes(path, bytes).map_err(|source| ReportError::Io { path: path.to_path_buf(), source })
}

fn remove(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Ok(()) => sync_name(path),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}
