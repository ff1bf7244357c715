//! Where the hub is, where its cache lies, and who is asking: the environment variables that all its clients share.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use hf_hub::Cache;

use super::HubError;

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
}

// The token is a secret.
impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { endpoint, cache, token, offline, timeout } = self;
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
        Self::from_variables(&|name| std::env::var_os(name).filter(|value| !value.is_empty()))
    }

    fn from_variables(get: &dyn Fn(&str) -> Option<OsString>) -> Result<Self, HubError> {
        let path = |name: &str| get(name).map(PathBuf::from);
        let text = |name: &str| get(name).map(|value| value.to_string_lossy().trim().to_owned());
        let flag = |name: &str| {
            text(name).is_some_and(|value| matches!(value.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"))
        };
        let home = path("HF_HOME")
            .or_else(|| path("XDG_CACHE_HOME").map(|dir| dir.join("huggingface")))
            .or_else(|| path("HOME").map(|dir| dir.join(".cache/huggingface")));
        let hub = home.as_ref().map(|home| home.join("hub"));
        let cache = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE")).or_else(|| hub.clone());
        let cache = cache.ok_or(HubError::Setting {
            name: "HF_HOME",
            value: String::new(),
            expected: "a directory for the cache, as HOME is not set either",
        })?;
        let kept = || match path("HF_TOKEN_PATH") {
            Some(file) => std::fs::read_to_string(file).ok(),
            None => Cache::new(hub.clone()?).token(),
        };
        let token = text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN")).or_else(kept);
        let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        if token.as_ref().is_some_and(|token| !token.bytes().all(|b| b.is_ascii_graphic())) {
            let expected = "a token such as hf_abc, in plain letters and without spaces";
            return Err(HubError::Setting { name: "HF_TOKEN", value: "..".into(), expected });
        }
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        if !(endpoint.starts_with("https://") || endpoint.starts_with("http://")) {
            let expected = "an address that begins with https:// or http://";
            return Err(HubError::Setting { name: "HF_ENDPOINT", value: endpoint, expected });
        }
        let seconds = match text("HF_HUB_DOWNLOAD_TIMEOUT") {
            None => 10,
            Some(value) => value.parse().ok().filter(|&seconds| seconds > 0).ok_or(HubError::Setting {
                name: "HF_HUB_DOWNLOAD_TIMEOUT",
                value,
                expected: "whole seconds",
            })?,
        };
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache,
            token,
            offline: flag("HF_HUB_OFFLINE") || flag("TRANSFORMERS_OFFLINE"),
            timeout: Duration::from_secs(seconds),
        })
    }
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
        assert!(matches!(settings(&[]), Err(HubError::Setting { name: "HF_HOME", .. })));
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
