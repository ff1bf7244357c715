//! Numbers on the command line: the one place that says which are allowed.

use std::ops::RangeInclusive;

/// Tokens that any command takes: a hundred million, hundreds of gigabytes of recorded inputs even of a small model.
pub(crate) const TOKENS_MAX: u64 = 100_000_000;

/// An integer within bounds.
fn whole(text: &str, bounds: RangeInclusive<u64>) -> Result<usize, String> {
    match text.parse::<u64>() {
        Ok(number) if bounds.contains(&number) => Ok(number as usize),
        _ => Err(format!("expected an integer from {} to {}", bounds.start(), bounds.end())),
    }
}

/// Tokens to look at or to take.
pub(crate) fn tokens(text: &str) -> Result<usize, String> {
    whole(text, 1..=TOKENS_MAX)
}

/// Tokens that a model sees as one text; it sees no more than it has positions for.
pub(crate) fn sequence(text: &str) -> Result<usize, String> {
    whole(text, 2..=TOKENS_MAX)
}

/// Few of something of which each costs a pass over everything: windows, partners.
pub(crate) fn few(text: &str) -> Result<usize, String> {
    whole(text, 1..=1024)
}

/// Minutes: two years at most.
pub(crate) fn minutes(text: &str) -> Result<u64, String> {
    whole(text, 1..=1 << 20).map(|minutes| minutes as u64)
}

/// A count of small things: epochs, ranks, records of a group.
pub(crate) fn count(text: &str) -> Result<usize, String> {
    whole(text, 1..=65_536)
}

/// Bytes of something that is read at once.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    whole(text, 1..=1 << 30).map(|bytes| bytes as u64)
}

fn number(text: &str, expected: &str, fits: impl Fn(f64) -> bool) -> Result<f64, String> {
    text.parse().ok().filter(|number| fits(*number)).ok_or_else(|| format!("expected {expected}"))
}

/// A share of a whole, neither nothing nor all of it: `0.96`.
pub(crate) fn share(text: &str) -> Result<f64, String> {
    number(text, "a share above 0 and below 1, such as 0.96", |share| share > 0.0 && share < 1.0)
}

/// A share that may be nothing or all: `0.05`.
pub(crate) fn part(text: &str) -> Result<f64, String> {
    number(text, "a share from 0 to 1, such as 0.05", |share| (0.0..=1.0).contains(&share))
}

/// A step size of training: `0.003`.
pub(crate) fn step_size(text: &str) -> Result<f32, String> {
    number(text, "a number above 0 and at most 1, such as 0.003", |size| size > 0.0 && size <= 1.0)
        .map(|size| size as f32)
}

/// How many times as much: `1.5`.
pub(crate) fn times(text: &str) -> Result<f64, String> {
    number(text, "a number from 0 to 1000, such as 1.5", |times| (0.0..=1000.0).contains(&times))
}

/// A percentage: `9%`, as a share.
pub(crate) fn percent(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').and_then(|number| number.trim().parse::<f64>().ok());
    match number {
        Some(percent) if percent > 0.0 && percent <= 100.0 => Ok(percent / 100.0),
        _ => Err("expected a percentage above 0% and at most 100%, such as 9%".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_numbers_are_refused_everywhere() {
        const NONSENSE: [&str; 9] = ["nan", "-1", "", "x", "inf", "-inf", "18446744073709551615", "1e400", "0x10"];
        for text in NONSENSE {
            let parsed = [tokens(text).is_ok(), sequence(text).is_ok(), count(text).is_ok(), bytes(text).is_ok()];
            assert_eq!(parsed, [false; 4], "{text:?}");
            assert!(few(text).is_err() && minutes(text).is_err(), "{text:?}");
            assert!(step_size(text).is_err(), "{text:?}");
            let parsed = [share(text).is_ok(), part(text).is_ok(), times(text).is_ok(), percent(text).is_ok()];
            assert_eq!(parsed, [false; 4], "{text:?}");
            assert!(percent(&format!("{text}%")).is_err(), "{text:?}%");
        }
        assert!(tokens("0").is_err() && sequence("1").is_err() && count("0").is_err() && bytes("0").is_err());
        assert!(share("0").is_err() && share("1").is_err() && share("2").is_err() && share("0.96") == Ok(0.96));
        assert!(part("0") == Ok(0.0) && part("1") == Ok(1.0) && part("1.01").is_err());
        assert!(step_size("0").is_err() && step_size("1.1").is_err() && step_size("0.003") == Ok(3e-3));
        assert!(times("0") == Ok(0.0) && times("1.5") == Ok(1.5));
        assert_eq!((percent("9%"), percent("0.5 %")), (Ok(0.09), Ok(0.005)));
        assert!(percent("9").is_err() && percent("0%").is_err() && percent("101%").is_err());
        assert_eq!((tokens("20000"), sequence("2"), count("8"), bytes("4096")), (Ok(20_000), Ok(2), Ok(8), Ok(4096)));
    }
}
