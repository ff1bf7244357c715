//! What a command reads, and must not replace.

use std::path::PathBuf;

/// These files, and of directories the files that are read there.
pub fn inputs<'a>(paths: impl IntoIterator<Item = &'a PathBuf>) -> Vec<PathBuf> {
    const READ: [&str; 8] = ["json", "jsonl", "txt", "safetensors", "bin", "pt", "model", "npy"];
    let mut inputs = Vec::new();
    for path in paths {
        inputs.push(path.clone());
        let entries = path.read_dir().into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
        inputs.extend(entries.filter(|entry| entry.extension().is_some_and(|e| READ.iter().any(|read| e == *read))));
    }
    inputs
}
