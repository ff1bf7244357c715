//! In which order a layer's neurons should be stored on flash, so that what a token is missing lies close together.
//!
//! A [`Strategy`] makes an order from training sequences; [`score`] replays held-out sequences through the cache and planner
//! of the runtime and says what the order costs in reads, bytes and time; the best by that score is used. The method and
//! what it measured are in `docs/ordering.md`; how orders are kept is `flashlm_formats::orders`.
//!
//! [`Ordering`] does that for the layers of a recording. All else works on sets of wanted neurons: it knows nothing of recordings,
//! models or how an order ends up in a bundle.

mod cache_share;
mod gaps;
mod greedy;
mod layers;
mod local_search;
mod path;
mod score;
mod strategy;

pub use cache_share::typical_cache_share;
pub use layers::{OrderError, OrderOptions, Ordering};
pub use score::{OrderScore, ScoreOptions, score};
pub use strategy::{
    Frequency, Identity, LayerTraining, OrderingOptions, ParseStrategyError, Path, PathObjective, Strategy,
    StrategyKind,
};

/// For an order (`order[position] = neuron`) the position of every neuron.
///
/// # Panics
/// When `order` is no permutation.
pub fn positions(order: &[u32]) -> Vec<u32> {
    let mut position = vec![u32::MAX; order.len()];
    for (at, &neuron) in order.iter().enumerate() {
        let old = std::mem::replace(&mut position[neuron as usize], at as u32);
        assert_eq!(old, u32::MAX, "neuron {neuron} occurs twice in the order");
    }
    position
}
