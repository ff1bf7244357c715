//! Turns a panic inside a library that reads what others wrote into an error.
//!
//! The `tokenizers` library panics on files that are wrong in ways it did not expect. Nothing of it is used again after that by those
//! who get the error, so a state left half changed harms nobody. A program may ask for silence about these panics; a library does
//! not touch its host's panic hook.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

thread_local!(static GUARDED: Cell<bool> = const { Cell::new(false) });

/// The result of `work`, or what it said when it panicked.
///
/// # Errors
/// The panic's message.
pub fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    let outer = GUARDED.replace(true);
    let result = catch_unwind(AssertUnwindSafe(work));
    GUARDED.set(outer);
    result.map_err(|panic| panic_message(&*panic).chars().take(200).collect())
}

/// For programs: from now on the usual message of a panic is not printed for those that [`guarded`] turns into errors.
pub fn silence_guarded_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !GUARDED.get() {
                usual(panic);
            }
        }));
    });
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_its_message() {
        assert_eq!(guarded(|| 5), Ok(5));
        let number = 7;
        assert_eq!(guarded(|| panic!("no {number}")), Err::<(), _>("no 7".into()));
        assert_eq!(guarded(|| panic!("plain")), Err::<(), _>("plain".into()));
        assert!(guarded(|| guarded(|| panic!("inner")).unwrap_err()).is_ok(), "one within another");
        assert!(std::panic::catch_unwind(|| panic!("seen")).is_err(), "unguarded panics stay what they are");
    }
}
