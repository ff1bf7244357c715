//! Why a model cannot be fetched from the hub, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use flashlm_formats::checkpoint::CheckpointError;

/// Why a model cannot be had from the hub.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// A variable of the environment cannot be meant.
    #[error("{name} is {value:?}; expected {expected}")]
    Setting {
        /// The variable.
        name: &'static str,
        /// Its value, unless that is a secret.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
    /// Nobody answers.
    #[error(
        "cannot reach {url}: {reason}. Check the network (HF_ENDPOINT names another hub, HTTPS_PROXY a proxy) and repeat the command; \
         what was fetched is kept"
    )]
    Unreachable {
        /// What was asked for.
        url: String,
        /// What happened.
        reason: String,
    },
    /// The hub wants to know who asks, or knows and says no.
    #[error("{} (status {status}): {}", refusal(model, *with_token), refusal_hint(url, *with_token))]
    Refused {
        /// The model.
        model: String,
        /// HTTP status.
        status: u16,
        /// The model's page.
        url: String,
        /// Whether a token was sent.
        with_token: bool,
    },
    /// No such model.
    #[error("{endpoint} has no model {model}, or shows it only to those with access: check the name{}", if *with_token { "" } else { ", or set HF_TOKEN if it is private" })]
    NoModel {
        /// The hub.
        endpoint: String,
        /// The model.
        model: String,
        /// Whether a token was sent.
        with_token: bool,
    },
    /// No such revision.
    #[error(
        "{model} has no revision {revision:?}: give a branch, a tag or a commit that its page lists, or none for main"
    )]
    NoRevision {
        /// The model.
        model: String,
        /// The revision.
        revision: String,
    },
    /// Another status than one can do something with.
    #[error("{url} answers with status {status}{}; repeat the command later, what was fetched is kept", busy(*status, *asked, *with_token))]
    Status {
        /// What was asked for.
        url: String,
        /// HTTP status.
        status: u16,
        /// Seconds that the server asks to be left alone.
        asked: Option<u64>,
        /// Whether a token was sent.
        with_token: bool,
    },
    /// An answer that no hub gives.
    #[error("{url} does not answer like a hub: {what}. Check HF_ENDPOINT, or repeat the command")]
    Answer {
        /// What was asked for.
        url: String,
        /// What is wrong.
        what: String,
    },
    /// Nothing that can be prepared.
    #[error("{model} has no {wanted}, only {}: {}", shortened(found), other_hint(found))]
    NotACheckpoint {
        /// The model.
        model: String,
        /// What is looked for.
        wanted: &'static str,
        /// Files there are.
        found: Vec<String>,
    },
    /// Weights of which a part cannot be read.
    #[error(
        "{model} has its weights in {file}, of which no part can be read by itself: fetch the model (flashlm-prep inspect {model}), \
         and repeat the command"
    )]
    NotInParts {
        /// The model.
        model: String,
        /// The file.
        file: &'static str,
    },
    /// The model's files do not make a checkpoint.
    #[error(transparent)]
    Checkpoint {
        /// Why not.
        source: Box<CheckpointError>,
    },
    /// The list of shards cannot be used.
    #[error("{source}")]
    Index {
        /// What is wrong.
        source: Box<CheckpointError>,
    },
    /// The connection breaks again and again.
    #[error(
        "{file}: the connection broke {attempts} times in a row with next to no progress, the last time at byte {have} of {bytes} \
         ({reason}). \
         What was fetched is kept; repeat the command to go on from there"
    )]
    Cut {
        /// The file.
        file: String,
        /// Bytes that are here.
        have: u64,
        /// Bytes it has.
        bytes: u64,
        /// Attempts without any progress.
        attempts: u32,
        /// What happened last.
        reason: String,
    },
    /// More bytes came than the file has.
    #[error(
        "{file}: the server sent more than the {bytes} bytes that it announced; it was deleted. Repeat the command"
    )]
    TooLong {
        /// The file.
        file: String,
        /// Bytes it should have.
        bytes: u64,
    },
    /// What came is not what the hub has.
    #[error(
        "{file}: its SHA-256 is {found}, the hub says {expected}; it was deleted. Repeat the command to fetch it again"
    )]
    Hash {
        /// The file.
        file: String,
        /// By the hub.
        expected: String,
        /// Of what came.
        found: String,
    },
    /// No room.
    #[error(
        "{needed} more bytes are needed in {}, and {available} are free: make room, or set HF_HUB_CACHE to a directory on another disk. \
         What was fetched is kept",
        dir.display()
    )]
    DiskFull {
        /// The cache.
        dir: PathBuf,
        /// Bytes still to come.
        needed: u64,
        /// Bytes free.
        available: u64,
    },
    /// Another process fetches the same file.
    #[error("another process is fetching {file} (lock {}): wait for it, then repeat the command", lock.display())]
    Busy {
        /// The file.
        file: String,
        /// What it holds.
        lock: PathBuf,
    },
    /// Something stands where a file of the cache belongs.
    #[error("{} is {what}, where the cache has a file of its own: remove it, and repeat the command", path.display())]
    InTheWay {
        /// The name.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// The index names files that the repository does not have.
    #[error(
        "{model}: its index names {}, which the repository does not have: tell its owner, or choose another revision",
        shortened(missing)
    )]
    MissingShards {
        /// The model.
        model: String,
        /// What it names.
        missing: Vec<String>,
    },
    /// The cache cannot be used.
    #[error("cannot {action} {}: {source}{}", path.display(), io_hint(source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Offline, and not everything is here.
    #[error(
        "{model} is not complete in {}, missing: {}; unset HF_HUB_OFFLINE to fetch it, or copy the cache from a machine that did",
        cache.display(), missing.join(", ")
    )]
    Offline {
        /// The model.
        model: String,
        /// The cache.
        cache: PathBuf,
        /// What is not there.
        missing: Vec<String>,
    },
}

