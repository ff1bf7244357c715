//! Which neurons fire together, how often, and how soon they fire again.
//!
//! [`PairGraph`] counts exactly, for every neuron, with which others it is active, and keeps the strongest partners only,
//! so that memory grows with the number of neurons and not with its square. [`LayerActivity`] is what a layer's firing
//! looks like: skew, reuse, unions. [`PartnerReport`] measures the paper's "closest friend" bundles and why they fail.
//!
//! Works on [`WantedSets`](flashlm::replay::WantedSets): knows nothing of recordings, orders or disks.

mod activity;
mod pairs;
mod partner_copies;

pub use activity::{LayerActivity, WindowReuse};
pub(crate) use pairs::Postings;
pub use pairs::{PairGraph, PairOptions, Partner};
pub use partner_copies::PartnerReport;
