//! What `flashlm-prep order` leaves: a directory with the storage order of each layer, and what the
//! orders cost. `docs/ordering.md` describes both.
//!
//! Knows nothing of how orders are found.

mod file;
mod stored;
mod summary;

pub use file::{GroupShape, OrderFile, OrderFileError};
pub use stored::StoredOrders;
pub use summary::{LayerScores, ORDERS_JSON, OrderSummary, ReadFigures, StrategyScore};
