//! What reading costs: a linear model, fitted to a disk's measured profile, and the disk that is assumed where none was measured.

mod observed;

use std::path::{Path, PathBuf};

use flashlm_formats::regular::read_regular;
use flashlm_io::{DiskProfile, cache_dir, device_key};
pub use observed::ObservedCost;
use serde::Serialize;

/// Longest profile of a disk.
const PROFILE_BYTES_MAX: u64 = 16 << 20;

/// What a byte costs in DRAM, in nanoseconds, be it wanted or not: at 20 GB/s.
pub const DRAM_BYTE_NS: f64 = 0.05;

/// What reading costs on a disk that is kept busy: so much for each request, so much for each byte.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ReadCost {
    request_ns: f64,
    byte_ns: f64,
}

/// Why numbers do not describe a disk.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ReadCostError {
    /// A measured point is not a positive size with a positive bandwidth.
    #[error("point {at}: {bytes} bytes at {bytes_per_s} bytes/s; both must be positive numbers")]
    Point {
        /// Index of the point.
        at: usize,
        /// Its request size.
        bytes: u64,
        /// Its bandwidth.
        bytes_per_s: f64,
    },
    /// One size alone cannot tell requests from bytes.
    #[error("{found} different request sizes measured, at least 2 are needed")]
    TooFewSizes {
        /// Different sizes given.
        found: usize,
    },
    /// A cost that is negative, infinite or not a number, or bytes that cost nothing.
    #[error(
        "{request_ns} ns a request and {byte_ns} ns a byte: a request may not cost less than 0, a byte must cost something"
    )]
    Cost {
        /// Cost of a request.
        request_ns: f64,
        /// Cost of a byte.
        byte_ns: f64,
    },
}

impl ReadCost {
    /// A disk of which nothing is known: 16 KiB at 0.74 GB/s, 64 KiB at 1.4 GB/s. Orders that are made without a profile are made for it.
    pub const USUAL: Self = Self { request_ns: 14_000.0, byte_ns: 0.5 };

    /// A cost of `request_ns` for each request and `byte_ns` for each byte.
    pub fn new(request_ns: f64, byte_ns: f64) -> Result<Self, ReadCostError> {
        if request_ns >= 0.0 && request_ns.is_finite() && byte_ns > 0.0 && byte_ns.is_finite() {
            Ok(ReadCost { request_ns, byte_ns })
        } else {
            Err(ReadCostError::Cost { request_ns, byte_ns })
        }
    }

    /// Fits the cost to a disk profile: pairs of request size in bytes and bandwidth in bytes per second, each at the
    /// depth that served that size best.
    ///
    /// Least squares of the relative error, so that small requests count as much as large ones. Where the fit would make
    /// requests free or worse, the best cost without them is taken; likewise for bytes.
    pub fn fit(points: &[(u64, f64)]) -> Result<Self, ReadCostError> {
        for (at, &(bytes, bytes_per_s)) in points.iter().enumerate() {
            if bytes == 0 || !(bytes_per_s > 0.0 && bytes_per_s.is_finite()) {
                return Err(ReadCostError::Point { at, bytes, bytes_per_s });
            }
        }
        let mut sizes: Vec<u64> = points.iter().map(|p| p.0).collect();
        sizes.sort_unstable();
        sizes.dedup();
        if sizes.len() < 2 {
            return Err(ReadCostError::TooFewSizes { found: sizes.len() });
        }
        let mut sums = Sums::default();
        points.iter().for_each(|&(bytes, rate)| sums.add(1, bytes, bytes as f64 / rate * 1e9, 1.0));
        // Bandwidth that grows with the size: the largest size bounds what a byte costs.
        let best = points.iter().map(|p| p.1).fold(0.0, f64::max);
        let (request_ns, byte_ns) = sums.solve(1e9 / best);
        ReadCost::new(request_ns, byte_ns)
    }

