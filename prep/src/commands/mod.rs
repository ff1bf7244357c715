//! One file per subcommand: its arguments, and what it does with the library.

/// Neither shows characters that a terminal would obey: names of files, tensors and families may hold any.
macro_rules! println {
    () => { flashlm::console::print_line(format_args!("")) };
    ($($text:tt)*) => { flashlm::console::print_line(format_args!($($text)*)) };
}
macro_rules! eprintln {
    ($($text:tt)*) => { flashlm::console::note_line(format_args!($($text)*)) };
}

pub(crate) mod analyze;
pub(crate) mod assess;
pub(crate) mod convert;
pub(crate) mod evaluate;
pub(crate) mod families;
mod formats;
pub(crate) mod import_order;
pub(crate) mod import_predictors;
pub(crate) mod inspect;
pub(crate) mod interrupt;
mod numbers;
pub(crate) mod order;
pub(crate) mod pack;
pub(crate) mod prepare;
mod progress;
pub(crate) mod record;
mod recorded;
pub(crate) mod replay;
pub(crate) mod report;
mod rounding;
pub(crate) mod source;
pub(crate) mod synthesize;
pub(crate) mod thresholds;
pub(crate) mod train;
pub(crate) mod verify;

pub(crate) use flashlm::console::print_json;
pub(crate) use flashlm_prep::inputs::inputs;
pub(crate) use flashlm_prep::threads::{start as threads, start_pool};
pub(crate) use progress::Stage;

use std::path::{Path, PathBuf};

use anyhow::Context;
use flashlm::disk_cost::{DiskProfileError, ReadCost, profiled_cost};
use flashlm::error::printable;
use flashlm_formats::bundle::Manifest;
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::destination::{Destination, DestinationError, FileKind, check_new_file};
use flashlm_formats::publish::publish_bytes;
use flashlm_prep::pack::{StoredPart, WIDE_KV_NOTE};
use flashlm_prep::record::documents::{Documents, DocumentsError, read_documents};
use flashlm_prep::tokenizer::packed_tokenizer;

/// What reads cost on the disk of a profile, or on a usual one.
pub(crate) fn read_cost(profile: Option<&Path>) -> Result<ReadCost, DiskProfileError> {
    profile.map_or_else(|| Ok(ReadCost::USUAL), profiled_cost)
}

/// Says what a bundle asks of its users' memory, if it does.
pub(crate) fn note_wide_kv(manifest: &Manifest) {
    if manifest.wide_kv {
        eprintln!("note: {WIDE_KV_NOTE}");
    }
}

/// Says how the parts of a bundle are stored, if any is quantised.
pub(crate) fn say_parts(parts: &[StoredPart]) {
    if parts.iter().any(|part| part.dtype.is_quantised()) {
        parts.iter().for_each(|part| eprintln!("  {part}"));
    }
}

/// The checkpoint's tokenizer as a bundle holds it; what there is to say of it is said.
pub(crate) fn tokenizer(checkpoint: &Checkpoint) -> anyhow::Result<Vec<u8>> {
    let packed = packed_tokenizer(checkpoint)?;
    for note in &packed.notes {
        eprintln!("note: {}", printable(&note.to_string()));
    }
    Ok(packed.json)
}

/// What has to be said about text before it is used.
pub(crate) fn say_notes(notes: &[String]) {
    for note in notes {
        eprintln!("note: {note}");
    }
}

/// Reads documents, and says at once what is to be said of them: it may explain the error that follows.
pub(crate) fn documents(paths: &[PathBuf]) -> Result<Documents, DocumentsError> {
    let documents = read_documents(paths)?;
    say_notes(&documents.notes);
    Ok(documents)
}

/// Writes a file whole: it is there complete, or not at all.
pub(crate) fn publish(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    publish_bytes(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

/// Takes the name of a bundle before the work for it begins. To be given up just before the bundle is written, which takes it again.
pub(crate) fn reserve_bundle(path: &Path, inputs: &[PathBuf], force: bool) -> Result<Destination, DestinationError> {
    check_new_file(path, FileKind::Bundle, inputs, force)?;
    Destination::take(path, FileKind::Bundle, inputs)
}

/// This many of something that has a regular plural.
pub(crate) fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// Whether an error comes from a closed standard output.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let mut causes = error.chain().filter_map(|e| e.downcast_ref::<std::io::Error>());
    causes.any(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}
