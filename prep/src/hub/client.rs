//! Asking the hub: one request at a time, redirects followed here, the token for the endpoint alone.

use std::io::Read;
use std::time::Duration;

use serde::Deserialize;
use ureq::http::Response;
use ureq::{Agent, Body};
use url::Url;

use super::patience::{self, Pace, Paced};
use super::remote::Remote;
use super::{HubError, ModelName, Settings};

/// Redirects in a row; the hub makes one or two.
const REDIRECTS_MAX: usize = 8;
/// Longest list of a repository's files.
const INFO_BYTES_MAX: u64 = 64 << 20;

/// A hub, and the model that is wanted from it.
pub(super) struct Client {
    agent: Agent,
    endpoint: Url,
    token: Option<String>,
    model: ModelName,
    pace: Pace,
}

/// What a model's revision is.
pub(super) struct ModelInfo {
    pub(super) commit: String,
    pub(super) files: Vec<String>,
}

#[derive(Clone, Copy, PartialEq)]
enum Method {
    Head,
    /// From this byte on.
    Get(u64),
    /// From this byte on, so many.
    Part(u64, u64),
}

impl Client {
    pub(super) fn new(settings: &Settings, model: &ModelName) -> Result<Self, HubError> {
        let timeout = Some(settings.timeout);
        let config = Agent::config_builder()
            .max_redirects(0)
            .http_status_as_error(false)
            .timeout_resolve(timeout)
            .timeout_connect(timeout)
            .timeout_recv_response(timeout.map(|t| t.max(Duration::from_secs(1))))
            .timeout_per_read(timeout)
            .user_agent(concat!("flashlm-prep/", env!("CARGO_PKG_VERSION")))
            .build();
        let Settings { token, pace, .. } = settings.clone();
        Ok(Self { agent: config.into(), endpoint: settings.address()?, token, model: model.clone(), pace })
    }

    /// The slowest that bodies may come.
    pub(super) fn pace(&self) -> Pace {
        self.pace
    }

