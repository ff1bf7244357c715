//! The flashlm runtime.
