//! What the system is told about its cache of a file's pages, where it can be told: not on macOS. Failing costs memory or time, and
//! nothing else.

use std::fs::File;

/// What the system may expect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// The part will be read from its beginning to its end.
    Sequential,
    /// The part will not be needed soon. What of it is still to be written is begun to be written.
    DontNeed,
}

/// Advises for `length` bytes from `offset`; a length of 0 is all that follows.
#[cfg(any(target_os = "linux", target_os = "android", target_os = "freebsd"))]
pub fn advise(file: &File, offset: u64, length: u64, advice: Advice) {
    let advice = match advice {
        Advice::Sequential => rustix::fs::Advice::Sequential,
        Advice::DontNeed => rustix::fs::Advice::DontNeed,
    };
    let _ = rustix::fs::fadvise(file, offset, std::num::NonZeroU64::new(length), advice);
}

/// Nothing can be said here.
#[cfg(not(any(target_os = "linux", target_os = "android", target_os = "freebsd")))]
pub fn advise(_: &File, _: u64, _: u64, _: Advice) {}
