//! How fast the machine could be at best, and what that makes of a step's reads and of the memory that it touches.
//!
//! A measurement is no limit if a step was faster: a disk profile may be of a busy minute, and what a small model touches lies in
//! caches. What a step reached in this run the machine can do, so that counts where it is better.

use flashlm_io::DiskProfile;
use serde_json::{Value, json};

use super::median;

/// What was measured before the steps ran.
pub(super) struct Machine {
    pub(super) disk_bytes_per_s: f64,
    pub(super) dram_bytes_per_s: f64,
    pub(super) profile: Option<DiskProfile>,
}

/// A share of the time that measured rates give, and what was seen to take no more.
struct Share {
    share: f64,
    seen: Option<String>,
}

impl Share {
    fn whole() -> Self {
        Self { share: 1.0, seen: None }
    }

    /// `what` took `ms` in this run, and at the measured rates it would have taken `limit_ms` at least.
    fn seen(&mut self, what: &str, ms: f64, limit_ms: f64) {
        if limit_ms > 0.0 && ms / limit_ms < self.share {
            (self.share, self.seen) = (ms / limit_ms, Some(what.to_owned()));
        }
    }
}

/// The machine's rates with what this run showed.
pub(super) struct Limits<'a> {
    machine: &'a Machine,
    disk: Share,
    dram: Share,
}

impl<'a> Limits<'a> {
    /// From the repeats of all steps, each with its name.
    pub(super) fn new<'b>(machine: &'a Machine, steps: impl Iterator<Item = (&'b str, &'b [Value])>) -> Self {
        let mut limits = Self { machine, disk: Share::whole(), dram: Share::whole() };
        if let Some(profile) = &machine.profile {
            limits.disk.seen("a sequential read", 1.0 / machine.disk_bytes_per_s, 1.0 / profile.sequential_bytes_per_s);
        }
        for (name, rounds) in steps {
            let ms = of(rounds, &["decode_ms_per_token", "median"]);
            limits.disk.seen(name, ms, machine.io_ms(rounds));
            limits.dram.seen(name, ms, machine.dram_ms(rounds));
        }
        limits
    }

    /// The least time that a step's reads take for a token.
    pub(super) fn io_ms(&self, rounds: &[Value]) -> f64 {
        self.machine.io_ms(rounds) * self.disk.share
    }

    /// The least time that touching a step's memory takes for a token.
    pub(super) fn dram_ms(&self, rounds: &[Value]) -> f64 {
        self.machine.dram_ms(rounds) * self.dram.share
    }

    /// Where the limits are from, in words.
    pub(super) fn describe(&self) -> String {
        let faster = |what: &str, share: &Share| match &share.seen {
            Some(seen) => format!("; {what} {:.2} times as fast, as {seen} was in this run", 1.0 / share.share),
            None => String::new(),
        };
        let from = match &self.machine.profile {
            Some(_) => "the disk's profile",
            None => "bandwidth alone: measure the disk with `flashlm disk`",
        };
        format!("limits from {from}{}{}", faster("the disk", &self.disk), faster("memory", &self.dram))
    }

    /// The same for `--json`.
    pub(super) fn json(&self) -> Value {
        let faster = |share: &Share| json!({ "times": 1.0 / share.share, "seen": share.seen });
        json!({
            "from": if self.machine.profile.is_some() { "disk_profile" } else { "bandwidth" },
            "disk_faster": faster(&self.disk),
            "dram_faster": faster(&self.dram),
        })
    }
}

impl Machine {
    fn io_ms(&self, rounds: &[Value]) -> f64 {
        let bytes = of(rounds, &["bytes_read_per_token"]);
        let Some(profile) = &self.profile else { return bytes / self.disk_bytes_per_s * 1e3 };
        let first = rounds.first().unwrap_or(&Value::Null);
        let sizes = first["read_sizes"].as_array().map_or(&[][..], Vec::as_slice);
        let time = if sizes.is_empty() {
            // Whoever reads everything reads it in pieces of one size.
            profile.read_time(bytes as u64, of(rounds, &["reads_per_token"]).ceil() as u64)
        } else {
            let pair = |size: &Value| Some((size[0].as_u64()?, size[1].as_u64()?));
            profile
                .histogram_time(sizes.iter().filter_map(pair))
                .div_f64(first["tokens"].as_f64().unwrap_or(1.0).max(1.0))
        };
        time.as_secs_f64() * 1e3
    }

