//! Where the neurons of an FFN come from.

pub mod checks;
pub mod flash;
pub mod place;
pub mod predicted;
pub mod resident;
pub mod streamed;
