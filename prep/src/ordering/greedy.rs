//! A path through the numbers of all neurons, strongest pairs first.

use crate::coactivation::PairGraph;

/// Joins pairs, strongest first, as long as no neuron gets a third neighbour and no ring closes; the pieces that are left
/// are set one after another, the hottest first, so that what rarely fires lies at the end.
pub(super) fn greedy_path(graph: &PairGraph) -> Vec<u32> {
    let neurons = graph.neurons() as u32;
    let mut edges: Vec<(u32, u32, u32)> = Vec::new();
    for a in 0..neurons {
        edges.extend(graph.partners(a).iter().map(|p| (p.together, a.min(p.neuron), a.max(p.neuron))));
    }
    edges.sort_unstable_by(|x, y| y.0.cmp(&x.0).then((x.1, x.2).cmp(&(y.1, y.2))));
    edges.dedup();

    let mut pieces = Pieces::new(neurons);
    let mut neighbours: Vec<[u32; 2]> = vec![[u32::MAX; 2]; neurons as usize];
    for (_, a, b) in edges {
        let (free_a, free_b) = (free_side(&neighbours[a as usize]), free_side(&neighbours[b as usize]));
        if let (Some(sa), Some(sb)) = (free_a, free_b)
            && pieces.join(a, b)
        {
            neighbours[a as usize][sa] = b;
            neighbours[b as usize][sb] = a;
        }
    }

    let mut chains: Vec<(f64, Vec<u32>)> = Vec::new();
    let mut done = vec![false; neurons as usize];
    for end in 0..neurons {
        if done[end as usize] || free_side(&neighbours[end as usize]).is_none() {
            continue;
        }
        let (mut chain, mut before, mut at) = (Vec::new(), u32::MAX, end);
        loop {
            done[at as usize] = true;
            chain.push(at);
            let next = neighbours[at as usize].iter().copied().find(|&n| n != u32::MAX && n != before);
            match next {
                Some(next) => (before, at) = (at, next),
                None => break,
            }
        }
        let heat = chain.iter().map(|&n| graph.uses(n) as f64).sum::<f64>() / chain.len() as f64;
        chains.push((heat, chain));
    }
    chains.sort_by(|x, y| y.0.total_cmp(&x.0).then(x.1[0].cmp(&y.1[0])));
    chains.into_iter().flat_map(|c| c.1).collect()
}

fn free_side(neighbours: &[u32; 2]) -> Option<usize> {
    neighbours.iter().position(|&n| n == u32::MAX)
}

/// Which neurons are joined already.
struct Pieces {
    parent: Vec<u32>,
}

impl Pieces {
    fn new(neurons: u32) -> Self {
        Pieces { parent: (0..neurons).collect() }
    }

    fn root(&mut self, mut n: u32) -> u32 {
        while self.parent[n as usize] != n {
            self.parent[n as usize] = self.parent[self.parent[n as usize] as usize];
            n = self.parent[n as usize];
        }
        n
    }

    /// False when they were joined before.
    fn join(&mut self, a: u32, b: u32) -> bool {
        let (a, b) = (self.root(a), self.root(b));
        self.parent[a.max(b) as usize] = a.min(b);
        a != b
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coactivation::PairOptions;
    use flashlm::replay::WantedSets;
    use flashlm_formats::ids::NeuronId;

    #[test]
    fn chains_are_found_and_every_neuron_stands_once() {
        // A chain 5 - 2 - 7 - 0 of pairs, a rare pair 1 - 6, and 3 and 4 that never fire.
        let mut sets = WantedSets::new(8);
        for (times, pair) in [(9, [2, 5]), (8, [2, 7]), (7, [0, 7]), (2, [1, 6])] {
            (0..times).for_each(|_| sets.push(pair.map(NeuronId)));
        }
        let order = greedy_path(&PairGraph::count(&sets, &PairOptions::default()));
        assert_eq!(order, [0, 7, 2, 5, 1, 6, 3, 4]);
    }
}
