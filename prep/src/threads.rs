//! The threads that preparing computes with: the runtime's for matrix products, and rayon's for everything that is divided by layers,
//! groups or tokens.

use std::error::Error;
use std::num::NonZeroUsize;

use flashlm::error::RuntimeError;
use flashlm::threads;
use flashlm_kernels::Threads;

/// The system refused threads.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ThreadsError {
    /// As many as were asked for.
    #[error(transparent)]
    Asked(#[from] RuntimeError),
    /// One for each processor.
    #[error("cannot start {threads} threads: {source}; allow more (`ulimit -u`, a container's pids limit)")]
    Processors {
        /// How many.
        threads: usize,
        /// Why not.
        source: std::io::Error,
    },
}

/// As many threads as asked for, or one for each processor; rayon's too.
///
/// # Errors
/// If the system has fewer to give.
pub fn start(asked: Option<NonZeroUsize>) -> Result<Threads, ThreadsError> {
    let count = asked.unwrap_or_else(threads::default_count);
    start_pool(Some(count))?;
    Ok(threads::start(count)?)
}

/// Starts rayon's threads, if they are not there yet: as many as asked for, or one for each processor. Left to itself rayon starts them
/// at first use, and panics where the system has none to give.
///
/// # Errors
/// If the system has fewer to give.
pub fn start_pool(asked: Option<NonZeroUsize>) -> Result<(), ThreadsError> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(asked.map_or(0, NonZeroUsize::get));
    match pool.build_global() {
        Err(error) if error.source().is_some() => {
            let source = std::io::Error::other(error);
            Err(match asked {
                Some(count) => RuntimeError::Threads { threads: count.get(), source }.into(),
                None => ThreadsError::Processors { threads: threads::default_count().get(), source },
            })
        }
        // Started already.
        _ => Ok(()),
    }
}
