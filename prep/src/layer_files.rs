//! Directories of other programs with one file for each layer, numbered in its name.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Not one file for each layer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerFilesError {
    /// The directory cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// One is missing, or there twice.
    #[error("{}: expected one file for each of {layers} layers, such as {like}; {what}", dir.display())]
    Layers {
        /// The directory.
        dir: PathBuf,
        /// Layers of the model.
        layers: usize,
        /// How files may be called.
        like: &'static str,
        /// What is missing, or there twice.
        what: String,
    },
}

/// The file of each of `layers` layers, in order; `like` are examples of names.
pub fn find(
    dir: &Path,
    layers: usize,
    extensions: &[&str],
    like: &'static str,
) -> Result<Vec<PathBuf>, LayerFilesError> {
    let failed = |source| LayerFilesError::Io { path: dir.to_owned(), source };
    let mut found: BTreeMap<usize, PathBuf> = BTreeMap::new();
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        paths.push(entry.map_err(failed)?.path());
    }
    paths.sort();
    let wrong = |what| LayerFilesError::Layers { dir: dir.to_owned(), layers, like, what };
    for path in paths {
        let is_tensors = path.extension().is_some_and(|e| extensions.iter().any(|x| e == *x));
        let Some(layer) = path.file_stem().and_then(|stem| layer_of(stem.to_str()?)).filter(|_| is_tensors) else {
            continue;
        };
        if let Some(other) = found.insert(layer, path.clone()) {
            return Err(wrong(format!("{} and {} are both of layer {layer}", other.display(), path.display())));
        }
    }
    let missing: Vec<String> = (0..layers).filter(|layer| !found.contains_key(layer)).map(|l| l.to_string()).collect();
    if !missing.is_empty() {
        return Err(wrong(format!("missing: {}", missing.join(", "))));
    }
    if let Some((layer, path)) = found.range(layers..).next() {
        return Err(wrong(format!("{} is of layer {layer}", path.display())));
    }
    Ok(found.into_values().collect())
}

/// The number after `layer`, or else the one at the end.
fn layer_of(stem: &str) -> Option<usize> {
    let digits = |text: &str| text.chars().take_while(char::is_ascii_digit).collect::<String>();
    let behind = stem.split("layer").skip(1).map(|rest| digits(rest.trim_start_matches(['_', '-'])));
    let named = behind.filter(|number| !number.is_empty()).last();
    let last = || {
        let begin = stem.trim_end_matches(|c: char| c.is_ascii_digit()).len();
        stem[begin..].to_owned()
    };
    let number = named.unwrap_or_else(last);
    // One that no number holds is of no layer of any model, and not ignored.
    (!number.is_empty()).then(|| number.parse().unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_found_in_file_names() {
        for (stem, layer) in [
            ("model_12", Some(12)),
            ("activation_0", Some(0)),
            ("c4_0_layer7_-0.9812-640", Some(7)),
            ("opt-175b_layer_31", Some(31)),
            ("predictor", None),
            ("model_layer99999999999999999999999", Some(usize::MAX)),
        ] {
            assert_eq!(layer_of(stem), layer, "{stem}");
        }
    }

    #[test]
    fn every_layer_has_one_file() {
        let dir = tempfile::tempdir().unwrap();
        let missing = |layers| find(dir.path(), layers, &["pt"], "model_0.pt").map_err(|e| e.to_string());
        std::fs::write(dir.path().join("model_0.pt"), "x").unwrap();
        std::fs::write(dir.path().join("notes_1.txt"), "x").unwrap();
        assert!(missing(3).unwrap_err().contains("missing: 1, 2"));
        assert_eq!(missing(1).unwrap().len(), 1);
        std::fs::write(dir.path().join("c4_layer0_-0.9.pt"), "x").unwrap();
        assert!(missing(1).unwrap_err().contains("both of layer 0"));
    }
}
