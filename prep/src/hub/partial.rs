//! The beginning of a model: its configuration, its embedding and its first layers, in a directory that opens as a checkpoint. The
//! weight files there have their full length and holes where nothing was fetched.

use std::fs::File;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;

use flashlm_formats::checkpoint::{Checkpoint, Format};

use super::client::Client;
use super::remote::Remote;
use super::snapshot::{Commit, Snapshots};
use super::{HubError, Listed, ModelName, Quiet, Settings, Watch, fetch_files};

/// Fetched at a time.
const PIECE: u64 = 8 << 20;
/// Longest header of a weight file that is fetched; those of the largest models have a few megabytes.
const HEADER_BYTES_MAX: u64 = 64 << 20;

/// Opens the model with what a pass through its first `layers` layers reads, which is fetched into `dir`, an empty directory; with none
/// only what describes the weights. Small files go to the cache, for when all is fetched.
///
/// # Errors
/// Whatever stands in the way; weights in another format than safetensors.
pub fn fetch_beginning(
    name: &ModelName,
    settings: &Settings,
    layers: usize,
    dir: &Path,
    watch: &mut dyn Watch,
) -> Result<Checkpoint, HubError> {
    let snapshots = Snapshots::new(settings, name);
    if settings.offline {
        return open(&snapshots.complete(name, settings)?);
    }
    let client = Client::new(settings, name)?;
    let info = client.model_info(&mut |line| watch.say(line))?;
    if snapshots.has_commit(&info.commit)
        && let Ok(there) = snapshots.complete(name, settings)
    {
        return open(&there);
    }
    let listed = Listed::of(name, &info.files, watch)?;
    if !matches!(listed.format, Format::Safetensors | Format::ShardedSafetensors) {
        return Err(HubError::NotInParts { model: name.to_string(), file: listed.format.file_name() });
    }
    let commit = snapshots.of_commit(&info.commit)?;
    fetch_files(&client, &commit, &listed.described_by(), &mut Quiet)?;
    let weights = listed.weights(&client, &commit, &info.files)?;
    // Chat templates in a directory of their own say nothing of speed.
    for file in listed.described_by().iter().filter(|file| !file.contains('/')) {
        let (from, to) = (commit.path(file), dir.join(file));
        symlink(&from, &to).map_err(|e| HubError::io("make the link", &to, e))?;
    }
    let mut sparse = Vec::new();
    for file in &weights {
        sparse.push(Sparse::begin(&client, &commit, file, dir, watch)?);
    }
    let checkpoint = open(dir)?;
    let ranges = checkpoint.byte_ranges(layers);
    let total = if layers == 0 { 0 } else { ranges.iter().map(|(_, range)| range.end - range.start).sum() };
    if total > 0 {
        super::check_space(dir, total)?;
        watch.begin(total, 0);
    }
    let mut done = 0;
    for (file, range) in ranges.into_iter().filter(|_| layers > 0) {
        let Some(sparse) = sparse.iter().find(|sparse| sparse.remote.file == file) else { continue };
        let mut at = range.start;
        while at < range.end {
            let bytes = PIECE.min(range.end - at);
            sparse.fill(&client, at, bytes, watch)?;
            (at, done) = (at + bytes, done + bytes);
            watch.at(done);
        }
    }
    Ok(checkpoint)
}

fn open(dir: &Path) -> Result<Checkpoint, HubError> {
    Checkpoint::open(dir).map_err(|source| HubError::Checkpoint { source: Box::new(source) })
}

/// A weight file with holes.
struct Sparse {
    remote: Remote,
    file: File,
}

impl Sparse {
    /// A file of the right length that has its header.
    fn begin(
        client: &Client,
        commit: &Commit,
        name: &str,
        dir: &Path,
        watch: &mut dyn Watch,
    ) -> Result<Self, HubError> {
        let remote = client.remote(commit.id(), name, &mut |line| watch.say(line))?;
        let path = dir.join(name);
        let failed = |e| HubError::io("make", &path, e);
        let file = File::create_new(&path).map_err(failed)?;
        file.set_len(remote.bytes).map_err(failed)?;
        let sparse = Self { remote, file };
        // The length of the header, and the header; what is wrong with either is said when the checkpoint is opened.
        let length = sparse.fill(client, 0, 8.min(sparse.remote.bytes), watch)?;
        let length = <[u8; 8]>::try_from(length).map_or(0, u64::from_le_bytes);
        let room = sparse.remote.bytes.saturating_sub(8).min(HEADER_BYTES_MAX);
        sparse.fill(client, 8, length.min(room), watch)?;
        Ok(sparse)
    }

    fn fill(&self, client: &Client, at: u64, bytes: u64, watch: &mut dyn Watch) -> Result<Vec<u8>, HubError> {
        if bytes == 0 {
            return Ok(Vec::new());
        }
        let part = client.part(&self.remote, at, bytes, &mut |line| watch.say(line))?;
        let path = Path::new(&self.remote.file);
        self.file.write_all_at(&part, at).map_err(|e| HubError::io("write to", path, e))?;
        Ok(part)
    }
}
