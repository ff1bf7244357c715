use flashlm::replay::WantedSets;
use flashlm_formats::ids::NeuronId;
use serde::Serialize;

use super::PairGraph;

/// The paper's bundles of a neuron and its closest partner, the one that is most often active with it: what they would do.
///
/// Every neuron's record is stored with a copy of its partner's, and one read fetches both. Measured against the same window
/// cache without copies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct PartnerReport {
    /// Neurons that have a partner: that are active with another at all.
    pub with_partner: u32,
    /// Neurons that are somebody's partner.
    pub partners: u32,
    /// Neurons whose partner is the most popular one.
    pub most_popular_of: u32,
    /// Share of the partnerships that fall on the hottest 1 % of the neurons.
    pub hottest_share: f64,
    /// Where a neuron is active, its partner is too: share over all activations.
    pub partner_active: f64,
    /// Of the copies read: share that the token wants at all.
    pub copies_wanted: f64,
    /// Of the copies read: share that the token wants and had not in the window or read already with another neuron. Only
    /// these are of use.
    pub copies_useful: f64,
    /// Times the most often read copy was read, per token.
    pub most_read_copy_per_token: f64,
    /// Requests per token, as a factor of those without copies.
    pub reads_factor: f64,
    /// Bytes per token, as a factor of those without copies.
    pub bytes_factor: f64,
}

impl PartnerReport {
    /// Replays `sets` with a window of `window` tokens; `graph` says who is whose partner.
    ///
    /// A token reads the bundles of what it misses, rarest neuron first, so that copies of hot partners come as early as they
    /// can and every one of them can save a read.
    pub fn of(sets: &WantedSets<NeuronId>, graph: &PairGraph, window: usize) -> Self {
        let neurons = graph.neurons();
        let partner: Vec<Option<u32>> =
            (0..neurons as u32).map(|n| graph.partners(n).first().map(|p| p.neuron)).collect();
        let mut followers = vec![0u32; neurons];
        partner.iter().flatten().for_each(|&f| followers[f as usize] += 1);
        let mut by_heat: Vec<u32> = (0..neurons as u32).collect();
        by_heat.sort_by_key(|&n| (std::cmp::Reverse(graph.uses(n)), n));
        let mut rank = vec![0u32; neurons];
        by_heat.iter().enumerate().for_each(|(r, &n)| rank[n as usize] = r as u32);

        let mut report = PartnerReport {
            with_partner: partner.iter().flatten().count() as u32,
            partners: followers.iter().filter(|&&f| f > 0).count() as u32,
            most_popular_of: followers.iter().copied().max().unwrap_or(0),
            ..Default::default()
        };
        let on_hottest: u32 = by_heat[..neurons.div_ceil(100)].iter().map(|&n| followers[n as usize]).sum();

        // Last token (from 1) at which a neuron was used.
        let mut used_at = vec![0usize; neurons];
        let mut here = vec![0usize; neurons];
        let mut copies_of = vec![0u64; neurons];
        let (mut active, mut with_active_partner) = (0u64, 0u64);
        let (mut missed, mut reads, mut copies, mut wanted, mut useful) = (0u64, 0u64, 0u64, 0u64, 0u64);
        let mut fetched = vec![0usize; neurons];
        let mut missing: Vec<NeuronId> = Vec::new();
        for (token, set) in sets.iter().enumerate().map(|(t, s)| (t + 1, s)) {
            set.iter().for_each(|n| here[n.index()] = token);
            missing.clear();
            for &n in set {
                active += 1;
                with_active_partner += partner[n.index()].is_some_and(|f| here[f as usize] == token) as u64;
                if used_at[n.index()] == 0 || used_at[n.index()] + window < token {
                    missing.push(n);
                }
            }
            missed += missing.len() as u64;
            missing.sort_unstable_by_key(|&n| std::cmp::Reverse(rank[n.index()]));
            for &n in &missing {
                if fetched[n.index()] == token {
                    continue;
                }
                fetched[n.index()] = token;
                reads += 1;
                if let Some(f) = partner[n.index()] {
                    let f = f as usize;
                    copies += 1;
                    copies_of[f] += 1;
                    wanted += (here[f] == token) as u64;
                    let cached = used_at[f] != 0 && used_at[f] + window >= token;
                    useful += (here[f] == token && !cached && fetched[f] != token) as u64;
                    fetched[f] = token;
                }
            }
            set.iter().for_each(|&n| used_at[n.index()] = token);
        }
        let share = |a: u64, b: u64| if b == 0 { 0.0 } else { a as f64 / b as f64 };
        report.hottest_share = share(on_hottest as u64, report.with_partner as u64);
        report.partner_active = share(with_active_partner, active);
        report.copies_wanted = share(wanted, copies);
        report.copies_useful = share(useful, copies);
        report.most_read_copy_per_token = share(copies_of.into_iter().max().unwrap_or(0), sets.tokens() as u64);
        report.reads_factor = share(reads, missed);
        // A bundle holds two records, whether or not its neuron has a partner.
        report.bytes_factor = share(2 * reads, missed);
        report
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coactivation::PairOptions;

    /// One neuron is always active, eight others one at a time: it is everybody's partner, and always cached.
    #[test]
    fn the_hot_neuron_is_everybodys_partner_and_of_no_use() {
        let mut sets = WantedSets::new(9);
        for token in 0..80 {
            sets.push([0, 1 + token % 8].map(NeuronId));
        }
        let graph = PairGraph::count(&sets, &PairOptions::default());
        let report = PartnerReport::of(&sets, &graph, 4);
        assert_eq!((report.with_partner, report.partners, report.most_popular_of), (9, 2, 8));
        assert!(report.partner_active > 0.5);
        assert!(report.copies_wanted > 0.98 && report.copies_useful < 0.02, "{report:?}");
        assert!(report.bytes_factor > 1.9 && report.reads_factor > 0.95, "{report:?}");
        assert!(report.most_read_copy_per_token > 0.98);
    }

    /// Pairs that only ever fire together: copies are all that the paper hoped for.
    #[test]
    fn true_pairs_halve_the_reads() {
        let mut sets = WantedSets::new(40);
        for token in 0..100u32 {
            let pair = token * 7 % 20;
            sets.push([2 * pair, 2 * pair + 1].map(NeuronId));
        }
        let graph = PairGraph::count(&sets, &PairOptions::default());
        let report = PartnerReport::of(&sets, &graph, 4);
        assert_eq!((report.reads_factor, report.bytes_factor, report.copies_useful), (0.5, 1.0, 1.0));
    }
}