impl HubError {
    pub(super) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), source }
    }
}

/// What helps where the cache cannot be used, by what the system said.
fn io_hint(error: &io::Error) -> &'static str {
    use io::ErrorKind::{CrossesDevices, NotFound, PermissionDenied, ReadOnlyFilesystem, StorageFull};
    /// EIO has no kind of its own.
    const INPUT_OUTPUT: i32 = 5;
    match error.kind() {
        PermissionDenied | ReadOnlyFilesystem | NotFound | io::ErrorKind::NotADirectory => {
            ". Set HF_HUB_CACHE to a directory that can be written to"
        }
        CrossesDevices => {
            ": parts of the cache lie on different file systems. Mount nothing in it, or set HF_HUB_CACHE to a directory on one"
        }
        StorageFull | io::ErrorKind::QuotaExceeded => {
            ". Make room, or set HF_HUB_CACHE to a directory on another disk; what was fetched is kept"
        }
        _ if error.raw_os_error() == Some(INPUT_OUTPUT) => {
            ": the disk failed, or its connection. `dmesg` may say more; HF_HUB_CACHE may name a directory on another disk"
        }
        // Of a limit on file sizes the program says itself what helps; of others nothing is known.
        _ => "",
    }
}

fn refusal(model: &str, with_token: bool) -> String {
    if with_token {
        format!("the token that was sent gives no access to {model}")
    } else {
        format!("{model} is only for authenticated users")
    }
}

fn refusal_hint(url: &str, with_token: bool) -> String {
    let repeat = "and repeat the command";
    if with_token {
        format!(
            "accept the model's conditions at {url} with the token's account, or set HF_TOKEN to another token, {repeat}"
        )
    } else {
        format!("accept the model's conditions at {url}, set HF_TOKEN to a token of your account, {repeat}")
    }
}

fn busy(status: u16, asked: Option<u64>, with_token: bool) -> String {
    let mut text = String::new();
    if let Some(seconds) = asked {
        text += &format!(" and asks to wait {seconds} s");
    }
    if status == 429 && !with_token {
        text += " (with HF_TOKEN set, more requests are allowed)";
    }
    text
}

fn other_hint(found: &[String]) -> &'static str {
    let has = |begin: &str| found.iter().any(|name| name.starts_with(begin));
    if has("flax_model") || has("tf_model") {
        "load it in transformers with from_flax=True or from_tf=True, save_pretrained, and give that directory"
    } else {
        "choose a repository with a Hugging Face checkpoint"
    }
}

fn shortened(names: &[String]) -> String {
    const NAMES_MAX: usize = 12;
    const NAME_CHARS_MAX: usize = 100;
    let short = |name: &String| name.chars().take(NAME_CHARS_MAX).collect::<String>();
    let mut text = names.iter().take(NAMES_MAX).map(short).collect::<Vec<_>>().join(", ");
    match names.len() {
        0 => text += "nothing",
        n if n > NAMES_MAX => text += &format!(" and {} more", n - NAMES_MAX),
        _ => {}
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_helps_follows_from_what_went_wrong() {
        let said = |code| HubError::io("write", Path::new("/c/x"), io::Error::from_raw_os_error(code)).to_string();
        let to_write = "Set HF_HUB_CACHE to a directory that can be written to";
        for (code, words) in [
            (13, to_write),
            (30, to_write),
            (18, "different file systems"),
            (28, "Make room"),
            (122, "Make room"),
            (5, "the disk failed"),
        ] {
            assert!(said(code).contains(words), "{}", said(code));
            assert!(words == to_write || !said(code).contains(to_write), "{}", said(code));
        }
        assert!(!said(27).contains("HF_HUB_CACHE"), "{}", said(27));
    }
}
