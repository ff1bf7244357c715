use flashlm::replay::WantedSets;
use flashlm_formats::ids::Id;
use rayon::prelude::*;

/// Bounds of a pair count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PairOptions {
    /// Partners kept for each neuron, the strongest.
    pub partners_max: usize,
    /// Most pairs looked at, over all tokens, for each neuron of the layer. Where there are more, only every i-th
    /// token is counted: so the time that a layer takes grows with its size and not with the recording's.
    pub pairs_per_neuron_max: u64,
}

impl Default for PairOptions {
    fn default() -> Self {
        PairOptions { partners_max: 64, pairs_per_neuron_max: 1_000_000 }
    }
}

/// A neuron that fires together with another, or a group that is missed with another: a number of whatever the sets are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partner {
    /// Which.
    pub neuron: u32,
    /// Tokens at which both are active.
    pub together: u32,
}

/// For every neuron, or whatever else the sets are of, its strongest partners.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PairGraph {
    uses: Vec<u32>,
    ends: Vec<usize>,
    partners: Vec<Partner>,
    token_step: usize,
}

impl PairGraph {
    /// Counts the pairs of all tokens.
    ///
    /// One neuron at a time: the tokens at which it is active, and a row of counters over the others. So memory is a row for
    /// each thread, the partners kept, and the sets twice. The same result with any number of threads.
    pub fn count<T: Id>(sets: &WantedSets<T>, options: &PairOptions) -> Self {
        let neurons = sets.layer_size() as usize;
        let pairs: u64 = sets.iter().map(|t| (t.len() as u64).pow(2)).sum();
        let pairs_max = options.pairs_per_neuron_max.saturating_mul(neurons as u64).max(1);
        let token_step = pairs.div_ceil(pairs_max).max(1) as usize;
        let tokens_of = Postings::new(sets, token_step);
        let rows: Vec<Vec<Partner>> = (0..neurons)
            .into_par_iter()
            .map_init(
                || (vec![0u32; neurons], Vec::new()),
                |(row, found), neuron| {
                    row.fill(0);
                    for &token in tokens_of.of(neuron) {
                        for &other in sets.token(token as usize) {
                            row[other.index()] += 1;
                        }
                    }
                    row[neuron] = 0;
                    found.clear();
                    found.extend(
                        (0..neurons as u32)
                            .zip(row.iter())
                            .filter(|(_, c)| **c > 0)
                            .map(|(n, &c)| Partner { neuron: n, together: c }),
                    );
                    strongest(found, options.partners_max)
                },
            )
            .collect();
        let mut graph = PairGraph {
            uses: (0..neurons).map(|n| tokens_of.of(n).len() as u32).collect(),
            ends: Vec::with_capacity(neurons),
            partners: Vec::with_capacity(rows.iter().map(Vec::len).sum()),
            token_step,
        };
        for row in rows {
            graph.partners.extend(row);
            graph.ends.push(graph.partners.len());
        }
        graph
    }

    /// Number of neurons.
    pub fn neurons(&self) -> usize {
        self.uses.len()
    }

    /// Every i-th token was counted.
    pub fn token_step(&self) -> usize {
        self.token_step
    }

    /// Counted tokens at which the neuron is active.
    pub fn uses(&self, neuron: u32) -> u32 {
        self.uses[neuron as usize]
    }

    /// The neuron's strongest partners, strongest first; of equally strong ones the lower number first.
    pub fn partners(&self, neuron: u32) -> &[Partner] {
        let n = neuron as usize;
        &self.partners[if n == 0 { 0 } else { self.ends[n - 1] }..self.ends[n]]
    }

    /// Tokens at which both are active, as far as one is kept as the other's partner; else 0.
    pub fn together(&self, a: u32, b: u32) -> u32 {
        let seek = |a, b| self.partners(a).iter().find(|p| p.neuron == b).map(|p| p.together);
        seek(a, b).or_else(|| seek(b, a)).unwrap_or(0)
    }
}

/// The strongest partners, in order.
fn strongest(found: &mut Vec<Partner>, most: usize) -> Vec<Partner> {
    let key = |p: &Partner| (std::cmp::Reverse(p.together), p.neuron);
    if found.len() > most && most > 0 {
        found.select_nth_unstable_by_key(most - 1, key);
    }
    found.truncate(most);
    found.sort_unstable_by_key(key);
    found.clone()
}

/// For every neuron the tokens at which it is active.
pub(crate) struct Postings {
    ends: Vec<usize>,
    tokens: Vec<u32>,
}

impl Postings {
    /// Of every `step`th token.
    pub(crate) fn new<T: Id>(sets: &WantedSets<T>, step: usize) -> Self {
        let mut ends = vec![0usize; sets.layer_size() as usize + 1];
        for token in (0..sets.tokens()).step_by(step) {
            sets.token(token).iter().for_each(|n| ends[n.index() + 1] += 1);
        }
        for n in 1..ends.len() {
            ends[n] += ends[n - 1];
        }
        let mut tokens = vec![0u32; ends[ends.len() - 1]];
        // `ends[n]` is where neuron n begins, and moves to where it ends.
        for token in (0..sets.tokens()).step_by(step) {
            for n in sets.token(token) {
                tokens[ends[n.index()]] = token as u32;
                ends[n.index()] += 1;
            }
        }
        ends.pop();
        Postings { ends, tokens }
    }

    pub(crate) fn of(&self, neuron: usize) -> &[u32] {
        &self.tokens[if neuron == 0 { 0 } else { self.ends[neuron - 1] }..self.ends[neuron]]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flashlm_formats::ids::NeuronId;

    fn sets() -> WantedSets<NeuronId> {
        let mut sets = WantedSets::new(6);
        for token in [&[0, 1, 2][..], &[0, 1], &[1, 2, 5], &[], &[0, 1, 5]] {
            sets.push(token.iter().copied().map(NeuronId));
        }
        sets
    }

    #[test]
    fn pairs_are_counted() {
        let graph = PairGraph::count(&sets(), &PairOptions::default());
        let list = |n| graph.partners(n).iter().map(|p| (p.neuron, p.together)).collect::<Vec<_>>();
        assert_eq!(list(0), [(1, 3), (2, 1), (5, 1)]);
        assert_eq!(list(1), [(0, 3), (2, 2), (5, 2)]);
        assert_eq!(list(3), []);
        assert_eq!(list(5), [(1, 2), (0, 1), (2, 1)]);
        assert_eq!((graph.uses(0), graph.uses(1), graph.uses(4)), (3, 4, 0));
        assert_eq!((graph.together(5, 0), graph.together(3, 4)), (1, 0));
    }

    #[test]
    fn bounds_are_kept() {
        let few = PairGraph::count(&sets(), &PairOptions { partners_max: 1, ..Default::default() });
        assert_eq!(few.partners(5), [Partner { neuron: 1, together: 2 }]);
        // 3^2 + 2^2 + 3^2 + 0 + 3^2 = 31 pairs; 2 for each of 6 neurons are allowed, so every third token is left.
        let thin = PairGraph::count(&sets(), &PairOptions { pairs_per_neuron_max: 2, ..Default::default() });
        assert_eq!(thin.token_step(), 3);
        assert_eq!((thin.uses(0), thin.uses(2)), (1, 1), "tokens 0 and 3");
    }
}