    fn dram_ms(&self, rounds: &[Value]) -> f64 {
        of(rounds, &["touched_bytes_per_token"]) / self.dram_bytes_per_s * 1e3
    }
}

/// The median of a figure over the repeats of a step.
pub(super) fn of(rounds: &[Value], path: &[&str]) -> f64 {
    let figure = |round: &Value| path.iter().fold(round, |value, key| &value[*key]).as_f64();
    median(rounds.iter().filter_map(figure).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use flashlm_io::{PROFILE_VERSION, RandomRate};

    /// 1 ms for each read of 4 KiB, 1 MB/s in sequence: a disk that others keep busy.
    fn busy() -> DiskProfile {
        DiskProfile {
            version: PROFILE_VERSION,
            device: "disk".into(),
            mode: "direct".into(),
            engine: "io_uring".into(),
            sequential_bytes_per_s: 1e6,
            random: vec![RandomRate { read_bytes: 4096, depth: 1, reads_per_s: 1000.0 }],
        }
    }

    fn step(ms: f64, bytes: f64, reads: f64, sizes: Value) -> Vec<Value> {
        vec![json!({
            "decode_ms_per_token": { "median": ms }, "bytes_read_per_token": bytes, "reads_per_token": reads,
            "read_sizes": sizes, "tokens": 10, "touched_bytes_per_token": 1e6,
        })]
    }

    #[test]
    fn what_a_step_reached_is_possible() {
        let machine = |profile| Machine { disk_bytes_per_s: 1e6, dram_bytes_per_s: 1e9, profile };
        // 20 reads of 4 KiB a token take 20 ms by the profile.
        let flash = || step(40.0, 81_920.0, 20.0, json!([[4096, 200]]));
        let quick = || step(5.0, 81_920.0, 20.0, json!([[4096, 200]]));
        let limits = |machine: &Machine, steps: &[(&str, Vec<Value>)]| {
            let limits = Limits::new(machine, steps.iter().map(|(name, rounds)| (*name, rounds.as_slice())));
            (steps.iter().map(|(_, rounds)| limits.io_ms(rounds)).collect::<Vec<_>>(), limits.describe())
        };
        let near = |found: &[f64], expected: &[f64]| {
            assert!(found.iter().zip(expected).all(|(f, e)| (f - e).abs() < 1e-6 * e), "{found:?} {expected:?}");
        };
        let busy = machine(Some(busy()));
        let (io, said) = limits(&busy, &[("flash", flash())]);
        near(&io, &[20.0]);
        assert_eq!(said, "limits from the disk's profile");
        let (io, said) = limits(&busy, &[("flash", flash()), ("quick", quick())]);
        near(&io, &[5.0, 5.0]);
        assert!(said.ends_with("the disk 4.00 times as fast, as quick was in this run"), "{said}");
        // Without sizes of reads it is the profile all the same: 10 reads of 4 KiB and what is beyond in sequence.
        let (io, _) = limits(&busy, &[("naive", step(900.0, 409_600.0, 10.0, json!([])))]);
        near(&io, &[10.0 + (409_600.0 - 40_960.0) / 1e6 * 1e3]);
        // A disk that reads faster now than when its profile was made.
        let (io, said) =
            limits(&Machine { disk_bytes_per_s: 2e6, ..machine(busy.profile.clone()) }, &[("flash", flash())]);
        near(&io, &[10.0]);
        assert!(said.contains("2.00 times as fast, as a sequential read was"), "{said}");
        // Memory, and a disk without a profile.
        let alone = Machine { dram_bytes_per_s: 1e6, ..machine(None) };
        let (io, said) = limits(&alone, &[("quick", quick())]);
        near(&io, &[5.0]);
        assert!(said.contains("bandwidth alone") && said.contains("memory 200.00 times as fast, as quick"), "{said}");
    }
}
