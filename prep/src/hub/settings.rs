//! Where the hub is, where its cache lies, and who is asking: the environment variables that all its clients share.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use flashlm_formats::regular::read_regular;

use url::Url;

use super::HubError;
use super::expand::expand;
use super::patience::Pace;

/// Longest token file.
const TOKEN_BYTES_MAX: u64 = 1 << 16;

/// How the hub is reached.
#[derive(Clone)]
pub struct Settings {
    /// Address, without a slash at its end.
    pub endpoint: String,
    /// The cache's directory, in which each repository has one.
    pub cache: PathBuf,
    /// Sent to the endpoint and to nobody else.
    pub token: Option<String>,
    /// Whether only the cache may be used.
    pub offline: bool,
    /// Longest wait for a connection, an answer, or more of a file.
    pub timeout: Duration,
    /// What comes more slowly is given up.
    pub pace: Pace,
    /// Whether the cache may have symbolic links; without them files lie in the snapshots themselves.
    pub links: bool,
}

// The token is a secret.
impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { endpoint, cache, token, offline, timeout, pace: _, links: _ } = self;
        let token = token.as_ref().map(|_| "..");
        write!(f, "Settings {{ {endpoint}, {}, token: {token:?}, offline: {offline}, {timeout:?} }}", cache.display())
    }
}

impl Settings {
    /// From the process's environment.
    ///
    /// # Errors
    /// `Setting` for a variable that cannot be meant.
    pub fn from_environment() -> Result<Self, HubError> {
        Self::from_variables(&|name| std::env::var_os(name))
    }

    fn from_variables(variable: &dyn Fn(&str) -> Option<OsString>) -> Result<Self, HubError> {
        let get = |name: &str| variable(name).filter(|value| !value.is_empty());
        let path = |name: &str| get(name).map(|value| expand(&value, variable));
        let text = |name: &str| get(name).map(|value| value.to_string_lossy().trim().to_owned());
        let flag = |name: &str| {
            text(name).is_some_and(|value| matches!(value.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"))
        };
        let home = path("HF_HOME")
            .or_else(|| path("XDG_CACHE_HOME").map(|dir| dir.join("huggingface")))
            .or_else(|| Some(expand("~/.cache/huggingface".as_ref(), variable)).filter(|dir| dir.is_absolute()));
        let hub = home.as_ref().map(|home| home.join("hub"));
        let cache = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE")).or_else(|| hub.clone());
        let cache = cache.ok_or(HubError::Setting {
            name: "HF_HOME",
            value: String::new(),
            expected: "a directory for the cache, as HOME is not set either",
        })?;
        let kept = || match path("HF_TOKEN_PATH") {
            Some(file) => read_token(&file),
            None => String::from_utf8(read_regular(&home.as_ref()?.join("token"), TOKEN_BYTES_MAX).ok()?).ok(),
        };
        let token = text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN")).or_else(kept);
        let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        let token = token.filter(|_| !flag("HF_HUB_DISABLE_IMPLICIT_TOKEN"));
        if token.as_ref().is_some_and(|token| !token.bytes().all(|b| b.is_ascii_graphic())) {
            let expected = "a token such as hf_abc, in plain letters and without spaces";
            return Err(HubError::Setting { name: "HF_TOKEN", value: "..".into(), expected });
        }
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        address(&endpoint)?;
        let seconds = match text("HF_HUB_DOWNLOAD_TIMEOUT") {
            None => 10,
            Some(value) => value.parse().ok().filter(|&seconds| seconds > 0).ok_or(HubError::Setting {
                name: "HF_HUB_DOWNLOAD_TIMEOUT",
                value,
                expected: "whole seconds",
            })?,
        };
        let timeout = Duration::from_secs(seconds);
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache,
            token,
            offline: flag("HF_HUB_OFFLINE") || flag("TRANSFORMERS_OFFLINE"),
            timeout,
            pace: Pace::patient(timeout),
            links: !flag("HF_HUB_DISABLE_SYMLINKS"),
        })
    }

    /// The endpoint, read.
    pub(super) fn address(&self) -> Result<Url, HubError> {
        address(&self.endpoint)
    }
}

/// The hub's address.
fn address(endpoint: &str) -> Result<Url, HubError> {
    let url = Url::parse(endpoint).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
    let expected = "an address that begins with https:// or http://";
    url.ok_or_else(|| HubError::Setting { name: "HF_ENDPOINT", value: endpoint.to_owned(), expected })
}

