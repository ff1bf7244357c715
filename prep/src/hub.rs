//! Models from the Hugging Face hub: `org/name[@revision]` becomes a checkpoint directory in the hub's cache.
//!
//! The client crate hf-hub gives names, cache layout and token file. Its downloader is not used: it sends the token along to
//! whatever host a file is redirected to, appends a whole file to a part when a server ignores `Range`, compares neither length
//! nor hash, waits forever, and knows neither `HF_TOKEN`, `HF_HUB_CACHE` nor offline mode. (Its next major version, 1.0,
//! brings an asynchronous runtime and a storage protocol of its own; that is too much for a few files.) So files are fetched
//! here, with ureq: blocking, TLS by rustls with the Mozilla roots, proxies as the environment names them. What lies in the cache
//! afterwards is what Python's huggingface_hub would have put there, and is found by it.
//!
//! Only files that the checkpoint reader wants are fetched, all of one commit. Knows nothing of what is in them, but for the
//! list of shards; never prints.

mod client;
mod download;
mod error;
mod expand;
mod partial;
mod patience;
mod remote;
mod settings;
mod snapshot;

use std::collections::HashSet;
use std::path::PathBuf;

use flashlm_formats::chat::TEMPLATES_MAX;
use flashlm_formats::checkpoint::{
    CHAT_TEMPLATE_DIRS, CHAT_TEMPLATE_FILE, CheckpointError, Format, INDEX_BYTES_MAX, index_shards,
};
use flashlm_formats::regular::read_regular;

pub use error::HubError;
pub use flashlm_formats::model_name::ModelName;
pub use partial::fetch_beginning;
pub use patience::Pace;
pub use settings::Settings;

use client::Client;
use download::{check_space, download};
use remote::Remote;
use snapshot::Snapshots;

/// Small files that decide what a model is and how it reads, fetched where there are any.
const SIDE_FILES: [&str; 6] = [
    CHAT_TEMPLATE_FILE,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
];
/// Fetched where there is no `tokenizer.json`.
const OLD_TOKENIZER: [&str; 2] = ["vocab.json", "merges.txt"];

/// Fetched likewise, to say what to do about it.
const SENTENCE_PIECE: &str = "tokenizer.model";

/// Told as files arrive; the binary draws a bar with it.
pub trait Watch {
    /// This many bytes are needed in all; this many of them are here already.
    fn begin(&mut self, total: u64, here: u64);
    /// This many of them are here now.
    fn at(&mut self, bytes: u64);
    /// Something that the user should know.
    fn say(&mut self, line: &str);
}

/// The directory with the model's files, fetched as far as they are not there yet.
///
/// # Errors
/// Whatever stands in the way; what arrived until then is kept, and the next call resumes from it.
pub fn fetch(name: &ModelName, settings: &Settings, watch: &mut dyn Watch) -> Result<PathBuf, HubError> {
    let snapshots = Snapshots::new(settings, name);
    if settings.offline {
        return snapshots.complete(name, settings);
    }
    let client = Client::new(settings, name)?;
    let info = match client.model_info(&mut |line| watch.say(line)) {
        Ok(info) => info,
        Err(error @ (HubError::Unreachable { .. } | HubError::Status { .. })) => {
            let dir = snapshots.complete(name, settings).map_err(|_| &error);
            let Ok(dir) = dir else { return Err(error) };
            watch.say(&format!("{error}; using {name} as it was downloaded before"));
            return Ok(dir);
        }
        Err(error) => return Err(error),
    };
    let listed = Listed::of(name, &info.files, watch)?;
    let commit = snapshots.of_commit(&info.commit)?;
    let weights = listed.weights(&client, &commit, &info.files)?;
    let files: Vec<String> = listed.described_by().into_iter().chain(weights).collect();
    if !fetch_files(&client, &commit, &files, watch)? && settings.links {
        watch.say("the cache's file system has no symbolic links: each revision has files of its own there");
    }
    // Said last: a revision that is known is complete.
    snapshots.name_commit(&info.commit)?;
    Ok(commit.dir())
}

/// The files that a checkpoint reader wants, of those that a model has.
struct Listed {
    model: String,
    format: Format,
    /// Configuration and tokenizer.
    small: Vec<String>,
    /// The file that the weights are in, or the list of the shards that they are in.
    first: String,
}

