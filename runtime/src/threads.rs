//! Starting the threads that compute, in one place, so that the message is always the same where the system allows none.

use std::num::NonZeroUsize;

use flashlm_kernels::Threads;

use crate::error::{Result, RuntimeError};

/// One for each processor.
pub fn default_count() -> NonZeroUsize {
    std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

/// Starts `count` threads, the caller included.
///
/// # Errors
/// `Threads`.
pub fn start(count: NonZeroUsize) -> Result<Threads> {
    Threads::new(count).map_err(|source| RuntimeError::Threads { threads: count.get(), source })
}
