//! Termination signals: Ctrl-C, a polite request from the system, a terminal that went away.
//!
//! A signal is noted, for the work to look at between two steps; a second one ends the process at once, and so does the first where
//! nothing would be lost by it. No thread waits for signals: what happens in the handler is what may happen there.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGXFSZ};
use signal_hook::flag;

/// Which signal asked; 0 for none.
static ASKED: LazyLock<Arc<AtomicUsize>> = LazyLock::new(Arc::default);
/// Whether the next signal ends the process in its handler.
static AT_ONCE: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// From now on signals are noted, and a second one ends the process. To be called once.
///
/// # Errors
/// What the system said.
pub fn watch() -> io::Result<()> {
    for signal in [SIGINT, SIGTERM, SIGHUP, SIGQUIT] {
        // In this order: a signal first finds what the ones before it left.
        flag::register_conditional_shutdown(signal, i32::from(exit_code(signal)), Arc::clone(&AT_ONCE))?;
        flag::register_usize(signal, Arc::clone(&ASKED), signal as usize)?;
        flag::register(signal, Arc::clone(&AT_ONCE))?;
    }
    Ok(())
}

/// From now on a write beyond a file size limit (`ulimit -f`) is an error like any other of a full disk; by itself the system
/// would end the process without a word, and half-written files would stay.
///
/// # Errors
/// What the system said.
pub fn outlive_file_size_limits() -> io::Result<()> {
    flag::register(SIGXFSZ, Arc::default()).map(|_| ())
}

/// Whether the first signal, too, ends the process at once: while loading, or while the user is being asked.
pub fn end_at_once(yes: bool) {
    AT_ONCE.store(yes || asked().is_some(), Ordering::SeqCst);
}

/// The exit code for the signal that asked for an end, if one did: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
pub fn asked() -> Option<u8> {
    match ASKED.load(Ordering::SeqCst) {
        0 => None,
        signal => Some(exit_code(signal as i32)),
    }
}

/// Forgets a Ctrl-C that ended one step of many, so that the next can begin; other signals end everything.
pub fn forget_interrupt() {
    if ASKED.compare_exchange(SIGINT as usize, 0, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
        AT_ONCE.store(false, Ordering::SeqCst);
    }
}

/// As shells have it.
fn exit_code(signal: i32) -> u8 {
    128 + signal as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_noted_and_names_its_exit_code() {
        watch().unwrap();
        assert_eq!(asked(), None);
        signal_hook::low_level::raise(SIGINT).unwrap();
        assert_eq!(asked(), Some(130));
        assert!(AT_ONCE.load(Ordering::SeqCst), "the second one ends the process");
        forget_interrupt();
        assert_eq!((asked(), AT_ONCE.load(Ordering::SeqCst)), (None, false));
        signal_hook::low_level::raise(SIGTERM).unwrap();
        forget_interrupt();
        assert_eq!(asked(), Some(143), "only Ctrl-C is forgotten");
    }
}
