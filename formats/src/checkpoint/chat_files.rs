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
        top_p: config.number("top_p")?.filter(|top_p| *top_p < 1.0),
        repetition_penalty,
    })
}
