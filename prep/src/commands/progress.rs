//! Progress of a stage that may take long: a bar with rate and time left on a terminal, lines elsewhere.

use std::fmt::Write;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use flashlm::terminal::printable;
use flashlm_prep::pipeline::duration;
use indicatif::{ProgressBar, ProgressState, ProgressStyle};

/// Without a terminal: when the first line comes, and how long after it the others.
const FIRST_LINE: Duration = Duration::from_secs(10);
const LINES_APART: Duration = Duration::from_secs(60);

/// A stage of this many steps. What is left of it is reckoned from the steps that are done.
pub(crate) struct Stage {
    name: String,
    bar: ProgressBar,
    lines: Mutex<Lines>,
}

/// When the work began, how much had been done by then, and when the next line is due.
struct Lines {
    begin: Instant,
    before: u64,
    due: Duration,
}

impl Stage {
    /// A stage that counts bytes.
    pub(crate) fn bytes(name: impl Into<String>) -> Self {
        Self::styled(name, "{prefix} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}{left}", 0, "")
    }

    /// A stage that counts `unit`s.
    pub(crate) fn new(name: impl Into<String>, unit: &'static str, steps: u64) -> Self {
        Self::styled(name, "{prefix} [{bar:30}] {pos}/{len} {msg}{rate}{left}", steps, unit)
    }

    /// A stage whose steps mean nothing to anybody: only the share that is done is shown.
    pub(crate) fn share(name: impl Into<String>) -> Self {
        Self::styled(name, "{prefix} [{bar:30}] {percent} %{left}", 0, "")
    }

    fn styled(name: impl Into<String>, template: &str, steps: u64, unit: &'static str) -> Self {
        let name = printable(&name.into()).to_string();
        let bar = ProgressBar::new(steps).with_prefix(name.clone()).with_message(unit);
        if let Ok(style) = ProgressStyle::with_template(template) {
            // What cannot be written is not shown.
            let rate = |state: &ProgressState, out: &mut dyn Write| _ = out.write_str(&rate(state.per_sec()));
            let left = |state: &ProgressState, out: &mut dyn Write| _ = out.write_str(&left(state.eta()));
            bar.set_style(style.with_key("rate", rate).with_key("left", left).progress_chars("=> "));
        }
        // The bar's clock is a thread, and indicatif panics where none can be had.
        let is_to_be_had = || std::thread::Builder::new().spawn(|| ()).is_ok_and(|thread| thread.join().is_ok());
        if !bar.is_hidden() && is_to_be_had() {
            bar.enable_steady_tick(Duration::from_millis(500));
        }
        Stage { name, bar, lines: Mutex::new(Lines { begin: Instant::now(), before: 0, due: FIRST_LINE }) }
    }

    /// The steps done, and how many there are.
    pub(crate) fn set(&self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
        self.log();
    }

    /// This many steps were done before; they say nothing of the rate.
    pub(crate) fn begin_at(&self, done: u64, total: u64) {
        if let Ok(mut lines) = self.lines.lock() {
            *lines = Lines { begin: Instant::now(), before: done, due: FIRST_LINE };
        }
        self.set(done, total);
        self.bar.reset_eta();
    }

    /// This many more steps are done.
    pub(crate) fn advance(&self, steps: u64) {
        self.bar.inc(steps);
        self.log();
    }

    /// A line above the bar; printed to standard error also when there is no terminal.
    pub(crate) fn say(&self, line: &str) {
        if self.bar.is_hidden() {
            eprintln!("{line}");
        } else {
            self.bar.println(printable(line));
        }
    }

    /// Where there is no bar: a line now and then.
    fn log(&self) {
        if !self.bar.is_hidden() {
            return;
        }
        let Ok(mut lines) = self.lines.lock() else { return };
        let (elapsed, total) = (lines.begin.elapsed(), self.bar.length().unwrap_or(0));
        if elapsed < lines.due {
            return;
        }
        if let Some(line) = line(&self.name, self.bar.position(), lines.before, total, elapsed) {
            lines.due = elapsed + LINES_APART;
            eprintln!("{line}");
        }
    }
}

/// Steps a second, to two digits or more; nothing before there were any.
fn rate(per_second: f64) -> String {
    match per_second {
        r if !r.is_finite() || r < 0.01 => String::new(),
        r if r < 1.0 => format!(" ({r:.2}/s)"),
        r if r < 10.0 => format!(" ({r:.1}/s)"),
        r => format!(" ({r:.0}/s)"),
    }
}

/// What is left, on a bar; nothing where that is not known yet, or is next to nothing.
fn left(eta: Duration) -> String {
    if eta < Duration::from_secs(1) { String::new() } else { format!(", about {} left", duration(eta.as_secs_f64())) }
}

/// What is said of a stage that is so far.
fn line(name: &str, done: u64, before: u64, total: u64, elapsed: Duration) -> Option<String> {
    if done <= before || done >= total {
        return None;
    }
    let left = elapsed.as_secs_f64() * (total - done) as f64 / (done - before) as f64;
    let percent = 100.0 * done as f64 / total as f64;
    Some(format!("{name}: {percent:.0} %, about {} left", duration(left)))
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_follows_from_what_was_done_here() {
        let said = |done, before, total, seconds| line("x", done, before, total, Duration::from_secs(seconds));
        assert_eq!(said(10, 0, 100, 60).unwrap(), "x: 10 %, about 9 minutes left");
        // What an earlier run did took none of this one's time.
        assert_eq!(said(60, 50, 100, 60).unwrap(), "x: 60 %, about 4 minutes left");
        assert_eq!([said(0, 0, 100, 60), said(100, 0, 100, 60), said(5, 0, 0, 60)], [None, None, None]);
    }

    #[test]
    fn bars_show_figures_that_can_be_read() {
        assert_eq!(
            [0.0, f64::NAN, 0.1234, 3.4567, 1234.5678].map(rate),
            ["", "", " (0.12/s)", " (3.5/s)", " (1235/s)"]
        );
        assert_eq!([0.0, 0.4, 61.0].map(|s| left(Duration::from_secs_f64(s))), ["", "", ", about 61 seconds left"]);
    }
}
