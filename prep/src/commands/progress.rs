//! Progress of a stage that may take long: a bar with rate and time left on a terminal, a line elsewhere.

use std::fmt::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use flashlm::budget::human_bytes;
use flashlm::terminal::printable;
use flashlm_prep::pipeline::duration;
use indicatif::{ProgressBar, ProgressState, ProgressStyle};

/// Without a terminal: a stage that takes less has no line; one that takes long has more than that at its end.
const SHORT: Duration = Duration::from_secs(2);
const LINES_APART: Duration = Duration::from_secs(600);
/// Of how many parts the time left is reckoned anew after each, where a stage has no layers.
const PARTS: u64 = 50;

/// A stage of this many steps. What is left of it is reckoned from the steps that are done.
pub(crate) struct Stage {
    name: String,
    bar: ProgressBar,
    pace: Arc<Mutex<Pace>>,
    unit: Unit,
}

/// What a stage counts.
#[derive(Clone, Copy)]
enum Unit {
    Bytes,
    /// Something with a name in the plural.
    Steps(&'static str),
    /// Layers that this many tokens go through; steps are parts of them.
    Layers {
        layers: u64,
        tokens: u64,
    },
    /// Nothing that means anything to anybody.
    Share,
}

impl Stage {
    /// A stage that counts bytes.
    pub(crate) fn bytes(name: impl Into<String>) -> Self {
        Self::styled(name, "{prefix} [{bar:24}] {size}{left}", 0, Unit::Bytes)
    }

    /// A stage that counts `unit`s.
    pub(crate) fn new(name: impl Into<String>, unit: &'static str, steps: u64) -> Self {
        Self::styled(name, "{prefix} [{bar:24}] {pos}/{len} {msg}{rate}{left}", steps, Unit::Steps(unit))
    }

    /// A stage in which tokens go through layers; its steps are parts of layers, and the time left is reckoned anew after each layer.
    pub(crate) fn layers(name: impl Into<String>, layers: u64, tokens: u64) -> Self {
        Self::styled(name, "{prefix} [{bar:24}] {layer}{rate}{left}", 0, Unit::Layers { layers, tokens })
    }

    /// A stage whose steps mean nothing to anybody: only the share that is done is shown.
    pub(crate) fn share(name: impl Into<String>) -> Self {
        Self::styled(name, "{prefix} [{bar:24}] {percent} %{left}", 0, Unit::Share)
    }

    fn styled(name: impl Into<String>, template: &str, steps: u64, unit: Unit) -> Self {
        let name = printable(&name.into()).to_string();
        let message = if let Unit::Steps(unit) = unit { unit } else { "" };
        // Nothing of nothing would be all.
        let bar = ProgressBar::new(steps.max(1)).with_prefix(name.clone()).with_message(message);
        let parts = if let Unit::Layers { layers, .. } = unit { layers.max(1) } else { PARTS };
        let pace = Arc::new(Mutex::new(Pace::new(parts)));
        if let Ok(style) = ProgressStyle::with_template(template) {
            // What cannot be written is not shown.
            let (paced, timed) = (Arc::clone(&pace), Arc::clone(&pace));
            let rate = move |state: &ProgressState, out: &mut dyn Write| {
                _ = out.write_str(&match unit {
                    Unit::Layers { tokens, .. } => tokens_rate(lock(&paced).share_per_s() * tokens as f64),
                    _ => rate(state.per_sec()),
                });
            };
            let left = move |_: &ProgressState, out: &mut dyn Write| {
                _ = out.write_str(&lock(&timed).left().map(left).unwrap_or_default());
            };
            let layer = move |state: &ProgressState, out: &mut dyn Write| {
                if let Unit::Layers { layers, .. } = unit {
                    let at = state.pos() * layers / state.len().unwrap_or(1).max(1);
                    _ = write!(out, "layer {} of {layers}", (at + 1).min(layers));
                }
            };
            let size = |state: &ProgressState, out: &mut dyn Write| {
                let [done, all, rate] =
                    [state.pos(), state.len().unwrap_or(0), state.per_sec() as u64].map(human_bytes);
                _ = write!(out, "{done} of {all}, {rate}/s");
            };
            bar.set_style(
                style
                    .with_key("rate", rate)
                    .with_key("left", left)
                    .with_key("layer", layer)
                    .with_key("size", size)
                    .progress_chars("=> "),
            );
        }
        // The bar's clock is a thread, and indicatif panics where none can be had.
        let is_to_be_had = || std::thread::Builder::new().spawn(|| ()).is_ok_and(|thread| thread.join().is_ok());
        if !bar.is_hidden() && is_to_be_had() {
            bar.enable_steady_tick(Duration::from_millis(500));
        }
        Stage { name, bar, pace, unit }
    }

