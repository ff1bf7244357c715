//! Texts that end a generation.

use super::matcher::Matcher;

/// Holds back text that may be the beginning of a stop string.
pub struct StopStrings {
    stops: Vec<Matcher>,
}

impl StopStrings {
    /// Watches for any of `stops`; empty ones are ignored.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops: stops.into_iter().filter(|s| !s.is_empty()).map(Matcher::new).collect() }
    }

    /// Adds text. Returns what can be shown now, and whether a stop string was reached (it is not shown). The first to be complete
    /// counts, however the text was cut; of several that end together the longest.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        // What is held back is the beginning of a stop string, so nobody needs to keep it.
        let begun = self.begun();
        let held = begun.map_or(0, |stop| self.stops[stop].matched());
        let mut shown = None;
        for (at, byte) in text.bytes().enumerate() {
            let complete = |stop: &mut Matcher| stop.step(byte).then_some(stop.pattern().len());
            // All of them must see the byte.
            if let Some(length) = self.stops.iter_mut().filter_map(complete).max() {
                shown = Some(held + at + 1 - length);
                break;
            }
        }
        let stopped = shown.is_some();
        let shown =
            shown.unwrap_or_else(|| held + text.len() - self.begun().map_or(0, |stop| self.stops[stop].matched()));
        let before = begun.map_or("", |stop| &self.stops[stop].pattern()[..shown.min(held)]);
        let shown = [before, &text[..shown.saturating_sub(held)]].concat();
        if stopped {
            self.stops.iter_mut().for_each(Matcher::restart);
        }
        (shown, stopped)
    }

    /// What was held back when the text ends without a stop string.
    pub fn finish(self) -> String {
        self.begun().map_or_else(String::new, |stop| {
            let stop = &self.stops[stop];
            stop.pattern()[..stop.matched()].to_owned()
        })
    }

    /// The stop string of which the text's end has most.
    fn begun(&self) -> Option<usize> {
        (0..self.stops.len()).max_by_key(|stop| self.stops[*stop].matched())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_before_a_stop_string_is_shown_and_the_stop_is_not() {
        let mut stop = StopStrings::new(vec!["END".into(), "\n\n".into()]);
        assert_eq!(stop.push("one E"), ("one ".into(), false));
        assert_eq!(stop.push("N"), (String::new(), false));
        assert_eq!(stop.push("E"), ("EN".into(), false));
        assert_eq!(stop.push("ND two"), (String::new(), true));
    }

    #[test]
    fn held_text_comes_at_the_end() {
        let mut stop = StopStrings::new(vec!["éé".into()]);
        assert_eq!(stop.push("aé"), ("a".into(), false));
        assert_eq!(stop.finish(), "é");
    }

    #[test]
    fn where_a_text_is_cut_makes_no_difference() {
        let stops = || StopStrings::new(vec!["abcd".into(), "bc".into(), "zbc".into(), String::new(), "ééa".into()]);
        for text in ["xabcd", "zbcd", "ab ab abcé", "éééé", "éééa", "abab", ""] {
            let whole = {
                let mut stop = stops();
                let (shown, stopped) = stop.push(text);
                (if stopped { shown } else { shown + &stop.finish() }, stopped)
            };
            let mut stop = stops();
            let (mut shown, mut stopped) = (String::new(), false);
            for character in text.chars() {
                let (more, end) = stop.push(&character.to_string());
                shown += &more;
                stopped = end;
                if end {
                    break;
                }
            }
            if !stopped {
                shown += &stop.finish();
            }
            assert_eq!((shown, stopped), whole, "{text}");
        }
    }

    #[test]
    fn a_long_stop_string_that_nearly_comes_costs_no_more_than_the_text() {
        // Quadratic in the stop string for every token, this would not end.
        let long = "a".repeat(100_000);
        let mut stop = StopStrings::new(vec![format!("{long}b")]);
        let mut shown = 0;
        for _ in 0..300_000 {
            shown += stop.push("a").0.len();
        }
        assert_eq!(shown, 200_000);
        assert_eq!(stop.push("b"), (String::new(), true));
    }
}
