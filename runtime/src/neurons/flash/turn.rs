//! Where the source is between the calls of a step.

/// What has been decided, read ahead or begun, and for which layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Nothing of a layer has begun.
    Idle,
    /// The scores say what `layer` will probably want; reads for that have not begun. `begun`: others for the layer have.
    Predicted { layer: usize, begun: bool },
    /// Reads ahead for `layer` have begun.
    ReadingAhead { layer: usize },
    /// The neurons of `layer` are chosen and being read; `next_begun`: reads ahead for the layer after it have begun, too.
    Chosen { layer: usize, next_begun: bool },
    /// The first `issued` chunks of `layer` are being read for a prompt, from chunk `place` of the ring on.
    Streaming { layer: usize, place: u32, issued: u32 },
}

impl Turn {
    /// Whether the store has been told that `layer` is next.
    pub(super) fn has_begun(self, layer: usize) -> bool {
        match self {
            Turn::Idle | Turn::Streaming { .. } => false,
            Turn::Predicted { layer: of, begun } => begun && of == layer,
            Turn::ReadingAhead { layer: of } => of == layer,
            Turn::Chosen { layer: of, next_begun } => next_begun && of + 1 == layer,
        }
    }

    /// Where it stands once the chosen layer is computed, or was given up.
    pub(super) fn behind(self) -> Self {
        match self {
            Turn::Chosen { layer, next_begun: true } => Turn::ReadingAhead { layer: layer + 1 },
            Turn::Chosen { .. } => Turn::Idle,
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_begins_once() {
        let chosen = Turn::Chosen { layer: 3, next_begun: true };
        assert!(chosen.has_begun(4) && !chosen.has_begun(3));
        assert!(chosen.behind().has_begun(4));
        assert_eq!(Turn::Chosen { layer: 3, next_begun: false }.behind(), Turn::Idle);
        assert!(!Turn::Predicted { layer: 4, begun: false }.has_begun(4));
        assert!(Turn::Predicted { layer: 4, begun: true }.has_begun(4));
    }
}