    /// The steps done, and how many there are.
    pub(crate) fn set(&self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
        self.log();
    }

    /// This many steps were done before; they say nothing of the rate.
    pub(crate) fn begin_at(&self, done: u64, total: u64) {
        let mut pace = lock(&self.pace);
        *pace = Pace { before: done, ..Pace::new(pace.parts) };
        drop(pace);
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

    /// Looks at the pace; where there is no bar, a line where the last is long ago.
    fn log(&self) {
        let mut pace = lock(&self.pace);
        pace.see(self.bar.position(), self.bar.length().unwrap_or(0), Instant::now());
        if self.bar.is_hidden()
            && let Some(line) = pace.line(&self.name)
        {
            drop(pace);
            eprintln!("{line}");
        }
    }
}

fn lock(pace: &Mutex<Pace>) -> MutexGuard<'_, Pace> {
    pace.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How fast a stage goes. The time left is reckoned only where a part of it is done, from all that was done here, and runs down until the
/// next: so it does not jump between the halves of a part that take different times.
struct Pace {
    parts: u64,
    begin: Instant,
    /// Steps that were done before this run.
    before: u64,
    done: u64,
    total: u64,
    /// Where a part was done last.
    mark: Option<Mark>,
    lines: u32,
}

/// The end of a part.
#[derive(Clone, Copy)]
struct Mark {
    at: Instant,
    /// Parts done by then.
    parts: u64,
    /// Seconds that were left.
    left: f64,
    /// The share of the stage that was done in a second.
    share_per_s: f64,
}

impl Pace {
    fn new(parts: u64) -> Self {
        Self { parts, begin: Instant::now(), before: 0, done: 0, total: 0, mark: None, lines: 0 }
    }

    fn see(&mut self, done: u64, total: u64, now: Instant) {
        (self.done, self.total) = (done, total);
        let here = done.saturating_sub(self.before);
        let parts = here * self.parts / total.max(1);
        if parts > self.mark.map_or(0, |mark| mark.parts) && done <= total {
            let seconds = (now - self.begin).as_secs_f64();
            let left = seconds * (total - done) as f64 / here as f64;
            let share_per_s = here as f64 / total as f64 / seconds.max(1e-3);
            self.mark = Some(Mark { at: now, parts, left, share_per_s });
        }
    }

    /// Time left, where something is known of it.
    fn left(&self) -> Option<Duration> {
        let Mark { at, left, .. } = self.mark?;
        Some(Duration::from_secs_f64((left - at.elapsed().as_secs_f64()).max(0.0)))
    }

    /// The share of the stage that is done in a second.
    fn share_per_s(&self) -> f64 {
        self.mark.map_or(0.0, |mark| mark.share_per_s)
    }

