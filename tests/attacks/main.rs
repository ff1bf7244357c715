//! Attempts to break what `docs/security.md` promises. Each is numbered in `README.md` beside this file, with its outcome.
//!
//! `cargo test` runs a small share of each campaign; `FLASHLM_CAMPAIGN=1` runs them whole. `FLASHLM_ATTACK_SEED=N` gives other
//! damage; the seed is printed. What needs root, mounts or cgroups says why it skips, and fails under `FLASHLM_REQUIRE_ROOT=1`.

mod as_found;
mod budgets;
mod claims;
mod corruption;
mod crash;
mod disk;
mod grid;
mod hostile;
mod hub;
mod limits;
mod long_runs;
mod mini;
mod plan;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod power;
mod preparing;
mod programs;
mod script;
mod shown;
mod split;
#[allow(unreachable_pub, reason = "shared with the fuzzers")]
mod targets;
mod tokens;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod watched;
mod whose;

use std::collections::BTreeMap;

/// SplitMix64.
struct Dice(u64);

impl Dice {
    /// Dice of its own for each campaign.
    fn of(campaign: &str) -> Self {
        let seed = std::env::var("FLASHLM_ATTACK_SEED").map_or(1, |seed| seed.parse().expect("a number"));
        eprintln!("{campaign}: seed {seed}");
        Self(flashlm_formats::bundle::checksum(format!("{campaign} {seed}").as_bytes()))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// Changes one byte of `bytes` and tells where.
    fn flip(&mut self, bytes: &mut [u8]) -> usize {
        let at = self.below(bytes.len());
        bytes[at] ^= 1 + self.below(255) as u8;
        at
    }
}

/// Whether whole campaigns were asked for.
fn whole() -> bool {
    std::env::var_os("FLASHLM_CAMPAIGN").is_some()
}

/// Rounds of a campaign: a few in daily tests.
fn rounds(few: usize, campaign: usize) -> usize {
    if whole() { campaign } else { few }
}

/// How often what came out; printed at the end of a campaign.
#[derive(Default)]
struct Outcomes(BTreeMap<String, usize>);

impl Outcomes {
    fn add(&mut self, outcome: impl Into<String>) {
        *self.0.entry(outcome.into()).or_default() += 1;
    }

    fn of(&self, outcome: &str) -> usize {
        self.0.get(outcome).copied().unwrap_or(0)
    }

    fn print(&self, campaign: &str) {
        self.0.iter().for_each(|(outcome, count)| eprintln!("{campaign}: {count:6} {outcome}"));
    }
}

/// Leaves a test that the machine cannot run, or fails where it must be able to.
fn skip(why: &str) {
    assert!(std::env::var_os("FLASHLM_REQUIRE_ROOT").is_none(), "cannot be tested here: {why}");
    eprintln!("skipped: {why}");
}
