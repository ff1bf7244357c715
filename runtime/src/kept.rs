//! Bundles of models of the hub that are kept under the model's name, where `prepare` puts them and every run finds them.

use std::path::PathBuf;

use flashlm_formats::model_name::ModelName;
use flashlm_io::cache_dir;

/// The file that the bundle of a model is kept in; `None` where there is no folder for such files.
pub fn kept_bundle(name: &ModelName) -> Option<PathBuf> {
    // No part of a name has a slash or two dots in a row, and two dashes keep the parts apart for people.
    let file = name.to_string().replace('/', "--");
    Some(cache_dir()?.join("bundles").join(format!("{file}.flashlm")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_model_and_revision_has_a_file_of_its_own() {
        let file = |name: &str| kept_bundle(&ModelName::parse(name).unwrap()).unwrap();
        let name = |name: &str| file(name).file_name().unwrap().to_str().unwrap().to_owned();
        assert_eq!(name("facebook/opt-1.3b"), "facebook--opt-1.3b.flashlm");
        assert_eq!(name("facebook/opt-1.3b@main"), "facebook--opt-1.3b.flashlm");
        assert_eq!(name("a/b@refs/pr/3"), "a--b@refs--pr--3.flashlm");
        assert!(file("a/b").parent().unwrap().ends_with("bundles"));
    }
}