    /// The endpoint's address with these parts, each escaped.
    fn address<'a>(&self, parts: impl Iterator<Item = &'a str>) -> Url {
        let mut url = self.endpoint.clone();
        // `Settings::address` takes none that cannot have parts.
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(parts);
        }
        url
    }

    /// Commit and files of the revision that is wanted.
    pub(super) fn model_info(&self, say: &mut dyn FnMut(&str)) -> Result<ModelInfo, HubError> {
        #[derive(Deserialize)]
        struct Info {
            sha: String,
            #[serde(default)]
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let name = self.model.repo.split('/');
        let url = self.address(["api", "models"].into_iter().chain(name).chain(["revision", &self.model.revision]));
        let mut response = self.patiently(Method::Get(0), &url, say)?;
        let status = response.status().as_u16();
        if status != 200 {
            return Err(self.refused(&url, &response));
        }
        let wrong = |what: String| HubError::Answer { url: url.to_string(), what };
        let mut body = Vec::new();
        let mut reader = Paced::new(response.body_mut().as_reader(), self.pace).take(INFO_BYTES_MAX + 1);
        reader.read_to_end(&mut body).map_err(|e| unreachable(&url, &e))?;
        if body.len() as u64 > INFO_BYTES_MAX {
            return Err(wrong(format!("its list of files is longer than {INFO_BYTES_MAX} bytes")));
        }
        let info: Info = serde_json::from_slice(&body).map_err(|e| wrong(e.to_string()))?;
        // It becomes the name of a directory.
        if !(7..=64).contains(&info.sha.len()) || !info.sha.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(wrong(format!("the commit is {:?}", info.sha.chars().take(80).collect::<String>())));
        }
        Ok(ModelInfo { commit: info.sha, files: info.siblings.into_iter().map(|s| s.rfilename).collect() })
    }

    /// Length and identity of a file.
    pub(super) fn remote(&self, commit: &str, file: &str, say: &mut dyn FnMut(&str)) -> Result<Remote, HubError> {
        let url = self.address(self.model.repo.split('/').chain(["resolve", commit]).chain(file.split('/')));
        let response = self.patiently(Method::Head, &url, say)?;
        let linked = header(&response, "x-linked-etag");
        if !response.status().is_success() && linked.is_none() {
            return Err(self.refused(&url, &response));
        }
        let wrong = |what: String| HubError::Answer { url: url.to_string(), what };
        let etag =
            linked.clone().or_else(|| header(&response, "etag")).ok_or_else(|| wrong("it has no ETag".into()))?;
        let etag = etag.trim_start_matches("W/").trim_matches('"').to_owned();
        // It becomes the name of a file.
        let is_plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
        if etag.is_empty() || etag.len() > 128 || !etag.bytes().all(is_plain) {
            return Err(wrong(format!("its ETag is {:?}", etag.chars().take(150).collect::<String>())));
        }
        let length = header(&response, "x-linked-size").or_else(|| header(&response, "content-length"));
        let length = length.and_then(|text| text.parse().ok());
        let bytes = length.ok_or_else(|| wrong("it does not say how long the file is".into()))?;
        // Large files are named by their SHA-256, others by git's hash of them.
        let is_sha256 = linked.is_some() && etag.len() == 64 && etag.bytes().all(|b| b.is_ascii_hexdigit());
        Ok(Remote { file: file.to_owned(), url, sha256: is_sha256.then(|| etag.to_ascii_lowercase()), etag, bytes })
    }

    /// A file from byte `from` on; the status is the caller's to judge.
    pub(super) fn get(&self, url: &Url, from: u64) -> Result<Response<Body>, HubError> {
        self.follow(Method::Get(from), url)
    }

    /// So many bytes of a file, from byte `from` on.
    pub(super) fn part(
        &self,
        remote: &Remote,
        from: u64,
        bytes: u64,
        say: &mut dyn FnMut(&str),
    ) -> Result<Vec<u8>, HubError> {
        let url = &remote.url;
        let mut response = self.patiently(Method::Part(from, bytes), url, say)?;
        let wrong = |what: String| HubError::Answer { url: shown(url), what };
        match response.status().as_u16() {
            206 if range_start(&response) == Some(from) => {}
            // All of it, from its beginning.
            200 if from == 0 => {}
            200 | 206 => return Err(wrong(format!("asked for {bytes} bytes from {from} on, it sends others"))),
            _ => return Err(self.refused(url, &response)),
        }
        let mut body = Vec::new();
        let mut reader = Paced::new(response.body_mut().as_reader(), self.pace).take(bytes);
        reader.read_to_end(&mut body).map_err(|e| unreachable(url, &e))?;
        match body.len() as u64 {
            found if found == bytes => Ok(body),
            found => Err(wrong(format!("asked for {bytes} bytes from {from} on, it sent {found}"))),
        }
    }

    /// Asks until the answer is more than that the server is busy, or patience ends.
    fn patiently(&self, method: Method, url: &Url, say: &mut dyn FnMut(&str)) -> Result<Response<Body>, HubError> {
        let mut failed = 0;
        loop {
            let response = self.follow(method, url)?;
            if !patience::is_passing(response.status().as_u16()) {
                return Ok(response);
            }
            failed += 1;
            let asked = patience::asked(response.headers());
            let Some(wait) = patience::wait(failed, asked) else { return Ok(response) };
            if asked.is_some() {
                say(&waiting(wait, response.status().as_u16()));
            }
            std::thread::sleep(wait);
        }
    }

    /// Sends a request and follows where it is sent. A HEAD ends where the hub says what the file is, which is before the last host.
    fn follow(&self, method: Method, url: &Url) -> Result<Response<Body>, HubError> {
        let mut at = url.clone();
        for _ in 0..REDIRECTS_MAX {
            let response = self.send(method, &at)?;
            if !response.status().is_redirection() || response.status().as_u16() == 304 {
                return Ok(response);
            }
            if method == Method::Head && header(&response, "x-linked-etag").is_some() {
                return Ok(response);
            }
            let wrong = |what: String| HubError::Answer { url: at.to_string(), what };
            let location = header(&response, "location").ok_or_else(|| wrong("a redirect to nowhere".into()))?;
            let next = resolve(&at, &location).ok_or_else(|| wrong(format!("a redirect to {location:?}")))?;
            if at.scheme() == "https" && next.scheme() != "https" {
                return Err(wrong(format!("a redirect from https to {next}")));
            }
            at = next;
        }
        Err(HubError::Answer { url: url.to_string(), what: format!("more than {REDIRECTS_MAX} redirects") })
    }

    fn send(&self, method: Method, url: &Url) -> Result<Response<Body>, HubError> {
        let mut request = match method {
            Method::Head => self.agent.head(url.as_str()),
            Method::Get(_) | Method::Part(..) => self.agent.get(url.as_str()),
        };
        // Lengths are of the file itself.
        request = request.header("Accept-Encoding", "identity");
        match method {
            Method::Get(from @ 1..) => request = request.header("Range", format!("bytes={from}-")),
            Method::Part(from, bytes) => {
                request = request.header("Range", format!("bytes={from}-{}", from + bytes.saturating_sub(1)));
            }
            Method::Head | Method::Get(0) => {}
        }
        if let Some(token) = self.token.as_ref().filter(|_| url.origin() == self.endpoint.origin()) {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        request.call().map_err(|error| unreachable(url, &error))
    }

    /// What a status means. The hub says more in a header of its own; its mirrors may not.
    pub(super) fn refused(&self, url: &Url, response: &Response<Body>) -> HubError {
        let (model, with_token) = (self.model.repo.clone(), self.token.is_some());
        let status = response.status().as_u16();
        match (header(response, "x-error-code").as_deref(), status) {
            (Some("RevisionNotFound"), _) => HubError::NoRevision { model, revision: self.model.revision.clone() },
            (Some("RepoNotFound"), _) | (None, 404) => {
                HubError::NoModel { endpoint: bare(&self.endpoint), model: self.model.to_string(), with_token }
            }
            (_, 401 | 403) => {
                let url = self.address(model.split('/')).into();
                HubError::Refused { url, model, status, with_token }
            }
            _ => {
                let asked = patience::asked(response.headers()).map(|asked| asked.as_secs());
                HubError::Status { url: shown(url), status, asked, with_token }
            }
        }
    }
}