    /// A line, where one is due.
    fn line(&mut self, name: &str) -> Option<String> {
        if self.begin.elapsed() < LINES_APART * (self.lines + 1) || self.done >= self.total {
            return None;
        }
        self.lines += 1;
        let left = self.left().map_or_else(String::new, left);
        Some(format!("{name}: {:.0} %{left}", 100.0 * self.done as f64 / self.total as f64))
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

/// The same for tokens that are done with all of it.
fn tokens_rate(per_second: f64) -> String {
    match per_second {
        r if !r.is_finite() || r < 0.1 => String::new(),
        r if r < 10.0 => format!(", {r:.1} tokens/s"),
        r => format!(", {r:.0} tokens/s"),
    }
}

/// What is left; nothing where that is next to nothing.
fn left(left: Duration) -> String {
    if left < Duration::from_secs(1) { String::new() } else { format!(", about {} left", duration(left.as_secs_f64())) }
}

/// What a stage did in its time, where there was no bar to show it.
fn summary(name: &str, unit: Unit, done: u64, elapsed: Duration) -> Option<String> {
    if elapsed < SHORT || done == 0 {
        return None;
    }
    let what = match unit {
        Unit::Bytes => format!("{} ", human_bytes(done)),
        Unit::Steps(unit) => format!("{done} {unit} "),
        Unit::Layers { layers, tokens } => format!("{tokens} tokens, {layers} layers "),
        Unit::Share => String::new(),
    };
    let time = duration(elapsed.as_secs_f64());
    Some(if what.is_empty() { format!("{name}: {time}") } else { format!("{name}: {what}in {time}") })
}

impl Drop for Stage {
    fn drop(&mut self) {
        let hidden = self.bar.is_hidden();
        let (done, total) = (self.bar.position(), self.bar.length().unwrap_or(0));
        self.bar.finish_and_clear();
        let pace = lock(&self.pace);
        // A stage that an error ended did nothing that could be told.
        if hidden
            && done == total
            && let Some(line) = summary(&self.name, self.unit, done - pace.before.min(done), pace.begin.elapsed())
        {
            eprintln!("{line}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_follows_from_the_parts_that_were_done_here() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let left = |pace: &Pace| pace.mark.map(|mark| mark.left.round());
        let mut pace = Pace { begin, ..Pace::new(4) };
        pace.see(10, 80, at(5));
        assert_eq!(left(&pace), None, "the half of a part says nothing");
        pace.see(20, 80, at(40));
        assert_eq!(left(&pace), Some(120.0));
        pace.see(30, 80, at(45));
        assert_eq!(left(&pace), Some(120.0), "it runs down from there");
        pace.see(40, 80, at(80));
        assert_eq!(left(&pace), Some(80.0));
        // What an earlier run did took none of this one's time.
        let mut resumed = Pace { begin, before: 40, ..Pace::new(4) };
        resumed.see(60, 80, at(60));
        assert_eq!(left(&resumed), Some(60.0));
        assert!((resumed.share_per_s() - 0.25 / 60.0).abs() < 1e-9);
    }

    #[test]
    fn a_stage_has_one_line_where_there_is_no_bar_and_more_only_if_it_is_long() {
        let pace = |minutes: u64, lines| Pace {
            begin: Instant::now().checked_sub(Duration::from_secs(60 * minutes)).unwrap(),
            done: 30,
            total: 60,
            lines,
            ..Pace::new(4)
        };
        assert_eq!(pace(9, 0).line("x"), None);
        assert_eq!(pace(11, 0).line("x").unwrap(), "x: 50 %");
        assert_eq!(pace(11, 1).line("x"), None);
        assert_eq!(pace(21, 1).line("x").unwrap(), "x: 50 %");
        let said = |unit, seconds| summary("x", unit, 8, Duration::from_secs(seconds));
        assert_eq!(said(Unit::Steps("layers"), 1), None);
        assert_eq!(said(Unit::Steps("layers"), 300).unwrap(), "x: 8 layers in 5 minutes");
        let layers = Unit::Layers { layers: 8, tokens: 40_000 };
        assert_eq!(said(layers, 10).unwrap(), "x: 40000 tokens, 8 layers in 10 seconds");
    }

    #[test]
    fn bars_show_figures_that_can_be_read() {
        assert_eq!(
            [0.0, f64::NAN, 0.1234, 3.4567, 1234.5678].map(rate),
            ["", "", " (0.12/s)", " (3.5/s)", " (1235/s)"]
        );
        assert_eq!([0.0, 3.4567, 123.4].map(tokens_rate), ["", ", 3.5 tokens/s", ", 123 tokens/s"]);
        assert_eq!([0.0, 0.4, 61.0].map(|s| left(Duration::from_secs_f64(s))), ["", "", ", about 61 seconds left"]);
    }
}
