//! The slots of a cache.

flashlm_formats::id! {
    /// A slot of a layer's cache.
    pub SlotId
}
