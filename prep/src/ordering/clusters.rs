//! Another path through the numbers of all neurons: clusters of those that go together, laid one beside the other.
//!
//! Average linkage: of all clusters the two are joined whose neurons go together most on average, as long as any do. A path joins
//! by the strongest single pair and spreads a cluster over several places; where gaps are read through, a cluster that lies in
//! one place is often the better start.

use std::collections::BTreeMap;

use crate::coactivation::PairGraph;

/// The clusters' neurons one after another, those of a cluster together at every size of it; clusters that have nothing to do with each other
/// the hottest first.
///
/// Pairs that the graph does not keep count as never together. So memory is in the number of pairs kept, and time hardly more.
pub(super) fn cluster_path(graph: &PairGraph) -> Vec<u32> {
    let mut clusters = Clusters::new(graph);
    for neuron in 0..graph.neurons() {
        // Nearest neighbours are followed until two are each other's: whatever else is joined, no third can come between them.
        let mut chain = vec![neuron];
        while let Some(&top) = chain.last() {
            let before = chain.len().checked_sub(2).map(|at| chain[at]);
            match clusters.nearest(top, before) {
                Some(nearest) if Some(nearest) == before => {
                    chain.truncate(chain.len() - 2);
                    let joined = clusters.join(nearest, top);
                    if chain.is_empty() {
                        chain.push(joined);
                    }
                }
                Some(nearest) => chain.push(nearest),
                None => break,
            }
        }
    }
    let mut whole: Vec<(f64, Vec<u32>)> = clusters
        .paths
        .into_iter()
        .filter(|path| !path.is_empty())
        .map(|path| {
            let uses: u64 = path.iter().map(|&n| u64::from(graph.uses(n))).sum();
            (uses as f64 / path.len() as f64, path)
        })
        .collect();
    whole.sort_by(|x, y| y.0.total_cmp(&x.0).then(x.1[0].cmp(&y.1[0])));
    whole.into_iter().flat_map(|cluster| cluster.1).collect()
}

struct Clusters<'a> {
    graph: &'a PairGraph,
    /// Of each cluster its neurons; none of what was joined to another.
    paths: Vec<Vec<u32>>,
    /// Of each cluster the others, with the pairs of their neurons summed: how often they are together.
    near: Vec<BTreeMap<usize, u64>>,
}

impl<'a> Clusters<'a> {
    fn new(graph: &'a PairGraph) -> Self {
        let mut near = vec![BTreeMap::new(); graph.neurons()];
        for a in 0..graph.neurons() {
            // Kept by one of the two, a pair is one of both.
            for partner in graph.partners(a as u32) {
                let b = partner.neuron as usize;
                near[a].insert(b, u64::from(partner.together));
                near[b].insert(a, u64::from(partner.together));
            }
        }
        Self { graph, paths: (0..graph.neurons() as u32).map(|n| vec![n]).collect(), near }
    }

    /// The cluster that goes with this one most often on average; of equals `first`, then the lowest number.
    fn nearest(&self, cluster: usize, first: Option<usize>) -> Option<usize> {
        let size = |other: usize| self.paths[other].len() as u64;
        let first = first.and_then(|other| Some((other, *self.near[cluster].get(&other)?)));
        let others = self.near[cluster].iter().map(|(&other, &sum)| (other, sum));
        let nearer = |best: (usize, u64), next: (usize, u64)| {
            // sum / size, without dividing.
            let [ours, theirs] =
                [(best, next.0), (next, best.0)].map(|((_, sum), by)| u128::from(sum) * u128::from(size(by)));
            if theirs > ours { next } else { best }
        };
        first.into_iter().chain(others).reduce(nearer).map(|(other, _)| other)
    }

