//! Where the neurons of an FFN come from.

pub mod resident;
pub mod streamed;
