//! Says which layer a failed read was for: an offset alone tells a user little.

use flashlm_formats::bundle::Bundle;
use flashlm_io::IoError;

use crate::error::RuntimeError;

/// Where the layers lie in a bundle.
#[derive(Clone, Debug)]
pub struct LayerPlaces(Vec<u64>);

impl LayerPlaces {
    /// Those of `bundle`.
    pub fn new(bundle: &Bundle) -> Self {
        let mut places: Vec<u64> = (0..bundle.spec().layers.len()).map(|layer| bundle.layer(layer).offset).collect();
        places.push(bundle.flash().end());
        Self(places)
    }

    /// The error with its layer, where the offset is in one.
    pub fn name(&self, error: IoError) -> RuntimeError {
        let after = error.offset().map_or(0, |offset| self.0.partition_point(|begin| *begin <= offset));
        if after == 0 || after == self.0.len() {
            return error.into();
        }
        RuntimeError::Read { layer: after - 1, source: error }
    }
}
