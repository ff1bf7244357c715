//! Names that checkpoints have for the matrix of the head.

/// In most families.
pub(crate) const LM_HEAD: &str = "lm_head.weight";

/// GPT-NeoX's.
pub(crate) const EMBED_OUT: &str = "embed_out.weight";

/// All of them; files of either sort are about for GPT-NeoX.
pub(crate) const HEADS: [&str; 2] = [LM_HEAD, EMBED_OUT];