impl Listed {
    fn of(name: &ModelName, files: &[String], watch: &mut dyn Watch) -> Result<Self, HubError> {
        let has = |file: &str| files.iter().any(|f| f == file);
        let wanted = |wanted| HubError::NotACheckpoint { model: name.to_string(), wanted, found: files.to_vec() };
        if !has("config.json") {
            return Err(wanted("config.json"));
        }
        let format = Format::ALL.into_iter().find(|format| has(format.file_name()));
        let format = format.ok_or_else(|| wanted("safetensors or PyTorch weights"))?;
        let old = OLD_TOKENIZER.iter().filter(|_| !has("tokenizer.json"));
        if !has("tokenizer.json") && !has(SENTENCE_PIECE) && !OLD_TOKENIZER.iter().all(|file| has(file)) {
            // Said before gigabytes are fetched.
            watch.say(&format!("{name} has no tokenizer that can be used; `prepare` will need tokenizer.json"));
        }
        let old = old.chain([SENTENCE_PIECE].iter().filter(|_| !has("tokenizer.json")));
        let small = SIDE_FILES.iter().chain(old).filter(|file| has(file)).map(|file| (*file).to_owned());
        let further = files.iter().filter(|file| is_further_template(file)).take(TEMPLATES_MAX).cloned();
        let small = std::iter::once("config.json".to_owned()).chain(small).chain(further).collect();
        Ok(Self { model: name.to_string(), format, small, first: format.file_name().to_owned() })
    }

    /// Configuration, tokenizer, and the list of shards where there is one.
    fn described_by(&self) -> Vec<String> {
        let list = self.format.is_sharded().then_some(&self.first);
        self.small.iter().chain(list).cloned().collect()
    }

    /// The files that the weights are in. For a list of shards the small files are fetched first, to know them and to fail early.
    fn weights(&self, client: &Client, commit: &snapshot::Commit, files: &[String]) -> Result<Vec<String>, HubError> {
        if !self.format.is_sharded() {
            return Ok(vec![self.first.clone()]);
        }
        fetch_files(client, commit, &self.described_by(), &mut Quiet)?;
        let path = commit.path(&self.first);
        let json = read_regular(&path, INDEX_BYTES_MAX).map_err(|e| HubError::io("read", &path, e))?;
        let shards = index_shards(&json).map_err(|source| {
            let source = CheckpointError::Index { path: path.clone(), source: Box::new(source) };
            HubError::Index { source: Box::new(source) }
        })?;
        let there: HashSet<&String> = files.iter().collect();
        let missing: Vec<String> = shards.iter().filter(|shard| !there.contains(shard)).cloned().collect();
        if !missing.is_empty() {
            return Err(HubError::MissingShards { model: self.model.clone(), missing });
        }
        Ok(shards)
    }
}

/// Whether a file of the hub is one of several chat templates.
fn is_further_template(file: &str) -> bool {
    let plain = |name: &str| name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'));
    file.split_once('/').is_some_and(|(dir, name)| {
        CHAT_TEMPLATE_DIRS.contains(&dir) && name.ends_with(".jinja") && !name.starts_with('.') && plain(name)
    })
}

/// Fetches what is missing of `files` of a commit. Tells whether all of that could be linked.
fn fetch_files(
    client: &Client,
    commit: &snapshot::Commit,
    files: &[String],
    watch: &mut dyn Watch,
) -> Result<bool, HubError> {
    let missing: Vec<&String> = files.iter().filter(|file| !commit.path(file).exists()).collect();
    let mut remotes: Vec<(&String, Remote)> = Vec::new();
    for file in missing {
        remotes.push((file, client.remote(commit.id(), file, &mut |line| watch.say(line))?));
    }
    let here = remotes.iter().map(|(_, remote)| commit.part_bytes(remote)).sum::<u64>();
    let total = remotes.iter().map(|(_, remote)| remote.bytes).sum::<u64>();
    if total == 0 {
        return Ok(true);
    }
    check_space(commit.blobs(), total.saturating_sub(here))?;
    watch.begin(total, here);
    let (mut done, mut linked) = (0, true);
    for (file, remote) in &remotes {
        let is_new = download(client, remote, commit, done, watch)?;
        linked &= commit.place(file, remote, is_new)?;
        done += remote.bytes;
    }
    Ok(linked)
}

/// Nobody watches.
struct Quiet;

impl Watch for Quiet {
    fn begin(&mut self, _: u64, _: u64) {}
    fn at(&mut self, _: u64) {}
    fn say(&mut self, _: &str) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_templates_are_fetched_from_directories() {
        for file in ["additional_chat_templates/tool_use.jinja", "chat_templates/rag-2.jinja"] {
            assert!(is_further_template(file), "{file}");
        }
        for file in [
            "chat_template.jinja",
            "onnx/model.jinja",
            "chat_templates/../x.jinja",
            "chat_templates/a/b.jinja",
            "chat_templates/.jinja",
            "chat_templates/a.py",
        ] {
            assert!(!is_further_template(file), "{file}");
        }
    }
}
