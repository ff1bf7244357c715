//! Ctrl-C and termination: noticed at the next step of the work, which then ends as after an error, so that no half-written
//! file stays behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

/// From now on a signal sets the flag instead of ending the process. To be called once.
pub(crate) fn watch() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let set = Arc::clone(&flag);
    ctrlc::set_handler(move || set.store(true, Ordering::Relaxed)).context("cannot watch for Ctrl-C")?;
    Ok(flag)
}
