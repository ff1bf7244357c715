//! In which order a layer's neurons should be stored on flash, so that what a token is missing lies close together.
//!
//! A [`Strategy`] makes an order from training sequences; [`score`] replays held-out sequences through the cache and planner
//! of the runtime and says what the order costs in reads, bytes and time; the best by that score is used. The method and
//! what it measured are in `docs/ordering.md`; how orders are kept is `flashlm_formats::orders`.
//!
//! [`Ordering`] does that for the layers of a recording. All else works on sets of wanted neurons: it knows nothing of recordings,
//! models or how an order ends up in a bundle.

mod clusters;
mod gaps;
mod greedy;
mod layers;
mod local_search;
mod path;
mod score;
mod strategy;

use flashlm_formats::ids::{NeuronId, Position};

pub use layers::{OrderError, OrderOptions, Ordering};
pub use score::{OrderScore, ScoreOptions, score};
pub use strategy::{
    Clusters, Frequency, Identity, LayerTraining, OrderingOptions, ParseStrategyError, Path, PathObjective, Strategy,
    StrategyKind,
};

/// For an order (`order[position] = neuron`) the position of every neuron.
///
/// # Panics
/// When `order` is no permutation.
pub fn positions(order: &[NeuronId]) -> Vec<Position> {
    places(order.iter().map(|neuron| neuron.0)).into_iter().map(Position).collect()
}

/// The place of every number in a permutation of them.
fn places(order: impl ExactSizeIterator<Item = u32>) -> Vec<u32> {
    let mut places = vec![u32::MAX; order.len()];
    for (place, number) in (0..).zip(order) {
        let old = std::mem::replace(&mut places[number as usize], place);
        assert_eq!(old, u32::MAX, "{number} occurs twice in the order");
    }
    places
}
