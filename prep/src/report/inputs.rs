//! The orders that `flashlm-prep order` left, read one by one as they are needed.

use std::path::{Path, PathBuf};

use flashlm_formats::orders::{OrderFile, OrderFileError, OrderSummary};

/// What `flashlm-prep order` made.
#[derive(Clone, Debug)]
pub struct Orders {
    dir: PathBuf,
    summary: OrderSummary,
}

impl Orders {
    /// Reads `orders.json` in `dir`; the orders themselves are read one by one.
    pub fn read(dir: &Path) -> Result<Self, OrderFileError> {
        Ok(Self { dir: dir.to_path_buf(), summary: OrderSummary::read(dir)? })
    }

    /// What `orders.json` says of all of them.
    pub fn summary(&self) -> &OrderSummary {
        &self.summary
    }

    /// The order of a layer, where there is one.
    pub(super) fn layer(&self, layer: usize, neurons: usize) -> Result<Option<OrderFile>, OrderFileError> {
        let there = self.summary.layers.iter().any(|ordered| ordered.layer == layer);
        there.then(|| OrderFile::read(&self.dir, layer, neurons)).transpose()
    }
}
