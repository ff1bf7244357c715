//! What a disk can do, and what a set of reads would therefore cost. Pure arithmetic; see `measure` for the
//! measuring and `profile_store` for where profiles are kept.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Version of the stored form; a profile of another version is measured again.
pub const PROFILE_VERSION: u32 = 1;

/// Measured rates of one disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DiskProfile {
    /// [`PROFILE_VERSION`] when it was written.
    pub version: u32,
    /// Which disk: [`crate::device_key`].
    pub device: String,
    /// `direct` or `buffered`: how it was measured.
    pub mode: String,
    /// Name of the engine it was measured with.
    pub engine: String,
    /// Bytes per second of a long sequential read.
    pub sequential_bytes_per_s: f64,
    /// Random reads, by size, then depth.
    pub random: Vec<RandomRate>,
}

/// The rate of random reads of one size at one depth.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RandomRate {
    /// Bytes of a read.
    pub read_bytes: u64,
    /// Reads in flight.
    pub depth: u32,
    /// Reads per second.
    pub reads_per_s: f64,
}

impl RandomRate {
    /// Bytes per second.
    pub fn bytes_per_s(&self) -> f64 {
        self.reads_per_s * self.read_bytes as f64
    }
}

impl DiskProfile {
    /// Whether every rate is a positive number and sizes rise: what arithmetic below relies on. Check loaded ones.
    pub fn is_sound(&self) -> bool {
        let positive = |x: f64| x.is_finite() && x > 0.0;
        self.version == PROFILE_VERSION
            && positive(self.sequential_bytes_per_s)
            && !self.random.is_empty()
            && self.random.iter().all(|r| positive(r.reads_per_s) && r.read_bytes > 0 && r.depth > 0)
            && self.random.is_sorted_by_key(|r| (r.read_bytes, r.depth))
    }

    /// The depth that gives the most over all sizes, each size judged against its own best.
    pub fn best_depth(&self) -> u32 {
        let score = |depth: u32| -> f64 {
            self.random.iter().filter(|r| r.depth == depth).map(|r| r.reads_per_s * self.cost_us(r.read_bytes)).sum()
        };
        self.random.iter().map(|r| r.depth).max_by(|&a, &b| score(a).total_cmp(&score(b))).unwrap_or(1)
    }

    /// Microseconds of disk time that one read of this size takes when many are in flight: the inverse of the best
    /// rate. Interpolated between measured sizes in the logarithm of the size; smaller reads cost as the smallest,
    /// larger ones by bandwidth.
    pub fn cost_us(&self, read_bytes: u64) -> f64 {
        if read_bytes == 0 {
            return 0.0;
        }
        let mut below: Option<(u64, f64)> = None;
        let mut rates = self.random.iter().peekable();
        while let Some(first) = rates.next() {
            let mut best = first.reads_per_s;
            while let Some(next) = rates.next_if(|next| next.read_bytes == first.read_bytes) {
                best = best.max(next.reads_per_s);
            }
            let here = (first.read_bytes, 1e6 / best);
            if read_bytes <= here.0 {
                let Some(below) = below else { return here.1 };
                let span = (here.0 as f64 / below.0 as f64).ln();
                let along = (read_bytes as f64 / below.0 as f64).ln() / span;
                return below.1 * (here.1 / below.1).powf(along);
            }
            below = Some(here);
        }
        let sequential = |bytes: u64| bytes as f64 / self.sequential_bytes_per_s * 1e6;
        match below {
            Some((largest, cost)) => cost + sequential(read_bytes - largest),
            None => sequential(read_bytes),
        }
    }

    /// Time that a histogram of (bytes of a read, how many) takes.
    pub fn histogram_time(&self, reads: impl IntoIterator<Item = (u64, u64)>) -> Duration {
        let us: f64 = reads.into_iter().map(|(bytes, count)| self.cost_us(bytes) * count as f64).sum();
        Duration::from_secs_f64((us / 1e6).max(0.0))
    }

