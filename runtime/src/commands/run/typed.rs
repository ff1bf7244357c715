//! What somebody at a terminal did when asked for a line.

/// What was typed.
pub(super) enum Typed {
    Line(Vec<u8>),
    /// Ctrl-C, which gives up a line.
    #[cfg(feature = "editor")]
    Interrupted,
    /// Ctrl-D, or the end of the input.
    End,
}
