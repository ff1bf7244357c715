//! Where the neurons of an FFN come from.

pub mod predicted;
pub mod resident;
pub mod streamed;
