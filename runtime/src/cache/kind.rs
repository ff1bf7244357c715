//! The policies that there are, by name.

use std::fmt;
use std::str::FromStr;

use super::lfu::Lfu;
use super::policy::Policy;
use super::recency::Recency;
use super::s3_fifo::S3Fifo;
use super::w_tinylfu::WTinyLfu;
use crate::buffers::Buffers;

/// The policies there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PolicyKind {
    /// What the last `k` tokens used is kept, nothing else; the oldest goes first where that is too much. The paper's.
    Window(u32),
    /// The least recently used goes first.
    Lru,
    /// The least often used goes first, where a use counts half after this many tokens; a group that was used less than all
    /// those cached is not kept.
    Lfu {
        /// Tokens after which a use counts half.
        half_life: u32,
    },
    /// Three queues: new groups must be used again soon to get into the large one (Yang et al., SOSP 2023).
    S3Fifo,
    /// A small window of recent groups before a segmented main part that admits by frequency (Einziger et al., 2017).
    WTinyLfu,
}

impl PolicyKind {
    /// What a run uses unless it is told otherwise.
    pub const DEFAULT: PolicyKind = PolicyKind::Lfu { half_life: 64 };

    /// One of each, as compared in measurements.
    pub const ALL: [PolicyKind; 5] =
        [PolicyKind::Window(4), PolicyKind::Lru, PolicyKind::DEFAULT, PolicyKind::S3Fifo, PolicyKind::WTinyLfu];

    pub(super) fn build(self, buffers: &mut Buffers, groups: u32, slots: u32) -> Box<dyn Policy> {
        match self {
            PolicyKind::Window(tokens) => Box::new(Recency::new(buffers, slots, Some(tokens))),
            PolicyKind::Lru => Box::new(Recency::new(buffers, slots, None)),
            PolicyKind::Lfu { half_life } => Box::new(Lfu::new(buffers, groups, slots, half_life)),
            PolicyKind::S3Fifo => Box::new(S3Fifo::new(buffers, groups, slots)),
            PolicyKind::WTinyLfu => Box::new(WTinyLfu::new(buffers, groups, slots)),
        }
    }
}

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PolicyKind::Window(tokens) => write!(f, "window:{tokens}"),
            PolicyKind::Lru => f.write_str("lru"),
            PolicyKind::Lfu { half_life } => write!(f, "lfu:{half_life}"),
            PolicyKind::S3Fifo => f.write_str("s3-fifo"),
            PolicyKind::WTinyLfu => f.write_str("w-tinylfu"),
        }
    }
}

/// A policy's name that means nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown cache policy {0:?}; known are window:TOKENS, lru, lfu:TOKENS, s3-fifo and w-tinylfu")]
pub struct ParsePolicyError(String);

impl FromStr for PolicyKind {
    type Err = ParsePolicyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let unknown = || ParsePolicyError(text.to_string());
        let (name, number) = match text.split_once(':') {
            Some((name, number)) => (name, Some(number.parse::<u32>().map_err(|_| unknown())?)),
            None => (text, None),
        };
        match (name, number) {
            ("window", number) => Ok(PolicyKind::Window(number.unwrap_or(4))),
            ("lru", None) => Ok(PolicyKind::Lru),
            ("lfu", Some(0)) => Err(unknown()),
            ("lfu", number) => Ok(PolicyKind::Lfu { half_life: number.unwrap_or(64) }),
            ("s3-fifo", None) => Ok(PolicyKind::S3Fifo),
            ("w-tinylfu", None) => Ok(PolicyKind::WTinyLfu),
            _ => Err(unknown()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for kind in PolicyKind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        assert_eq!("window".parse(), Ok(PolicyKind::Window(4)));
        for bad in ["", "lru:3", "lfu:0", "lfu:x", "window:-1", "fifo"] {
            assert!(bad.parse::<PolicyKind>().is_err(), "{bad:?}");
        }
    }
}
