//! `~` and `$NAME` in paths of the environment, as Python's client of the hub expands them: where nothing else did (an .env file, a
//! Dockerfile), the cache must still be the one that all clients share.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use nix::unistd::{Uid, User};

/// Python's `expandvars(expanduser(path))`, with the environment's variables as `get` has them.
pub(super) fn expand(path: &OsStr, get: &dyn Fn(&str) -> Option<OsString>) -> PathBuf {
    let with_home = expand_user(path.as_bytes(), get);
    OsString::from_vec(expand_variables(&with_home, get)).into()
}

/// `~` and `~user` at the start; a user whom nobody knows stays as written.
fn expand_user(path: &[u8], get: &dyn Fn(&str) -> Option<OsString>) -> Vec<u8> {
    let Some(rest) = path.strip_prefix(b"~") else { return path.to_vec() };
    let (name, rest) = rest.split_at(rest.iter().position(|&b| b == b'/').unwrap_or(rest.len()));
    let home = if name.is_empty() {
        get("HOME").or_else(|| home_of(User::from_uid(Uid::current())))
    } else {
        std::str::from_utf8(name).ok().and_then(|name| home_of(User::from_name(name)))
    };
    let Some(home) = home else { return path.to_vec() };
    let home = home.as_bytes();
    let end = home.iter().rposition(|&b| b != b'/').map_or(0, |last| last + 1);
    let whole = [&home[..end], rest].concat();
    if whole.is_empty() { b"/".to_vec() } else { whole }
}

fn home_of(user: nix::Result<Option<User>>) -> Option<OsString> {
    Some(user.ok()??.dir.into())
}

/// `$NAME` and `${NAME}`, once: what a variable holds is taken as it is, and one that is not set stays as written.
fn expand_variables(path: &[u8], get: &dyn Fn(&str) -> Option<OsString>) -> Vec<u8> {
    let mut out = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some(at) = rest.iter().position(|&b| b == b'$') {
        out.extend(&rest[..at]);
        rest = &rest[at..];
        let (name, length) = match rest.get(1) {
            Some(b'{') => match rest.iter().position(|&b| b == b'}') {
                Some(end) => (&rest[2..end], end + 1),
                None => (&[][..], 1),
            },
            _ => {
                let is_word = |b: &u8| b.is_ascii_alphanumeric() || *b == b'_';
                let word = rest[1..].iter().take_while(|b| is_word(b)).count();
                (&rest[1..=word], word + 1)
            }
        };
        // What no variable can be called is asked of nobody.
        let is_name = !name.is_empty() && !name.contains(&b'=') && !name.contains(&0);
        match std::str::from_utf8(name).ok().filter(|_| is_name).and_then(get) {
            Some(value) => out.extend(value.as_bytes()),
            None => out.extend(&rest[..length]),
        }
        rest = &rest[length..];
    }
    out.extend(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_what_python_makes_of_them() {
        let variables = [("HOME", "/home/me/"), ("A", "a"), ("AB", "ab"), ("N", "$A"), ("E", ""), ("ROOT", "/")];
        let get = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| OsString::from(value));
        // The right column is what os.path.expandvars(os.path.expanduser(..)) of Python 3.11 gives.
        for (path, expected) in [
            ("", ""),
            ("/x/y", "/x/y"),
            ("~", "/home/me"),
            ("~/hf", "/home/me/hf"),
            ("~//hf", "/home/me//hf"),
            ("x/~", "x/~"),
            ("~nobody-of-this-name/hf", "~nobody-of-this-name/hf"),
            ("$HOME/hf", "/home/me//hf"),
            ("${HOME}hf", "/home/me/hf"),
            ("$A$AB/${A}B", "aab/aB"),
            ("$N", "$A"),
            ("$E/x", "/x"),
            ("$UNSET/${UNSET}", "$UNSET/${UNSET}"),
            ("$", "$"),
            ("$/$$A", "$/$a"),
            ("${A", "${A"),
            ("${}x", "${}x"),
            ("$A-ä", "a-ä"),
            ("$Aä", "aä"),
            ("${ä}", "${ä}"),
        ] {
            assert_eq!(expand(OsStr::new(path), &get).to_str(), Some(expected), "{path}");
        }
        let root = |name: &str| (name == "HOME").then(|| OsString::from("/"));
        assert_eq!(expand(OsStr::new("~"), &root).to_str(), Some("/"));
        assert_eq!(expand(OsStr::new("~/x"), &root).to_str(), Some("/x"));
        // Others than oneself have homes, too.
        let me = User::from_uid(Uid::current()).unwrap();
        if let Some(User { name, dir, .. }) = me {
            assert_eq!(expand(OsStr::new(&format!("~{name}/hf")), &get), dir.join("hf"));
        }
        // Without HOME the system knows where the user lives.
        assert!(expand(OsStr::new("~/x"), &|_| None).is_absolute());
    }
}
