//! Whether to ask a server again, and after how long; and how slowly it may send.

use std::io::{self, Read};
use std::time::{Duration, Instant};

use ureq::http::HeaderMap;

/// Attempts in a row that bring nothing.
const ATTEMPTS_MAX: u32 = 5;
/// Wait before the second attempt; doubled before each further one.
const WAIT: Duration = Duration::from_millis(250);
/// The longest wait that a server may ask for; beyond it the user decides.
const ASKED_MAX: Duration = Duration::from_secs(120);

/// An attempt that brings less is none, or a server could keep its client busy forever, byte by byte.
const GAIN_BYTES_MIN: u64 = 1 << 16;

/// The slowest that bytes may come: what brings fewer than `bytes` in each `time` is given up.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// So many bytes ..
    pub bytes: u64,
    /// .. within so much time.
    pub time: Duration,
}

impl Pace {
    /// A kilobyte a second, over half a minute or three of the longest waits.
    pub(super) fn patient(wait: Duration) -> Self {
        let time = Duration::from_secs(30).max(wait.saturating_mul(3));
        Self { bytes: time.as_secs().saturating_mul(1000), time }
    }

    /// Bytes that come in `time` at this pace.
    fn in_time(self, time: Duration) -> u64 {
        (self.bytes as f64 * time.as_secs_f64() / self.time.as_secs_f64()) as u64
    }
}

/// What the attempts at a file have brought.
#[derive(Default)]
pub(super) struct Attempts {
    /// The furthest byte that any of them reached: what comes again is no progress.
    furthest: u64,
    /// So many in a row brought nothing.
    failed: u32,
}

impl Attempts {
    /// Begins with `have` bytes.
    pub(super) fn from(have: u64) -> Self {
        Self { furthest: have, failed: 0 }
    }

    /// An attempt broke at byte `have`; with the wait before it, it took `time`. Gives how many in a row brought nothing; the one
    /// after progress is the first.
    pub(super) fn broke(&mut self, have: u64, time: Duration, pace: Pace) -> u32 {
        let gain = have.saturating_sub(self.furthest);
        let is_progress = gain >= GAIN_BYTES_MIN.max(pace.in_time(time));
        self.furthest = self.furthest.max(have);
        self.failed = if is_progress { 1 } else { self.failed + 1 };
        self.failed
    }
}

/// A reader that ends with `TimedOut` when bytes come more slowly than they may. Only the time spent waiting for them counts.
pub(super) struct Paced<R> {
    inner: R,
    pace: Pace,
    waited: Duration,
    bytes: u64,
}

impl<R: Read> Paced<R> {
    pub(super) fn new(inner: R, pace: Pace) -> Self {
        Self { inner, pace, waited: Duration::ZERO, bytes: 0 }
    }
}

impl<R: Read> Read for Paced<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let begin = Instant::now();
        let n = self.inner.read(buffer)?;
        self.waited += begin.elapsed();
        self.bytes += n as u64;
        if n > 0 && self.waited >= self.pace.time {
            let Pace { bytes, time } = self.pace;
            if self.bytes < bytes {
                let what = format!("only {} bytes arrived in {} s", self.bytes, time.as_secs_f64());
                return Err(io::Error::new(io::ErrorKind::TimedOut, what));
            }
            (self.waited, self.bytes) = (Duration::ZERO, 0);
        }
        Ok(n)
    }
}

/// Whether a status says that the same request may do better later.
pub(super) fn is_passing(status: u16) -> bool {
    matches!(status, 408 | 429 | 500..)
}

/// The wait before the next attempt, after this many in a row that brought nothing; none where no further one is made.
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
    fn only_what_goes_beyond_the_furthest_byte_is_progress() {
        let (pace, second) = (Pace { bytes: 30_000, time: Duration::from_secs(30) }, Duration::from_secs(1));
        let failed = |broken_at: &[u64], time| {
            let mut attempts = Attempts::from(1_000_000);
            broken_at.iter().map(|&have| attempts.broke(have, time, pace)).collect::<Vec<_>>()
        };
        assert_eq!(failed(&[2_000_000, 3_000_000, 3_000_000], second), [1, 1, 2]);
        // 416, then everything from the start, by turns; and one that gives a little more each time.
        assert_eq!(failed(&[0, 1_000_000, 0, 999_999, 0], second), [1, 2, 3, 4, 5]);
        assert_eq!(failed(&[1_000_001, 1_000_100, 1_001_000], second), [1, 2, 3]);
        // Enough, but between waits that are longer than it is worth.
        let long = Duration::from_secs(120);
        assert_eq!(failed(&[1_100_000, 1_200_000, 1_400_000], long), [1, 2, 1]);
    }

    /// A byte at each read, each after so long.
    struct Dripping(Duration);

    impl Read for Dripping {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            std::thread::sleep(self.0);
            buffer[0] = b'x';
            Ok(1)
        }
    }

    #[test]
    fn bytes_that_come_too_slowly_are_given_up() {
        let mut all = Vec::new();
        let pace = Pace { bytes: 1 << 20, time: Duration::from_millis(20) };
        let error = Paced::new(Dripping(Duration::from_millis(1)), pace).read_to_end(&mut all).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(error.to_string().contains("bytes arrived in 0.02 s"), "{error}");
        // Slow and steady is enough.
        let pace = Pace { bytes: 1, time: Duration::from_millis(20) };
        let some = Paced::new(Dripping(Duration::from_millis(1)).take(100), pace).read_to_end(&mut all);
        assert_eq!(some.unwrap(), 100);
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
