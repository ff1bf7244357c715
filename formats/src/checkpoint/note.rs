//! What a checkpoint's user should be told, though nothing is wrong.

use super::families::{Unread, shorten};

/// Something about a checkpoint that is no error and that its user should be told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Note {
    /// The configuration ties the head to the embedding, and the files hold two different matrices.
    #[error(
        "config.json ties the head to the embedding, but lm_head.weight differs from it: both are used, as transformers does"
    )]
    HeadNotTied,
    /// The configuration ties the two and only the head is stored.
    #[error("the files hold lm_head.weight and no embedding: it serves as both, as config.json ties them")]
    HeadIsEmbedding,
    /// The model sees only so far back, and flashlm does not slide.
    #[error("attention slides over {taken} tokens here: that is the longest context, of {stated} in config.json")]
    SlidingWindow {
        /// Positions that the configuration names.
        stated: usize,
        /// The window.
        taken: usize,
    },
    /// The model comes with code that is not known here.
    #[error(
        "config.json names code of its own, {class}: it is computed as a {family}; compare a text with the original's before you trust it"
    )]
    CustomCode {
        /// The class.
        class: String,
        /// What it is taken for.
        family: &'static str,
    },
    /// Keys of the configuration that belong to other families.
    #[error("config.json has {}, which means nothing to a {model_type} model: not followed", few(keys))]
    ForeignKeys {
        /// What the configuration calls the model.
        model_type: String,
        /// The keys, sorted.
        keys: Vec<String>,
    },
    /// Keys of the configuration that nobody here knows.
    #[error(
        "config.json has {}, which flashlm does not know and ignores: if transformers follows such a key, its outputs \
         differ from those here",
        few(.0)
    )]
    UnknownKeys(Vec<String>),
    /// All names stand behind one that a trainer or a wrapper put there.
    #[error("the tensors' names begin with {prefix}, which was removed")]
    Prefix {
        /// What was removed.
        prefix: String,
    },
    /// Tensors outside the model's body, such as a classifier's head.
    #[error("{} stored tensor(s) outside the language model are ignored, the first is {}", .0.len(), .0.first().map_or("", String::as_str))]
    Ignored(Vec<String>),
}

/// A list for a message: the first few, and how many more there are.
fn few(names: &[String]) -> String {
    /// As many as a line holds.
    const FEW: usize = 8;
    let mut text = names.iter().take(FEW).map(|name| shorten(name)).collect::<Vec<_>>().join(", ");
    if names.len() > FEW {
        text += &format!(" and {} more", names.len() - FEW);
    }
    text
}

/// Notes on what a configuration says and nobody follows.
pub(crate) fn of_keys(unread: Unread, model_type: &str) -> Vec<Note> {
    let Unread { foreign, unknown } = unread;
    let foreign = (!foreign.is_empty()).then(|| Note::ForeignKeys { model_type: model_type.to_owned(), keys: foreign });
    let unknown = (!unknown.is_empty()).then_some(Note::UnknownKeys(unknown));
    foreign.into_iter().chain(unknown).collect()
}