    /// Fits the cost to a measured profile.
    ///
    /// # Errors
    /// As [`ReadCost::fit`].
    pub fn of_profile(profile: &DiskProfile) -> Result<Self, ReadCostError> {
        // Of each size the depth that served it best.
        let mut points: Vec<(u64, f64)> = profile.random.iter().map(|r| (r.read_bytes, r.bytes_per_s())).collect();
        points.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1)));
        points.dedup_by_key(|p| p.0);
        ReadCost::fit(&points)
    }

    /// Cost of one request, in nanoseconds.
    pub fn request_ns(&self) -> f64 {
        self.request_ns
    }

    /// Cost of one byte, in nanoseconds.
    pub fn byte_ns(&self) -> f64 {
        self.byte_ns
    }

    /// Time for `requests` reads of `bytes` in all, in nanoseconds.
    pub fn nanoseconds(&self, requests: u64, bytes: u64) -> f64 {
        self.request_ns * requests as f64 + self.byte_ns * bytes as f64
    }

    /// The bytes that can be read in the time of one more request: the longest gap worth reading through. They also pass through
    /// DRAM, which computing needs meanwhile.
    pub fn gap_bytes_max(&self) -> u64 {
        (self.request_ns / (self.byte_ns + DRAM_BYTE_NS)) as u64
    }
}

/// Least squares of the relative error of `request_ns * requests + byte_ns * bytes` against times that were measured.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    rr: f64,
    rb: f64,
    bb: f64,
    r1: f64,
    b1: f64,
    weight: f64,
}

impl Sums {
    /// Takes a measured time into account.
    fn add(&mut self, requests: u64, bytes: u64, ns: f64, weight: f64) {
        let (u, v) = (requests as f64 / ns, bytes as f64 / ns);
        self.join(&Self { rr: u * u, rb: u * v, bb: v * v, r1: u, b1: v, weight: 1.0 }.times(weight));
    }

    fn times(self, factor: f64) -> Self {
        let Self { rr, rb, bb, r1, b1, weight } = self;
        let [rr, rb, bb, r1, b1, weight] = [rr, rb, bb, r1, b1, weight].map(|sum| sum * factor);
        Self { rr, rb, bb, r1, b1, weight }
    }

    /// The same, had every time been longer by `factor`.
    fn slower(self, factor: f64) -> Self {
        let Self { rr, rb, bb, r1, b1, weight } = self;
        let [rr, rb, bb] = [rr, rb, bb].map(|sum| sum / factor / factor);
        Self { rr, rb, bb, r1: r1 / factor, b1: b1 / factor, weight }
    }

    /// The factor that fits times that `cost` says to those that were measured.
    fn slowness(&self, cost: &ReadCost) -> f64 {
        let ReadCost { request_ns: r, byte_ns: b } = *cost;
        (r * self.r1 + b * self.b1) / (r * r * self.rr + 2.0 * r * b * self.rb + b * b * self.bb)
    }

    fn scale(&mut self, factor: f64) {
        *self = self.times(factor);
    }

    fn join(&mut self, other: &Self) {
        self.rr += other.rr;
        self.rb += other.rb;
        self.bb += other.bb;
        self.r1 += other.r1;
        self.b1 += other.b1;
        self.weight += other.weight;
    }

    /// The costs of a request and of a byte. Where they would make requests free or worse, the best cost without them; where bytes,
    /// `byte_ns` and the best cost of a request with it.
    fn solve(&self, byte_ns: f64) -> (f64, f64) {
        let Self { rr, rb, bb, r1, b1, .. } = *self;
        let det = rr * bb - rb * rb;
        let (request, byte) = ((r1 * bb - b1 * rb) / det, (rr * b1 - rb * r1) / det);
        if request < 0.0 {
            return (0.0, b1 / bb);
        }
        if byte <= 0.0 {
            return (((r1 - byte_ns * rb) / rr).max(0.0), byte_ns);
        }
        (request, byte)
    }
}

/// A disk profile cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskProfileError {
    /// The file cannot be read.
    #[error("cannot read the disk profile {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is something else.
    #[error("{} is not a disk profile; `flashlm disk PATH` makes one: {source}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// Rates that no disk has.
    #[error("{}: a profile with impossible rates, or of another version; measure again", path.display())]
    Unsound {
        /// The file.
        path: PathBuf,
    },
    /// Nothing can be fitted to it.
    #[error("{}: {source}", path.display())]
    Fit {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: ReadCostError,
    },
}

