//! Names in messages.

/// At most this many names in one message.
pub(super) const NAMES_MAX: usize = 20;

/// The names, as far as a message has room for them.
pub(super) fn list(names: &[String]) -> String {
    if names.is_empty() {
        return "nothing".into();
    }
    let mut text = names.iter().take(NAMES_MAX).map(String::as_str).collect::<Vec<_>>().join(", ");
    if names.len() > NAMES_MAX {
        text += &format!(" and {} more", names.len() - NAMES_MAX);
    }
    text
}