    /// Time of `requests` reads of equal size, `bytes` together.
    pub fn read_time(&self, bytes: u64, requests: u64) -> Duration {
        match bytes.checked_div(requests) {
            None => Duration::ZERO,
            Some(each) => self.histogram_time([(each, requests)]),
        }
    }

    /// Bytes that could be read in the time that one more read costs: reading through a gap shorter than this is
    /// cheaper than a second read. `read_bytes` is the usual size of a read.
    pub fn gap_bytes(&self, read_bytes: u64) -> u64 {
        let one = self.cost_us(read_bytes);
        // Two reads cost `2 * one`; find the largest single read that costs no more.
        let (mut low, mut high) = (2 * read_bytes, 64 << 20);
        while low + 512 < high {
            let middle = low + (high - low) / 2;
            if self.cost_us(middle) <= 2.0 * one { low = middle } else { high = middle }
        }
        if self.cost_us(low) > 2.0 * one { 0 } else { low - 2 * read_bytes }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A disk of at most 50 000 reads and 1 GB a second, whichever is reached first.
    pub(crate) fn plain_disk() -> DiskProfile {
        let rate = |bytes: u64, depth: u32| RandomRate {
            read_bytes: bytes,
            depth,
            reads_per_s: (1e9 / bytes as f64).min(50_000.0) * if depth == 1 { 0.1 } else { 1.0 },
        };
        DiskProfile {
            version: PROFILE_VERSION,
            device: "plain".into(),
            mode: "direct".into(),
            engine: "io_uring".into(),
            sequential_bytes_per_s: 1e9,
            random: [4096u64, 16384, 65536, 262_144].iter().flat_map(|&b| [rate(b, 1), rate(b, 64)]).collect(),
        }
    }

    #[test]
    fn costs_follow_the_best_depth_and_interpolate() {
        let disk = plain_disk();
        assert!(disk.is_sound());
        assert_eq!(disk.best_depth(), 64);
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-6 * b.max(1.0), "{a} {b}");
        near(disk.cost_us(512), 20.0);
        near(disk.cost_us(4096), 20.0);
        near(disk.cost_us(8192), 20.0);
        near(disk.cost_us(65_536), 65.536);
        near(disk.cost_us(131_072), 131.072);
        near(disk.cost_us(1 << 20), 1048.576);
        near(disk.cost_us(0), 0.0);
        assert_eq!(disk.read_time(65_536 * 10, 10).as_micros(), 655);
        assert_eq!(disk.read_time(0, 0), Duration::ZERO);
        for bytes in (512..300_000).step_by(512) {
            assert!(disk.cost_us(bytes) <= disk.cost_us(bytes + 512) + 1e-9, "{bytes}");
        }
    }

    #[test]
    fn gaps_are_worth_reading_where_requests_are_dear() {
        let disk = plain_disk();
        // Below the request limit a second 4 KiB read costs as much as some 36 KB in one read.
        let gap = disk.gap_bytes(4096);
        assert!((20_000..40_000).contains(&gap), "{gap}");
        assert!(disk.cost_us(2 * 4096 + gap) <= 2.0 * disk.cost_us(4096) + 1e-6);
        // Large reads are bound by bandwidth: nothing is free.
        assert!(disk.gap_bytes(262_144) <= 512, "{}", disk.gap_bytes(262_144));
    }

    #[test]
    fn unsound_profiles_are_recognised() {
        let spoil: [&dyn Fn(&mut DiskProfile); 5] = [
            &|p| p.version += 1,
            &|p| p.sequential_bytes_per_s = 0.0,
            &|p| p.random[0].reads_per_s = f64::NAN,
            &|p| p.random.clear(),
            &|p| p.random.swap(0, 5),
        ];
        for (i, spoil) in spoil.iter().enumerate() {
            let mut disk = plain_disk();
            spoil(&mut disk);
            assert!(!disk.is_sound(), "{i}");
        }
    }
}