/// The disk profile in a file, as `flashlm disk` keeps it.
///
/// # Errors
/// If the file is no profile.
pub fn read_profile(path: &Path) -> Result<DiskProfile, DiskProfileError> {
    let path = path.to_owned();
    let text = match read_regular(&path, PROFILE_BYTES_MAX) {
        Ok(text) => text,
        Err(source) => return Err(DiskProfileError::Io { path, source }),
    };
    let profile: DiskProfile = match serde_json::from_slice(&text) {
        Ok(profile) => profile,
        Err(source) => return Err(DiskProfileError::Malformed { path, source }),
    };
    if profile.is_sound() { Ok(profile) } else { Err(DiskProfileError::Unsound { path }) }
}

/// The cost that fits the profile in a file.
///
/// # Errors
/// If the file is no profile, or none that a cost can be fitted to.
pub fn profiled_cost(path: &Path) -> Result<ReadCost, DiskProfileError> {
    let profile = read_profile(path)?;
    ReadCost::of_profile(&profile).map_err(|source| DiskProfileError::Fit { path: path.to_owned(), source })
}

/// The name of the disk below `path`, and the profile that `flashlm disk` has kept for it.
pub fn kept_profile(path: &Path) -> (String, Option<DiskProfile>) {
    let device = device_key(path);
    let profile = cache_dir().and_then(|dir| DiskProfile::load(&dir, &device));
    (device, profile)
}

/// What reading `path` costs, from the kept profile of its disk or supposed, and which of the two, as a noun with more about it.
pub fn known_cost(path: &Path) -> (ReadCost, String) {
    let (device, profile) = kept_profile(path);
    match profile.and_then(|profile| ReadCost::of_profile(&profile).ok()) {
        Some(cost) => (cost, format!("the kept profile of {device}{}", measured(&device))),
        None => (ReadCost::USUAL, format!("a typical disk; `flashlm disk {}` measures yours", path.display())),
    }
}

/// How old the kept profile of a disk is, in words.
fn measured(device: &str) -> String {
    match cache_dir().and_then(|dir| DiskProfile::age(&dir, device)).map(|age| age.as_secs()) {
        None => String::new(),
        Some(seconds) if seconds < 3600 => ", measured within the hour".into(),
        Some(seconds) if seconds < 2 * 24 * 3600 => format!(", measured {} hours ago", seconds / 3600),
        Some(seconds) => format!(", measured {} days ago", seconds / (24 * 3600)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cost_is_fitted_to_a_profile() {
        // 10 us a request and 2 GB/s.
        let points: Vec<_> = [4096u64, 16384, 65536, 262144]
            .iter()
            .map(|&s| (s, s as f64 / (10_000.0 + s as f64 * 0.5) * 1e9))
            .collect();
        let cost = ReadCost::fit(&points).unwrap();
        assert!((cost.request_ns() - 10_000.0).abs() < 1e-3, "{cost:?}");
        assert!((cost.byte_ns() - 0.5).abs() < 1e-9, "{cost:?}");
        // 0.05 ns more for a byte that nobody wants.
        assert!(cost.gap_bytes_max().abs_diff(18_181) <= 1, "{cost:?}");

        // The same bandwidth at every size: requests are free.
        let flat = ReadCost::fit(&[(4096, 1e9), (65536, 1e9)]).unwrap();
        assert!(flat.request_ns() < 1e-6 && (flat.byte_ns() - 1.0).abs() < 1e-9, "{flat:?}");
        // The same request rate at every size: bytes cost at most what the best bandwidth says.
        let iops = ReadCost::fit(&[(4096, 4.096e8), (65536, 6.5536e9)]).unwrap();
        assert!(iops.request_ns() > 0.0 && iops.byte_ns() > 0.0, "{iops:?}");
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(matches!(ReadCost::fit(&[(4096, 1e9)]), Err(ReadCostError::TooFewSizes { found: 1 })));
        assert!(matches!(ReadCost::fit(&[(4096, 1e9), (0, 1e9)]), Err(ReadCostError::Point { at: 1, .. })));
        assert!(matches!(ReadCost::fit(&[(4096, f64::NAN), (1, 1e9)]), Err(ReadCostError::Point { at: 0, .. })));
        assert!(ReadCost::new(-1.0, 1.0).is_err());
        assert!(ReadCost::new(1.0, 0.0).is_err());
        assert!(ReadCost::new(f64::INFINITY, 1.0).is_err());
    }
}
