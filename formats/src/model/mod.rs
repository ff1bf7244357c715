//! The architecture as data.
//!
//! A [`ModelSpec`] says everything the forward pass needs to know about a model but its weights; each of its layers is a
//! [`LayerSpec`]. It is made from a `config.json` by one small file per family (`checkpoint/families/`), kept in the bundle's
//! manifest, and read by the only forward pass there is. It knows nothing of files.
//!
//! The tensors are named canonically here as well, so that every family looks the same from the bundle on:
//! matrices are `[outputs, inputs]`, row-major.

mod dtype;
mod ffn;
mod layer;
mod spec;
mod stored;
mod tensors;

pub use dtype::{DType, NotAWeight};
pub use ffn::{Activation, FeedForward, Ffn};
pub use layer::{Attention, Block, LayerSpec, Norm, NormKind, Positions, RopeScaling};
pub use spec::{LAYERS_MAX, LayerMismatch, LearnedPositions, ModelSpec};
pub use tensors::ResidentTensor;
