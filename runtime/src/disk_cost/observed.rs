//! The cost of reads as a run sees it: starts from what is known of the disk, and follows what reads take.

use std::time::Instant;

use super::{ReadCost, Sums};

/// Time of a busy disk that is remembered; what is older fades.
const MEMORY_NS: f64 = 2e9;
/// The shape of the cost that was known at the start, a request against a byte, is worth as much as this time of observation, ...
const START_NS: f64 = 0.02e9;
/// ... and this share of all, for good: requests of one size alone would leave one of the two undetermined.
const ANCHOR: f64 = 0.02;
/// Sizes at which the cost known at the start stands in for observations.
const START_BYTES: [u64; 2] = [16 << 10, 256 << 10];
/// The farthest that observation takes a cost from the one known at the start, as a factor.
const FARTHEST: f64 = 32.0;

/// Learns the cost of reads while they are made. Only spans are counted in which the disk was busy from beginning to end: from a
/// moment when reads were submitted to an idle disk, or one was waited for, to the next one that was waited for.
#[derive(Clone, Debug)]
pub struct ObservedCost {
    start: ReadCost,
    known: Sums,
    seen: Sums,
    now: ReadCost,
    /// Where the span began, and what has arrived since.
    since: Option<Instant>,
    requests: u64,
    bytes: u64,
    spans: u64,
}

impl ObservedCost {
    /// Nothing is seen yet.
    pub fn new(start: ReadCost) -> Self {
        let mut known = Sums::default();
        for bytes in START_BYTES {
            known.add(1, bytes, start.nanoseconds(1, bytes), 1.0 / START_BYTES.len() as f64);
        }
        Self { start, known, seen: Sums::default(), now: start, since: None, requests: 0, bytes: 0, spans: 0 }
    }

    /// What reads cost as far as is known now.
    pub fn cost(&self) -> ReadCost {
        self.now
    }

    /// Spans that were counted.
    pub fn spans(&self) -> u64 {
        self.spans
    }

    /// Reads are submitted to an idle disk.
    pub fn begins(&mut self, now: Instant) {
        (self.since, self.requests, self.bytes) = (Some(now), 0, 0);
    }

    /// Reads have arrived, unknown when.
    pub fn arrived(&mut self, requests: u64, bytes: u64) {
        self.requests += requests;
        self.bytes += bytes;
    }

    /// What has arrived last was waited for; `busy`: more is under way.
    pub fn waited(&mut self, now: Instant, busy: bool) {
        if let Some(since) = self.since
            && self.requests > 0
        {
            self.see(self.requests, self.bytes, now.duration_since(since).as_nanos() as f64);
        }
        (self.since, self.requests, self.bytes) = (busy.then_some(now), 0, 0);
    }

    /// The disk has been idle, unknown since when.
    pub fn idled(&mut self) {
        self.since = None;
    }

    fn see(&mut self, requests: u64, bytes: u64, ns: f64) {
        if ns <= 0.0 || bytes == 0 {
            return;
        }
        let weight = ns.min(MEMORY_NS / 8.0);
        let kept = (MEMORY_NS - weight) / self.seen.weight.max(MEMORY_NS - weight);
        self.seen.scale(kept);
        self.seen.add(requests, bytes, ns, weight);
        self.spans += 1;
        // How much slower than known the disk is, whatever the shape.
        let mut both = self.known.times(START_NS);
        both.join(&self.seen);
        let mut sums = self.known.slower(both.slowness(&self.start)).times(START_NS + ANCHOR * self.seen.weight);
        sums.join(&self.seen);
        let (request_ns, byte_ns) = sums.solve(self.start.byte_ns());
        let near = |value: f64, start: f64| value.clamp(start / FARTHEST, start * FARTHEST);
        let request_ns = request_ns.min(self.start.request_ns().max(1e3) * FARTHEST);
        if let Ok(cost) = ReadCost::new(request_ns, near(byte_ns, self.start.byte_ns())) {
            self.now = cost;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plans with another mix of sizes each, on a disk of `request_ns` and `byte_ns`.
    fn observe(observed: &mut ObservedCost, request_ns: f64, byte_ns: f64, spans: u64) {
        for at in 0..spans {
            let requests = 20 + at * 7 % 50;
            let bytes = requests * (16 << 10) * (1 + at % 3);
            observed.see(requests, bytes, request_ns * requests as f64 + byte_ns * bytes as f64);
        }
    }

    #[test]
    fn the_cost_follows_the_disk_from_whatever_it_started() {
        for (request_ns, byte_ns) in [(1e3, 0.1), (14e3, 0.5), (200e3, 2.0)] {
            let mut observed = ObservedCost::new(ReadCost::new(request_ns, byte_ns).unwrap());
            assert_eq!(observed.cost().request_ns(), request_ns);
            observe(&mut observed, 10e3, 0.4, 2000);
            let cost = observed.cost();
            assert!((cost.byte_ns() / 0.4 - 1.0).abs() < 0.25, "from {request_ns}, {byte_ns}: {cost:?}");
            assert!((cost.request_ns() / 10e3 - 1.0).abs() < 0.5, "from {request_ns}, {byte_ns}: {cost:?}");
            // And when the disk changes.
            observe(&mut observed, 40e3, 1.2, 3000);
            let cost = observed.cost();
            assert!(
                (cost.byte_ns() / 1.2 - 1.0).abs() < 0.25 && (cost.request_ns() / 40e3 - 1.0).abs() < 0.5,
                "{cost:?}"
            );
        }
    }

    #[test]
    fn requests_of_one_size_leave_the_cost_near_its_start_in_shape() {
        let mut observed = ObservedCost::new(ReadCost::USUAL);
        (0..1000).for_each(|_| observed.see(64, 64 << 14, 64.0 * 2.0 * ReadCost::USUAL.nanoseconds(1, 1 << 14)));
        let cost = observed.cost();
        assert!((cost.nanoseconds(1, 1 << 14) / ReadCost::USUAL.nanoseconds(1, 1 << 14) - 2.0).abs() < 0.1, "{cost:?}");
        assert!(cost.request_ns() > 0.0 && cost.byte_ns() > 0.0);
    }

    #[test]
    fn only_spans_of_a_busy_disk_count() {
        let mut observed = ObservedCost::new(ReadCost::USUAL);
        let begin = Instant::now();
        observed.begins(begin);
        observed.arrived(3, 3 << 14);
        observed.idled();
        observed.waited(begin + std::time::Duration::from_millis(5), false);
        assert_eq!((observed.spans(), observed.cost()), (0, ReadCost::USUAL));
        observed.begins(begin);
        observed.arrived(3, 3 << 14);
        observed.waited(begin + std::time::Duration::from_millis(5), true);
        assert_eq!(observed.spans(), 1);
        // Nothing came: nothing is known.
        observed.waited(begin + std::time::Duration::from_millis(9), true);
        assert_eq!(observed.spans(), 1);
    }
}
