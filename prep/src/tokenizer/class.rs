//! Which of transformers' tokenizer classes a checkpoint gets: `AutoTokenizer` of transformers 5, for the families here.
//!
//! The class matters because some of them keep of a `tokenizer.json` only the vocabulary, the merges and the post-processor, and bring
//! the other parts themselves.

use super::side_files::SideFiles;

/// A tokenizer class, by what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// `TokenizersBackend`, once `PreTrainedTokenizerFast`: `tokenizer.json` as it is.
    Backend,
    Llama,
    Gpt2,
    NeoX,
    Qwen2,
    CodeGen,
}

impl Class {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Backend => "TokenizersBackend",
            Self::Llama => "LlamaTokenizer",
            Self::Gpt2 => "GPT2Tokenizer",
            Self::NeoX => "GPTNeoXTokenizer",
            Self::Qwen2 => "Qwen2Tokenizer",
            Self::CodeGen => "CodeGenTokenizer",
        }
    }

    /// By a name without `Fast`. Whatever is not known is a `TokenizersBackend`, in transformers too.
    fn named(name: &str) -> Self {
        let classes = [Self::Llama, Self::Gpt2, Self::NeoX, Self::Qwen2, Self::CodeGen];
        classes.into_iter().find(|class| class.name() == name).unwrap_or(Self::Backend)
    }

    /// The class that transformers has registered for a model type.
    fn registered(model_type: &str) -> Option<Self> {
        Some(match model_type {
            "opt" | "phi" => Self::Gpt2,
            "gpt_neox" => Self::NeoX,
            "qwen2" => Self::Qwen2,
            "mistral" | "persimmon" => Self::Backend,
            _ => return None,
        })
    }
}

/// The class of a checkpoint, and whether one was asked for that is not known here.
pub(super) fn class(files: &SideFiles, tokenizer_json: Option<&[u8]>) -> (Class, Option<String>) {
    let named = files.tokenizer_class().or(files.model_tokenizer_class.as_deref());
    let name = named.map(|name| name.strip_suffix("Fast").unwrap_or(name));
    let registered = Class::registered(&files.model_type);
    let class = match (name, registered) {
        // Llama 3 and its kin: the class has Metaspace built in, and the file is of another kind.
        (Some("LlamaTokenizer"), _) if files.model_type != "qwen2" && tokenizer_json.is_some_and(is_byte_level) => {
            Class::Backend
        }
        // Its checkpoints are known to name wrong ones.
        (_, Some(Class::Qwen2)) => Class::Qwen2,
        (Some(name), Some(Class::Backend)) if name != Class::Backend.name() => Class::Backend,
        (Some(name), _) => Class::named(name),
        (None, registered) => registered.unwrap_or(Class::Backend),
    };
    let unknown = name.filter(|name| class == Class::Backend && REBUILT_ELSEWHERE.contains(name));
    (class, unknown.map(str::to_owned))
}

/// Classes of transformers that bring parts of their own, and that no family here has.
const REBUILT_ELSEWHERE: [&str; 16] = [
    "AlbertTokenizer",
    "BarthezTokenizer",
    "BertTokenizer",
    "CLIPTokenizer",
    "CamembertTokenizer",
    "CodeLlamaTokenizer",
    "CohereTokenizer",
    "DebertaV2Tokenizer",
    "GemmaTokenizer",
    "MBartTokenizer",
    "NllbTokenizer",
    "RobertaTokenizer",
    "SeamlessM4TTokenizer",
    "T5Tokenizer",
    "XLMRobertaTokenizer",
    "XLNetTokenizer",
];

fn is_byte_level(json: &[u8]) -> bool {
    const MARK: &[u8] = b"\"ByteLevel\"";
    json.windows(MARK.len()).any(|bytes| bytes == MARK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_chosen_as_by_autotokenizer() {
        let byte_level = Some(&br#"{"decoder": {"type": "ByteLevel"}}"#[..]);
        for (model_type, tokenizer_class, json, expected) in [
            ("llama", Some("LlamaTokenizerFast"), None, Class::Llama),
            ("llama", Some("LlamaTokenizer"), byte_level, Class::Backend),
            ("llama", Some("GPT2Tokenizer"), byte_level, Class::Gpt2),
            ("llama", Some("PreTrainedTokenizerFast"), byte_level, Class::Backend),
            ("llama", None, None, Class::Backend),
            ("mistral", Some("LlamaTokenizer"), None, Class::Backend),
            ("persimmon", Some("LlamaTokenizer"), None, Class::Backend),
            ("opt", None, None, Class::Gpt2),
            ("opt", Some("PreTrainedTokenizerFast"), byte_level, Class::Backend),
            ("phi", Some("CodeGenTokenizer"), byte_level, Class::CodeGen),
            ("gpt_neox", Some("GPTNeoXTokenizerFast"), byte_level, Class::NeoX),
            ("gpt_neox", Some("PreTrainedTokenizerFast"), byte_level, Class::Backend),
            ("qwen2", Some("LlamaTokenizer"), byte_level, Class::Qwen2),
            ("qwen2", None, byte_level, Class::Qwen2),
            ("falcon", Some("PreTrainedTokenizerFast"), byte_level, Class::Backend),
            ("falcon", Some("NeverHeardOf"), None, Class::Backend),
        ] {
            let mut files = SideFiles { model_type: model_type.into(), ..SideFiles::default() };
            if let Some(name) = tokenizer_class {
                files.config.insert("tokenizer_class".into(), name.into());
            }
            assert_eq!(class(&files, json), (expected, None), "{model_type} {tokenizer_class:?}");
        }
        let mut files = SideFiles { model_type: "llama".into(), ..SideFiles::default() };
        files.config.insert("tokenizer_class".into(), "T5TokenizerFast".into());
        assert_eq!(class(&files, None), (Class::Backend, Some("T5Tokenizer".into())));
    }
}
