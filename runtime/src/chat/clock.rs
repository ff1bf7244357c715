//! The time as templates tell it: what `strftime` writes, of UTC and in English.

use std::time::{SystemTime, UNIX_EPOCH};

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// `now` in the form that `format` asks for; what stands for nothing known stays as it is.
pub(super) fn formatted(now: SystemTime, format: &str) -> String {
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let (year, month, day, of_year) = date(days);
    let (weekday, month_name) = (DAYS[(days + 4) as usize % 7], MONTHS[month as usize - 1]);
    let hour_of_twelve = (hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        out += &match characters.next() {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('d') => format!("{day:02}"),
            Some('e') => format!("{day:2}"),
            Some('j') => format!("{of_year:03}"),
            Some('H') => format!("{hour:02}"),
            Some('I') => format!("{hour_of_twelve:02}"),
            Some('M') => format!("{minute:02}"),
            Some('S') => format!("{second:02}"),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name[..3].to_owned(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('R') => format!("{hour:02}:{minute:02}"),
            Some('%') => "%".to_owned(),
            Some(other) => format!("%{other}"),
            None => "%".to_owned(),
        };
    }
    out
}

/// Year, month, day, and day of the year of a day since 1970.
fn date(days: u64) -> (u64, u64, u64, u64) {
    let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    // Whole cycles of 400 years, then year by year.
    let (mut year, mut left) = (1970 + days / 146_097 * 400, days % 146_097);
    while left >= 365 + u64::from(is_leap(year)) {
        left -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let (of_year, mut month) = (left + 1, 1);
    for length in [31, 28 + u64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if left < length {
            break;
        }
        left -= length;
        month += 1;
    }
    (year, month, left + 1, of_year)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_are_those_of_strftime() {
        let all = "%Y-%m-%d %H:%M:%S %A %a %B %b %d %j %y %I %p %% %F %T %Q";
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 Thursday Thu January Jan 01 001 70 12 AM % 1970-01-01 00:00:00 %Q"),
            (951_782_399, "2000-02-28 23:59:59 Monday Mon February Feb 28 059 00 11 PM % 2000-02-28 23:59:59 %Q"),
            (951_825_600, "2000-02-29 12:00:00 Tuesday Tue February Feb 29 060 00 12 PM % 2000-02-29 12:00:00 %Q"),
            (1_735_689_599, "2024-12-31 23:59:59 Tuesday Tue December Dec 31 366 24 11 PM % 2024-12-31 23:59:59 %Q"),
        ] {
            assert_eq!(formatted(UNIX_EPOCH + Duration::from_secs(seconds), all), text);
        }
    }
}
