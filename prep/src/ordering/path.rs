//! The objective without gaps: two neighbours that are missing together save one read.

use super::local_search::Objective;
use crate::coactivation::PairGraph;

/// Weights of pairs, looked up by both neurons.
pub(super) struct PairWeights {
    ends: Vec<usize>,
    /// For every neuron its partners by number, with the tokens at which both are missing.
    partners: Vec<(u32, u32)>,
    work: u64,
}

impl PairWeights {
    pub(super) fn new(graph: &PairGraph) -> Self {
        let (mut ends, mut partners) = (Vec::with_capacity(graph.neurons()), Vec::new());
        for n in 0..graph.neurons() as u32 {
            let start = partners.len();
            partners.extend(graph.partners(n).iter().map(|p| (p.neuron, p.together)));
            partners[start..].sort_unstable();
            ends.push(partners.len());
        }
        PairWeights { ends, partners, work: 0 }
    }

    fn of(&self, a: u32, b: u32) -> Option<u32> {
        let start = if a == 0 { 0 } else { self.ends[a as usize - 1] };
        let list = &self.partners[start..self.ends[a as usize]];
        list.binary_search_by_key(&b, |p| p.0).ok().map(|at| list[at].1)
    }
}

impl Objective for PairWeights {
    fn reach(&self) -> usize {
        1
    }

    fn work(&self) -> u64 {
        self.work
    }

    fn across(&mut self, left: &[u32], right: &[u32]) -> i64 {
        self.work += 1;
        self.of(left[0], right[0]).or_else(|| self.of(right[0], left[0])).unwrap_or(0) as i64
    }
}

/// For every neuron its `most` strongest partners: where to try it.
pub(super) fn candidates(graph: &PairGraph, most: usize) -> Vec<Vec<u32>> {
    (0..graph.neurons() as u32).map(|n| graph.partners(n).iter().take(most).map(|p| p.neuron).collect()).collect()
}
