//! What a checkpoint says of talking to it: chat templates, the texts of special tokens, how tokens are to be chosen.
//!
//! Templates are where transformers looks for them: `chat_template.jinja` and the files of `additional_chat_templates/` (which was
//! `chat_templates/` for a while), else `chat_template` of `tokenizer_config.json`, a text or a list of named ones.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::error::CheckpointError;
use super::families::Config;
use super::file::read_small;
use super::read_config;
use crate::chat::{Chat, DEFAULT_TEMPLATE, SamplingDefaults, TEMPLATE_BYTES_MAX, TEMPLATES_MAX};

/// The file of the template.
pub const CHAT_TEMPLATE_FILE: &str = "chat_template.jinja";
/// Directories of further ones.
pub const CHAT_TEMPLATE_DIRS: [&str; 2] = ["additional_chat_templates", "chat_templates"];

/// Special tokens that templates know by name.
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// As many tokens as transformers chooses among where a configuration samples and does not say.
const SAMPLED_TOP_K: u32 = 50;

/// The templates of the checkpoint in `dir`; `None` where there are none.
pub(super) fn read_chat(dir: &Path) -> Result<Option<Chat>, CheckpointError> {
    let wrong = |path: PathBuf, reason: String| CheckpointError::Json { path, reason };
    let config = read_config(dir, "tokenizer_config.json")?;
    let mut templates = template_files(dir)?;
    if let (true, Some((file, config))) = (templates.is_empty(), &config)
        && let Some(said) = config.get("chat_template")
    {
        templates = named(said).ok_or_else(|| {
            let reason = "its chat_template is neither a text nor a list of texts with names. Get the original again";
            wrong(file.path.clone(), reason.into())
        })?;
    }
    if templates.is_empty() {
        return Ok(None);
    }
    let map = read_config(dir, "special_tokens_map.json")?;
    let places = [&config, &map];
    let token = |name: &str| places.into_iter().flatten().find_map(|(_, config)| token_text(config.get(name)?));
    let special_tokens = SPECIAL_TOKENS.into_iter().filter_map(|name| Some((name.to_owned(), token(name)?)));
    let chat = Chat { templates, special_tokens: special_tokens.collect() };
    match chat.excess() {
        Some((what, most, found)) => {
            Err(wrong(dir.join(CHAT_TEMPLATE_FILE), format!("{what}: {found}, and {most} are the most")))
        }
        None => Ok(Some(chat)),
    }
}

/// Those in files of their own.
fn template_files(dir: &Path) -> Result<BTreeMap<String, String>, CheckpointError> {
    let mut templates = BTreeMap::new();
    let mut add = |dir: &Path, file: &str, name: &str| {
        let Some((file, bytes)) = read_small(dir, file, TEMPLATE_BYTES_MAX as u64)? else { return Ok(()) };
        let text = String::from_utf8(bytes).map_err(|error| CheckpointError::Json {
            path: file.path,
            reason: format!("{error}. Get the original again"),
        })?;
        // As Python reads text.
        templates.insert(name.to_owned(), text.replace("\r\n", "\n").replace('\r', "\n"));
        Ok::<_, CheckpointError>(())
    };
    add(dir, CHAT_TEMPLATE_FILE, DEFAULT_TEMPLATE)?;
    for further in CHAT_TEMPLATE_DIRS.map(|name| dir.join(name)) {
        let mut names: Vec<String> = further
            .read_dir()
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| name.ends_with(".jinja"))
            .take(TEMPLATES_MAX + 1)
            .collect();
        names.sort();
        for file in names {
            add(&further, &file, file.trim_end_matches(".jinja"))?;
        }
    }
    Ok(templates)
}

/// Templates as `tokenizer_config.json` has them.
fn named(said: &Value) -> Option<BTreeMap<String, String>> {
    let one =
        |entry: &Value| Some((entry.get("name")?.as_str()?.to_owned(), entry.get("template")?.as_str()?.to_owned()));
    match said {
        Value::String(template) => Some(BTreeMap::from([(DEFAULT_TEMPLATE.to_owned(), template.clone())])),
        Value::Array(list) => list.iter().map(one).collect(),
        Value::Object(by_name) => {
            by_name.iter().map(|(name, template)| Some((name.clone(), template.as_str()?.to_owned()))).collect()
        }
        _ => None,
    }
}

/// A token as text, or as an object that says more of it.
fn token_text(said: &Value) -> Option<String> {
    let content = |token: &Map<String, Value>| token.get("content")?.as_str().map(str::to_owned);
    said.as_str().map(str::to_owned).or_else(|| content(said.as_object()?))
}

/// How `generation_config.json` wants tokens to be chosen, read as transformers does: without `do_sample` always the likeliest.
pub(super) fn read_sampling(dir: &Path) -> Result<SamplingDefaults, CheckpointError> {
    let Some((file, config)) = read_config(dir, "generation_config.json")? else {
        return Ok(SamplingDefaults::default());
    };
    let wrong = |source| CheckpointError::Config { path: file.path.clone(), source: Box::new(source) };
    let sampling = sampling(&config).map_err(wrong)?;
    match sampling.fault() {
        Some((name, expected, found)) => Err(CheckpointError::Json {
            path: file.path.clone(),
            reason: format!("{name} is {found}, expected {expected}. Correct it, or remove the key"),
        }),
        None => Ok(sampling),
    }
}