/// For the user, who sees nothing move.
pub(super) fn waiting(wait: Duration, status: u16) -> String {
    format!("the server asks to wait {:.0} s (status {status})", wait.as_secs_f64())
}

fn unreachable(url: &Url, error: &dyn std::error::Error) -> HubError {
    HubError::Unreachable { url: shown(url), reason: error.to_string() }
}

/// An address without its query, which may hold a signature.
fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.into()
}

/// An address without the slash that ends it.
fn bare(url: &Url) -> String {
    url.as_str().trim_end_matches('/').to_owned()
}

/// First byte of the range that an answer holds.
pub(super) fn range_start(response: &Response<Body>) -> Option<u64> {
    let text = response.headers().get("content-range")?.to_str().ok()?;
    text.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}

fn header(response: &Response<Body>, name: &str) -> Option<String> {
    Some(response.headers().get(name)?.to_str().ok()?.trim().to_owned())
}

/// Where `location`, absolute or relative, leads from `at`.
fn resolve(at: &Url, location: &str) -> Option<Url> {
    at.join(location).ok().filter(|next| matches!(next.scheme(), "http" | "https"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_lead_where_they_say() {
        let from = Url::parse("https://hub.co/org/name/resolve/main/model.bin?x=1").unwrap();
        for (location, expected) in [
            ("https://cdn.org/a?sig=1", Some("https://cdn.org/a?sig=1")),
            ("//cdn.org/a", Some("https://cdn.org/a")),
            ("/api/a", Some("https://hub.co/api/a")),
            ("other.bin", Some("https://hub.co/org/name/resolve/main/other.bin")),
            ("ftp://x/y", None),
            ("file:///etc/passwd", None),
            ("http://", None),
        ] {
            assert_eq!(resolve(&from, location).as_ref().map(Url::as_str), expected, "{location}");
        }
    }

    #[test]
    fn the_same_host_is_the_same_scheme_name_and_port() {
        let origin = |url: &str| Url::parse(url).unwrap().origin();
        let hub = origin("https://hub.co");
        assert_eq!(hub, origin("https://HUB.co:443/a/b?c"));
        for other in ["http://hub.co", "https://hub.co:444", "https://hub.co.evil.org", "https://evil@hub.com"] {
            assert_ne!(hub, origin(other), "{other}");
        }
    }
}
