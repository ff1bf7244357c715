//! Progress of a stage that may take long: on a terminal only, with rate and time left.

use std::time::Duration;

use flashlm_runtime::terminal::printable;
use indicatif::{ProgressBar, ProgressStyle};

/// A stage of so many steps. Nothing is shown when standard error is not a terminal.
pub(crate) struct Stage {
    bar: ProgressBar,
}

impl Stage {
    /// A stage that counts bytes.
    pub(crate) fn bytes(name: impl Into<String>) -> Self {
        Self::styled(name, "{prefix} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}, {eta} left", 0, "")
    }

    /// A stage that counts `unit`s.
    pub(crate) fn new(name: impl Into<String>, unit: &'static str, steps: u64) -> Self {
        Self::styled(name, "{prefix} [{bar:30}] {pos}/{len} {msg} ({per_sec}), {eta} left", steps, unit)
    }

    fn styled(name: impl Into<String>, template: &str, steps: u64, unit: &'static str) -> Self {
        let bar = ProgressBar::new(steps).with_prefix(printable(&name.into())).with_message(unit);
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        // The bar's clock is a thread, and indicatif panics where there is none to be had.
        let is_to_be_had = || std::thread::Builder::new().spawn(|| ()).is_ok_and(|thread| thread.join().is_ok());
        if !bar.is_hidden() && is_to_be_had() {
            bar.enable_steady_tick(Duration::from_millis(500));
        }
        Stage { bar }
    }

    /// So many steps are done, of so many.
    pub(crate) fn set(&self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
    }

    /// So many steps were done before; they say nothing of the rate.
    pub(crate) fn begin_at(&self, done: u64, total: u64) {
        self.set(done, total);
        self.bar.reset_eta();
    }

    /// So many more steps are done.
    pub(crate) fn advance(&self, steps: u64) {
        self.bar.inc(steps);
    }

    /// A line above the bar; printed to standard error also when there is no terminal.
    pub(crate) fn say(&self, line: &str) {
        if self.bar.is_hidden() {
            eprintln!("{line}");
        } else {
            self.bar.println(printable(line));
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
