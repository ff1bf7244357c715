//! What a stage was made from: a short name for all of it, and in words what somebody may have changed.

use std::fmt::{Display, Formatter, Result};

use flashlm_formats::bundle::checksum;

/// What a stage is made from. The name alone decides whether it is the same.
#[derive(Clone, Debug)]
pub(super) struct Stamp {
    name: String,
    /// Options with their values, and other inputs with names of their contents.
    inputs: Vec<(&'static str, String)>,
}

impl Stamp {
    /// `parts` are everything that the result depends on; `inputs` are what of it can be told to the user.
    pub(super) fn new(parts: &[&str], inputs: Vec<(&'static str, String)>) -> Self {
        Self { name: fingerprint(parts), inputs }
    }

    /// The short name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// This with one more part, of which there is nothing to tell.
    pub(super) fn and(&self, part: &str) -> Self {
        Self::new(&[&self.name, part], self.inputs.clone())
    }

    /// Whether a stage with this stamp was made from the same.
    pub(super) fn is(&self, found: &str) -> bool {
        found.lines().next() == Some(self.name())
    }

    /// In words, what is not as it was when a stage got the stamp `found`.
    pub(super) fn changed(&self, found: &str) -> String {
        let before = |input: &str| found.lines().skip(1).find_map(|line| line.strip_prefix(input)?.strip_prefix('\t'));
        let changed = self.inputs.iter().filter_map(|(input, now)| {
            let before = before(input).filter(|before| before != now)?;
            // Of other inputs there are only hashes.
            Some(match input.starts_with("--") {
                true => format!("{input} was {before} and is {now}"),
                false => format!("{input} changed"),
            })
        });
        match changed.collect::<Vec<_>>() {
            changed if changed.is_empty() => "what it is made from is not what it was".into(),
            changed => changed.join(", "),
        }
    }
}

/// As it is in a file.
impl Display for Stamp {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(&self.name)?;
        self.inputs.iter().try_for_each(|(input, value)| write!(f, "\n{input}\t{value}"))
    }
}

/// A short name for inputs.
pub(super) fn fingerprint(parts: &[&str]) -> String {
    // The lengths: no two lists of parts are one text.
    let text: String = parts.iter().map(|part| format!("{}|{part}|", part.len())).collect();
    format!("{:016x}", checksum(text.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changed_is_named() {
        let stamp = |seed: &str, text: &str| {
            Stamp::new(
                &[seed, text],
                vec![("--seed", seed.into()), ("--recall", "0.9".into()), ("the text", text.into())],
            )
        };
        let before = stamp("1", "ab").to_string();
        assert!(stamp("1", "ab").is(&before) && !stamp("2", "ab").is(&before));
        assert_eq!(stamp("2", "ab").changed(&before), "--seed was 1 and is 2");
        assert_eq!(stamp("2", "cd").changed(&before), "--seed was 1 and is 2, the text changed");
        // Of another version, or damaged.
        for found in ["", "0123", "0123\n--seed", "0123\nother\t1"] {
            assert_eq!(stamp("2", "ab").changed(found), "what it is made from is not what it was");
        }
    }
}