/// The token in a file that the user names, which may be a pipe: `HF_TOKEN_PATH=<(pass show hf)`.
fn read_token(file: &Path) -> Option<String> {
    let mut text = String::new();
    File::open(file).ok()?.take(TOKEN_BYTES_MAX).read_to_string(&mut text).ok()?;
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Result<Settings, HubError> {
        let find = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| OsString::from(value));
        Settings::from_variables(&find)
    }

    #[test]
    fn the_cache_is_where_all_clients_look() {
        let cache = |variables: &[_]| settings(variables).unwrap().cache.display().to_string();
        assert_eq!(cache(&[("HOME", "/h")]), "/h/.cache/huggingface/hub");
        assert_eq!(cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), "/x/huggingface/hub");
        assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", "/f"), ("XDG_CACHE_HOME", "/x")]), "/f/hub");
        assert_eq!(cache(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/f")]), "/c");
        assert_eq!(cache(&[("HF_HUB_CACHE", ""), ("HF_HOME", "/f")]), "/f/hub", "nothing is no directory");
    }

    #[test]
    fn tildes_and_variables_in_paths_are_expanded() {
        let home = [("HOME", "/h"), ("D", "/d")];
        for (name, value, cache) in [
            ("HF_HOME", "~/hf", "/h/hf/hub"),
            ("HF_HOME", "$HOME/hf", "/h/hf/hub"),
            ("HF_HUB_CACHE", "${D}/c", "/d/c"),
            ("HUGGINGFACE_HUB_CACHE", "~/c", "/h/c"),
            ("XDG_CACHE_HOME", "~/x", "/h/x/huggingface/hub"),
            ("HF_HOME", "$UNSET/hf", "$UNSET/hf/hub"),
        ] {
            let found = settings(&[&home[..], &[(name, value)]].concat()).unwrap().cache;
            assert_eq!(found.to_str(), Some(cache), "{name}={value}");
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("t"), "mine").unwrap();
        let variables = [("HOME", dir.path().to_str().unwrap()), ("HF_TOKEN_PATH", "~/t")];
        assert_eq!(settings(&variables).unwrap().token.as_deref(), Some("mine"));
    }

    #[test]
    fn a_token_comes_from_the_variable_or_from_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().to_str().unwrap();
        let token = |more: &[(&str, &str)]| settings(&[&[("HF_HOME", home)], more].concat()).unwrap().token;
        assert_eq!(token(&[]), None);
        std::fs::write(dir.path().join("token"), "from-file\n").unwrap();
        assert_eq!(token(&[]).as_deref(), Some("from-file"));
        assert_eq!(token(&[("HF_TOKEN", " set ")]).as_deref(), Some("set"));
        // The token file stays in HF_HOME when the cache is elsewhere.
        assert_eq!(token(&[("HF_HUB_CACHE", "/c")]).as_deref(), Some("from-file"));
        let other = dir.path().join("other");
        std::fs::write(&other, "third").unwrap();
        assert_eq!(token(&[("HF_TOKEN_PATH", other.to_str().unwrap())]).as_deref(), Some("third"));
        assert!(!format!("{:?}", settings(&[("HF_HOME", home), ("HF_TOKEN", "hf_x")]).unwrap()).contains("hf_x"));
        assert!(settings(&[("HF_HOME", home), ("HF_TOKEN", "a\nb")]).is_err());
        assert_eq!(token(&[("HF_TOKEN", "set"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]), None);
        // Neither waited for nor read without end.
        std::fs::remove_file(dir.path().join("token")).unwrap();
        let made = std::process::Command::new("mkfifo").arg(dir.path().join("token")).status().unwrap();
        assert!(made.success());
        assert_eq!(token(&[]), None);
        assert!(settings(&[("HF_HOME", home), ("HF_TOKEN_PATH", "/dev/zero")]).is_err());
    }

    #[test]
    fn offline_and_endpoint_are_read() {
        let with = |name, value| settings(&[("HOME", "/h"), (name, value)]);
        assert_eq!(with("A", "b").unwrap().endpoint, "https://huggingface.co");
        assert_eq!(with("HF_ENDPOINT", "http://localhost:8080/").unwrap().endpoint, "http://localhost:8080");
        assert!(with("HF_ENDPOINT", "localhost").is_err());
        for (value, expected) in [("1", true), ("true", true), ("0", false), ("no", false)] {
            assert_eq!(with("HF_HUB_OFFLINE", value).unwrap().offline, expected, "{value}");
        }
        assert!(with("HF_HUB_DOWNLOAD_TIMEOUT", "soon").is_err());
    }
}
