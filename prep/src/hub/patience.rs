//! Whether to ask a server again, and after how long: decisions only.

use std::time::Duration;

use ureq::http::HeaderMap;

/// Attempts in a row that bring nothing.
const ATTEMPTS_MAX: u32 = 5;
/// Wait before the second attempt; doubled before each further one.
const WAIT: Duration = Duration::from_millis(250);
/// The longest wait that a server may ask for; beyond it the user decides.
const ASKED_MAX: Duration = Duration::from_secs(120);

/// Whether a status says that the same request may do better later.
pub(super) fn is_passing(status: u16) -> bool {
    matches!(status, 408 | 429 | 500..)
}

/// The wait before the next attempt, after so many in a row that brought nothing; none where no further one is made.
pub(super) fn wait(failed: u32, asked: Option<Duration>) -> Option<Duration> {
    let asked = asked.unwrap_or_default();
    let own = WAIT * 2u32.pow(failed.clamp(1, ATTEMPTS_MAX) - 1);
    (failed < ATTEMPTS_MAX && asked <= ASKED_MAX).then(|| asked.max(own))
}

/// How long a server asks to be left alone: `Retry-After` in seconds, or what is left of the hub's `RateLimit: "api";r=0;t=55`.
pub(super) fn asked(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: &str| headers.get(name)?.to_str().ok();
    let after = text("retry-after").and_then(|text| text.trim().parse().ok());
    let limit = || text("ratelimit")?.split(';').find_map(|part| part.trim().strip_prefix("t=")?.parse().ok());
    after.or_else(limit).map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_and_end() {
        let waits: Vec<u128> = (1..9).map_while(|failed| wait(failed, None)).map(|wait| wait.as_millis()).collect();
        assert_eq!(waits, [250, 500, 1000, 2000]);
        let seconds = |n| Some(Duration::from_secs(n));
        assert_eq!((wait(1, seconds(7)), wait(4, seconds(1))), (seconds(7), seconds(2)));
        assert_eq!((wait(1, seconds(121)), wait(5, seconds(7))), (None, None));
    }

    #[test]
    fn what_a_server_asks_for_is_read() {
        let read = |pairs: &[(&'static str, &str)]| {
            let mut headers = HeaderMap::new();
            pairs.iter().for_each(|(name, value)| _ = headers.insert(*name, value.parse().unwrap()));
            asked(&headers).map(|asked| asked.as_secs())
        };
        assert_eq!(read(&[("retry-after", " 30 ")]), Some(30));
        assert_eq!(read(&[("ratelimit", "\"resolvers\";r=0;t=55")]), Some(55));
        assert_eq!(read(&[("ratelimit", "\"api\";r=0;t=55"), ("retry-after", "3")]), Some(3));
        for unread in [&[("retry-after", "Wed, 25 Nov 2026 12:00:00 GMT")][..], &[("ratelimit", "r=0")], &[]] {
            assert_eq!(read(unread), None, "{unread:?}");
        }
    }
}
