use flashlm::replay::WantedSets;
use flashlm_formats::ids::NeuronId;
use serde::{Deserialize, Serialize};

/// What a layer's firing looks like.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerActivity {
    /// Neurons of the layer.
    pub neurons: u32,
    /// Recorded tokens.
    pub tokens: usize,
    /// Share of the neurons active at a token, on average.
    pub active_fraction: f64,
    /// Active neurons of a token, 99th percentile.
    pub active_p99: usize,
    /// Neurons active at no token.
    pub never_active: usize,
    /// Share of all activations in the hottest 1, 5, 10, 20 and 50 % of the neurons ([`HOTTEST`](LayerActivity::HOTTEST)).
    pub hottest_share: [f64; 5],
    /// Share of the tokens at which the neuron of that rank is active, hottest first, at the same ranks.
    pub rate_at_rank: [f64; 5],
    /// What a window of 1, 2, .. tokens does.
    pub windows: Vec<WindowReuse>,
}

/// What a window of the last tokens does.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct WindowReuse {
    /// Tokens of the window.
    pub tokens: usize,
    /// Share of a token's active neurons that were active in none of the `tokens` before it, over tokens that have this many.
    pub new_fraction: f64,
    /// Share of the layer active in any of `tokens` successive tokens.
    pub union_fraction: f64,
    /// Share of the layer that is new at a token: what a window cache reads.
    pub read_fraction: f64,
}

impl LayerActivity {
    /// The ranks, in percent, that the hot-neuron distribution is given at.
    pub const HOTTEST: [u32; 5] = [1, 5, 10, 20, 50];

    /// Looks at all tokens; windows of up to `windows_max` tokens, none reaching back over a sequence's start.
    ///
    /// `sequences` are the start offsets of the sequences and the number of tokens.
    pub fn of(sets: &WantedSets<NeuronId>, sequences: &[u32], windows_max: usize) -> Self {
        let (neurons, tokens) = (sets.layer_size() as usize, sets.tokens());
        let mut uses = vec![0u64; neurons];
        let mut sizes = Vec::with_capacity(tokens);
        // For windows of w tokens: tokens looked at, active, new ones, unions.
        let mut seen = vec![(0u64, 0u64, 0u64, 0u64); windows_max];
        let mut last = vec![0usize; neurons];
        for bounds in sequences.windows(2) {
            let (start, end) = (bounds[0] as usize, bounds[1] as usize);
            for token in start..end {
                let active = sets.token(token);
                sizes.push(active.len());
                let reach = (token - start).min(windows_max);
                // How many of the active were last active so many tokens ago; those not seen within reach come last.
                let mut ago = vec![0u64; reach + 1];
                for &n in active {
                    let n = n.index();
                    uses[n] += 1;
                    // Tokens count from 1 here, so that 0 means never.
                    let distance = (token + 1 - last[n]).min(token + 1 - start);
                    ago[if last[n] > start && distance <= reach { distance - 1 } else { reach }] += 1;
                    last[n] = token + 1;
                }
                let mut new = active.len() as u64;
                for window in 1..=reach {
                    new -= ago[window - 1];
                    let s = &mut seen[window - 1];
                    *s = (s.0 + 1, s.1 + active.len() as u64, s.2 + new, s.3);
                }
            }
        }
        for (w, s) in seen.iter_mut().enumerate() {
            s.3 = unions(sets, sequences, w + 1);
        }
        let share = |a: u64, b: u64| if b == 0 { 0.0 } else { a as f64 / b as f64 };
        let windows = seen.iter().enumerate().map(|(w, s)| {
            let spans: u64 = sequences.windows(2).map(|b| ((b[1] - b[0]) as u64).saturating_sub(w as u64)).sum();
            WindowReuse {
                tokens: w + 1,
                new_fraction: share(s.2, s.1),
                union_fraction: share(s.3, spans * neurons as u64),
                read_fraction: share(s.2, s.0 * neurons as u64),
            }
        });
        let windows = windows.collect();
        sizes.sort_unstable();
        uses.sort_unstable_by(|a, b| b.cmp(a));
        let all: u64 = uses.iter().sum();
        let rank = |percent: u32| (neurons * percent as usize).div_ceil(100).max(1);
        LayerActivity {
            neurons: neurons as u32,
            tokens,
            active_fraction: share(all, (tokens * neurons) as u64),
            active_p99: sizes.get(tokens * 99 / 100).copied().unwrap_or(0),
            never_active: uses.iter().filter(|&&u| u == 0).count(),
            hottest_share: Self::HOTTEST.map(|p| share(uses[..rank(p)].iter().sum(), all)),
            rate_at_rank: Self::HOTTEST.map(|p| share(uses[rank(p) - 1], tokens as u64)),
            windows,
        }
    }
}

/// Sum over all windows of `window` tokens within a sequence of the neurons active in any of them.
fn unions(sets: &WantedSets<NeuronId>, sequences: &[u32], window: usize) -> u64 {
    let mut count = vec![0u32; sets.layer_size() as usize];
    let mut sum = 0;
    for bounds in sequences.windows(2) {
        let (start, end) = (bounds[0] as usize, bounds[1] as usize);
        count.fill(0);
        let mut size = 0u64;
        for token in start..end {
            for &n in sets.token(token) {
                size += (count[n.index()] == 0) as u64;
                count[n.index()] += 1;
            }
            if token + 1 >= start + window {
                sum += size;
                for &n in sets.token(token + 1 - window) {
                    count[n.index()] -= 1;
                    size -= (count[n.index()] == 0) as u64;
                }
            }
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_example_by_hand() {
        let mut sets = WantedSets::new(10);
        for token in [&[0, 1][..], &[0, 2], &[1], /* second sequence */ &[0], &[0, 3]] {
            sets.push(token.iter().copied().map(NeuronId));
        }
        let a = LayerActivity::of(&sets, &[0, 3, 5], 2);
        assert_eq!((a.tokens, a.never_active, a.active_p99), (5, 6, 2));
        assert!((a.active_fraction - 8.0 / 50.0).abs() < 1e-12);
        // Window 1: {0 2} after {0 1}: 2 new; {1} after {0 2}: 1 new; {0 3} after {0}: 3 new. 3 new of 5 active.
        assert!((a.windows[0].new_fraction - 3.0 / 5.0).abs() < 1e-12);
        assert!((a.windows[0].union_fraction - 8.0 / 50.0).abs() < 1e-12);
        // Window 2: only {1} has two tokens before it, and one of them had it.
        assert!((a.windows[1].new_fraction - 0.0).abs() < 1e-12);
        // Unions of two: {0 1 2}, {0 1 2}, {0 3}.
        assert!((a.windows[1].union_fraction - 8.0 / 30.0).abs() < 1e-12);
        assert!((a.hottest_share[2] - 4.0 / 8.0).abs() < 1e-12, "the hottest tenth is neuron 0");
        assert!((a.rate_at_rank[3] - 2.0 / 5.0).abs() < 1e-12, "the second neuron of ten");
    }
}