fn sampling(config: &Config) -> Result<SamplingDefaults, super::ConfigError> {
    let does_sample = config.flag("do_sample", false)?;
    let repetition_penalty = config.number("repetition_penalty")?.filter(|penalty| *penalty != 1.0);
    if !does_sample {
        return Ok(SamplingDefaults { repetition_penalty, ..SamplingDefaults::default() });
    }
    let top_k = config.whole("top_k", 0..=u32::MAX as usize)?.map_or(SAMPLED_TOP_K, |top_k| top_k as u32);
    Ok(SamplingDefaults {
        temperature: Some(config.number("temperature")?.unwrap_or(1.0)),
        top_k: Some(top_k).filter(|top_k| *top_k > 0),
        top_p: config.number("top_p")?.filter(|top_p| *top_p != 1.0),
        repetition_penalty,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        dir
    }

    fn templates(files: &[(&str, &str)]) -> Vec<(String, String)> {
        let chat = read_chat(dir(files).path()).unwrap();
        chat.map_or_else(Vec::new, |chat| chat.templates.into_iter().collect())
    }

    fn named(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
    }

    #[test]
    fn templates_are_where_transformers_looks() {
        assert_eq!(templates(&[]), []);
        assert_eq!(templates(&[("tokenizer_config.json", "{\"chat_template\": null}")]), []);
        let one = ("tokenizer_config.json", r#"{"chat_template": "c\nd"}"#);
        assert_eq!(templates(&[one]), named(&[("default", "c\nd")]));
        let list =
            r#"{"chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]}"#;
        assert_eq!(templates(&[("tokenizer_config.json", list)]), named(&[("default", "d"), ("tool_use", "t")]));
        // Files come first, and end lines as Python reads them.
        assert_eq!(templates(&[one, ("chat_template.jinja", "f\r\ng")]), named(&[("default", "f\ng")]));
        let further = [
            ("chat_template.jinja", "f"),
            ("additional_chat_templates/tool_use.jinja", "t"),
            ("chat_templates/rag.jinja", "r"),
            ("chat_templates/notes.txt", "n"),
        ];
        assert_eq!(templates(&further), named(&[("default", "f"), ("rag", "r"), ("tool_use", "t")]));
    }

    #[test]
    fn special_tokens_are_texts_or_objects() {
        let config = r#"{"chat_template": "x", "bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>", "pad_token": null}"#;
        let map = r#"{"bos_token": "other", "unk_token": "<unk>", "additional_special_tokens": ["<a>"]}"#;
        let dir = dir(&[("tokenizer_config.json", config), ("special_tokens_map.json", map)]);
        let chat = read_chat(dir.path()).unwrap().unwrap();
        let expected = named(&[("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")]);
        assert_eq!(chat.special_tokens.into_iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn what_is_no_template_is_refused_with_its_file() {
        let long = "x".repeat(TEMPLATE_BYTES_MAX + 1);
        for (file, text, says) in [
            ("tokenizer_config.json", r#"{"chat_template": 5}"#, "neither a text nor a list"),
            ("tokenizer_config.json", r#"{"chat_template": [{"name": "default"}]}"#, "neither a text nor a list"),
            ("chat_template.jinja", &long, "chat_template.jinja"),
        ] {
            let error = read_chat(dir(&[(file, text)]).path()).unwrap_err().to_string();
            assert!(error.contains(file) && error.contains(says), "{error}");
        }
        let dir = dir(&[]);
        std::fs::write(dir.path().join("chat_template.jinja"), b"a\xff").unwrap();
        assert!(read_chat(dir.path()).unwrap_err().to_string().contains("utf-8"));
    }

    #[test]
    fn sampling_is_read_as_transformers_reads_it() {
        let sampling = |json: &str| read_sampling(dir(&[("generation_config.json", json)]).path());
        let defaults = SamplingDefaults::default();
        for (json, expected) in [
            ("{}", defaults),
            (r#"{"temperature": 0.6, "top_p": 0.9}"#, defaults),
            (
                r#"{"do_sample": false, "temperature": 0.6, "repetition_penalty": 1.1}"#,
                SamplingDefaults { repetition_penalty: Some(1.1), ..defaults },
            ),
            (r#"{"do_sample": true}"#, SamplingDefaults { temperature: Some(1.0), top_k: Some(50), ..defaults }),
            (
                r#"{"do_sample": true, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.0}"#,
                SamplingDefaults {
                    temperature: Some(0.6),
                    top_k: Some(20),
                    top_p: Some(0.95),
                    repetition_penalty: None,
                },
            ),
            (
                r#"{"do_sample": true, "top_k": 0, "top_p": 1.0, "temperature": null}"#,
                SamplingDefaults { temperature: Some(1.0), ..defaults },
            ),
        ] {
            assert_eq!(sampling(json).unwrap(), expected, "{json}");
        }
        for json in [
            r#"{"do_sample": true, "temperature": -1}"#,
            r#"{"do_sample": true, "temperature": NaN}"#,
            r#"{"do_sample": true, "top_p": 2}"#,
            r#"{"do_sample": true, "top_k": -5}"#,
            r#"{"repetition_penalty": 0}"#,
            r#"{"do_sample": "yes"}"#,
        ] {
            assert!(sampling(json).unwrap_err().to_string().contains("generation_config.json"), "{json}");
        }
        assert_eq!(read_sampling(dir(&[]).path()).unwrap(), defaults);
    }
}
