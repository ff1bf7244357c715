//! How a model of the Hugging Face hub is named where a path is expected.

use std::fmt;

/// `org/name[@revision]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelName {
    /// `org/name`.
    pub repo: String,
    /// A branch, a tag or a commit; `main` where none is given.
    pub revision: String,
}

/// Longest organisation, name or revision; the hub allows 96.
const LENGTH_MAX: usize = 128;

impl ModelName {
    /// The model that a text names, if it has this form; whether there is such a model is another question.
    pub fn parse(text: &str) -> Option<Self> {
        let (repo, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (organisation, name) = repo.split_once('/')?;
        let is_good = is_name(organisation) && is_name(name) && revision.split('/').all(is_name);
        is_good.then(|| Self { repo: repo.to_owned(), revision: revision.to_owned() })
    }
}

/// A component that is no way out of a directory, needs no escaping in an address, and looks like no option.
fn is_name(text: &str) -> bool {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let begins = text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_');
    begins && text.len() <= LENGTH_MAX && text.bytes().all(is_plain) && !text.contains("..")
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repo)?;
        if self.revision != "main" {
            write!(f, "@{}", self.revision)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_paths() {
        let parsed = |text| ModelName::parse(text).map(|name| (name.repo, name.revision));
        let name = |repo: &str, revision: &str| Some((repo.to_owned(), revision.to_owned()));
        assert_eq!(parsed("facebook/opt-1.3b"), name("facebook/opt-1.3b", "main"));
        assert_eq!(parsed("a/b@v1.0"), name("a/b", "v1.0"));
        assert_eq!(parsed("a/b@refs/pr/3"), name("a/b", "refs/pr/3"));
        for path in [
            "",
            "opt",
            "/models/opt",
            "./a/b",
            "../a",
            "a/..",
            "a/b/c",
            "a/",
            "a/b@",
            "a/b@../x",
            "a/b@x//y",
            "a/b c",
            "a/b?x",
            "a/.b",
            "-a/b",
            "a\\b/c",
            "a/b%2e",
            "a/b@c@d",
            "ä/b",
        ] {
            assert_eq!(parsed(path), None, "{path}");
        }
        assert_eq!(ModelName::parse("a/b@main").unwrap().to_string(), "a/b");
        assert_eq!(ModelName::parse("a/b@v1").unwrap().to_string(), "a/b@v1");
    }
}