    /// Joins two clusters, under the number of the one with more others near, which it gives.
    fn join(&mut self, a: usize, b: usize) -> usize {
        let (to, from) = if self.near[a].len() >= self.near[b].len() { (a, b) } else { (b, a) };
        for (other, sum) in std::mem::take(&mut self.near[from]) {
            self.near[other].remove(&from);
            if other != to {
                *self.near[to].entry(other).or_default() += sum;
                *self.near[other].entry(to).or_default() += sum;
            }
        }
        let mut joined = std::mem::take(&mut self.paths[from]);
        let path = &mut self.paths[to];
        // The ends that go together best become neighbours.
        let together = |x: Option<&u32>, y: Option<&u32>| x.zip(y).map_or(0, |(&x, &y)| self.graph.together(x, y));
        let ends = [
            (together(path.last(), joined.first()), false, false),
            (together(path.last(), joined.last()), false, true),
            (together(path.first(), joined.first()), true, false),
            (together(path.first(), joined.last()), true, true),
        ];
        let (_, turn_path, turn_joined) =
            ends.into_iter().reduce(|best, next| if next.0 > best.0 { next } else { best }).expect("four ways");
        if turn_path {
            path.reverse();
        }
        if turn_joined {
            joined.reverse();
        }
        path.append(&mut joined);
        to
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flashlm::replay::WantedSets;
    use flashlm_formats::ids::NeuronId;
    use proptest::prelude::*;

    use crate::coactivation::PairOptions;

    fn graph(neurons: u32, tokens: impl IntoIterator<Item = Vec<u32>>) -> PairGraph {
        let mut sets = WantedSets::new(neurons);
        tokens.into_iter().for_each(|token| sets.push(token.into_iter().map(NeuronId)));
        PairGraph::count(&sets, &PairOptions::default())
    }

    #[test]
    fn clusters_stay_together_where_a_path_would_leave_them() {
        // 0, 1 and 2 are together nine times each pair; 2 is with 3 ten times, which is with nothing else; 4 and 5 seldom; 6 never.
        let tokens = [(9, vec![0, 1, 2]), (10, vec![2, 3]), (2, vec![4, 5])];
        let graph = graph(7, tokens.into_iter().flat_map(|(times, token)| vec![token; times]));
        // A path would have 0, 2, 3 and 1 apart. {0, 1} and {2, 3}, then both, by 2; the rest by heat.
        assert_eq!(cluster_path(&graph), [0, 1, 2, 3, 4, 5, 6]);
    }

    proptest! {
        #[test]
        fn clusters_are_those_of_average_linkage(seed in 0u64..1000) {
            let mut state = seed;
            let mut random = || {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                state >> 33
            };
            let tokens: Vec<Vec<u32>> =
                (0..4000).map(|_| (0..12).filter(|n| random() % (3 + n) == 0).map(|n| n as u32).collect()).collect();
            let graph = graph(12, tokens);
            let path = cluster_path(&graph);
            super::super::places(path.iter().copied());
            // Joined two by two, all are one in the end: at every size a cluster is a stretch of the path.
            let mut clusters: Vec<Vec<u32>> = (0..12).map(|n| vec![n]).collect();
            let place = super::super::places(path.iter().copied());
            let average = |a: &[u32], b: &[u32]| {
                let sum: u64 = a.iter().flat_map(|&x| b.iter().map(move |&y| (x, y))).map(|(x, y)| u64::from(graph.together(x, y))).sum();
                sum as f64 / (a.len() * b.len()) as f64
            };
            while clusters.len() > 1 {
                let pairs = (0..clusters.len()).flat_map(|a| (0..a).map(move |b| (a, b)));
                let mut pairs: Vec<_> = pairs.map(|(a, b)| (average(&clusters[a], &clusters[b]), a, b)).collect();
                pairs.sort_by(|x, y| y.0.total_cmp(&x.0));
                // Of equals any may be joined, and all that follows is another.
                prop_assume!(pairs.len() == 1 || pairs[0].0 > pairs[1].0 + 1e-9);
                let (_, a, b) = pairs[0];
                let joined = clusters.remove(a);
                clusters[b].extend(joined);
                let mut places: Vec<u32> = clusters[b].iter().map(|&n| place[n as usize]).collect();
                places.sort_unstable();
                prop_assert!(places.windows(2).all(|two| two[0] + 1 == two[1]), "{:?} is torn apart in {path:?}", clusters[b]);
            }
        }
    }
}
