//! The time as templates tell it: what Python's `strftime` writes, in English.

use std::time::SystemTime;

use jiff::fmt::strtime::{BrokenDownTime, Config};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ZonedDateTime};

/// `now` in this time zone, in the form that `format` asks for; what stands for nothing known stays as it is.
pub(super) fn formatted(now: SystemTime, zone: TimeZone, format: &str) -> String {
    let now = Timestamp::try_from(now).unwrap_or_default();
    let time = BrokenDownTime::from(&ZonedDateTime::new(now, zone));
    let lenient = Config::new().lenient(true);
    time.to_string_with_config(&lenient, format).unwrap_or_else(|_| format.to_owned())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    #[test]
    fn times_are_those_of_strftime() {
        let all = "%Y-%m-%d %H:%M:%S %A %a %B %b %d %j %y %I %p %% %F %T %Ö";
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 Thursday Thu January Jan 01 001 70 12 AM % 1970-01-01 00:00:00 %Ö"),
            (951_782_399, "2000-02-28 23:59:59 Monday Mon February Feb 28 059 00 11 PM % 2000-02-28 23:59:59 %Ö"),
            (951_825_600, "2000-02-29 12:00:00 Tuesday Tue February Feb 29 060 00 12 PM % 2000-02-29 12:00:00 %Ö"),
            (1_735_689_599, "2024-12-31 23:59:59 Tuesday Tue December Dec 31 366 24 11 PM % 2024-12-31 23:59:59 %Ö"),
        ] {
            let time = UNIX_EPOCH + Duration::from_secs(seconds);
            assert_eq!(formatted(time, TimeZone::UTC, all), text);
        }
        let east = TimeZone::fixed(jiff::tz::offset(2));
        assert_eq!(formatted(UNIX_EPOCH, east, "%H:%M"), "02:00");
        assert_eq!(formatted(UNIX_EPOCH, TimeZone::UTC, "100 %"), "100 %");
    }
}
