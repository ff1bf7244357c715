//! The model families that can be read: one small file each, and this closed table.
//!
//! A family turns `config.json` into a [`ModelSpec`] and says from which stored tensors each canonical one is made. It sees
//! no files. To add one: write its file, which says in `INFO` what docs/families.md says of it, add it to [`FAMILIES`] and
//! [`FAMILY_INFOS`], and add a fixture per quirk.

mod config;
mod falcon;
mod fused;
mod gpt_neox;
mod info;
mod keys;
mod llama;
mod opt;
mod persimmon;
mod phi;
mod rotary;

pub(crate) use config::{Config, shorten};
pub use info::FamilyInfo;
pub(crate) use keys::Unread;

use keys::Keys;

use super::config_error::ConfigError;
use super::head_names::LM_HEAD;
use super::plan::Plan;
use crate::model::ModelSpec;

/// What there is to know about a family.
pub(crate) struct Family {
    /// For people; its name is `ModelSpec::family`.
    pub(crate) info: &'static FamilyInfo,
    /// Values of `model_type`, today's first.
    pub(crate) model_types: &'static [&'static str],
    /// What is done with the keys of a configuration.
    pub(crate) keys: &'static Keys,
    /// Names of the classes whose arithmetic this is known to be.
    pub(crate) architectures: &'static [&'static str],
    /// What may come before the names of the body's tensors, the usual one first.
    pub(crate) prefixes: &'static [&'static str],
    /// Name of the token embedding behind the prefix.
    pub(crate) embedding: &'static str,
    /// Name of the head; no prefix comes before it.
    pub(crate) head: &'static str,
    /// Read the configuration.
    pub(crate) spec: fn(&Config) -> Result<ModelSpec, ConfigError>,
    /// Say where each canonical tensor of such a model comes from, given a prefix.
    pub(crate) plan: fn(&ModelSpec, &Config, &str, &mut Plan) -> Result<(), ConfigError>,
    /// Whether a stored tensor, named without its prefix, can be left unread for a reason of the family's
    /// own, such as what the configuration switched off.
    pub(crate) is_ignorable: fn(&ModelSpec, &str) -> bool,
}

/// A row for each set of keys; families of several have as many rows.
static FAMILIES: &[&Family] = &[
    &opt::FAMILY,
    &falcon::FAMILY,
    &falcon::REFINED_WEB,
    &llama::FAMILY,
    &llama::MISTRAL,
    &llama::QWEN2,
    &llama::SPARSE,
    &llama::BAMBOO,
    &persimmon::FAMILY,
    &phi::FAMILY,
    &phi::MSFT,
    &gpt_neox::FAMILY,
];

/// Every family that can be read, in the order of docs/families.md.
pub const FAMILY_INFOS: &[FamilyInfo] =
    &[opt::INFO, falcon::INFO, llama::INFO, persimmon::INFO, phi::INFO, gpt_neox::INFO];

/// A configuration that its family has looked through.
pub(crate) struct Admitted {
    pub(crate) family: &'static Family,
    /// What the family follows.
    pub(crate) config: Config,
    /// What it does not follow and nobody switched off.
    pub(crate) unread: Unread,
    /// Name of a class with code of its own that no family is known to compute.
    pub(crate) unknown_code: Option<String>,
}

/// Find the family of a configuration and leave it what it follows.
pub(crate) fn admit(config: Config) -> Result<Admitted, ConfigError> {
    let family = find(&config)?;
    config.refuse_quantized()?;
    let unknown_code = unknown_code(&config, family);
    let (config, unread) = family.keys.admit(config)?;
    Ok(Admitted { family, config, unread, unknown_code })
}

fn find(config: &Config) -> Result<&'static Family, ConfigError> {
    if config.get("model_type").is_none() {
        return Err(ConfigError::Missing { key: "model_type".into(), expected: "the name of a model family" });
    }
    let model_type = config.text("model_type", "")?;
    FAMILIES.iter().copied().find(|family| family.model_types.contains(&model_type)).ok_or_else(|| {
        let supported: Vec<&str> = FAMILIES.iter().flat_map(|family| family.model_types.iter().copied()).collect();
        ConfigError::Family {
            model_type: model_type.chars().take(60).collect(),
            architectures: config.architectures(),
            supported: supported.join(", "),
        }
    })
}

/// The class of a model with code of its own that no family is known to compute, if the configuration names one.
fn unknown_code(config: &Config, family: &Family) -> Option<String> {
    config.get("auto_map")?;
    config.architectures().into_iter().find(|class| !family.architectures.contains(&class.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_is_described_once_with_its_model_types() {
        for info in FAMILY_INFOS {
            let families = FAMILIES.iter().filter(|family| family.info == info);
            let types: Vec<&str> = families.flat_map(|family| family.model_types.iter().copied()).collect();
            assert_eq!(types, info.model_types, "{}", info.name);
        }
        assert!(FAMILIES.iter().all(|family| FAMILY_INFOS.iter().filter(|info| *info == family.info).count() == 1));
    }
}
