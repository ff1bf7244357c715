//! The model families that can be read: one small file each, and this closed table.
//!
//! A family turns `config.json` into a [`ModelSpec`] and says from which stored tensors each canonical one is made. It sees
//! no files. To add one: write its file, add it to [`FAMILIES`], and add a fixture per quirk.

mod config;
mod falcon;
mod opt;

pub(crate) use config::Config;

use super::error::ConfigError;
use super::plan::Plan;
use crate::model::ModelSpec;

/// What there is to know about a family.
pub(crate) struct Family {
    /// For people, and for `ModelSpec::family`.
    pub(crate) name: &'static str,
    /// Values of `model_type`, today's first.
    pub(crate) model_types: &'static [&'static str],
    /// What may stand before the names of the body's tensors, the usual one first.
    pub(crate) prefixes: &'static [&'static str],
    /// Name of the token embedding behind the prefix.
    pub(crate) embedding: &'static str,
    /// Read the configuration.
    pub(crate) spec: fn(&Config) -> Result<ModelSpec, ConfigError>,
    /// Say where each canonical tensor of such a model comes from, given a prefix.
    pub(crate) plan: fn(&ModelSpec, &Config, &str, &mut Plan) -> Result<(), ConfigError>,
    /// Whether a stored tensor, named without its prefix, can be left unread: buffers, and what the configuration switched off.
    pub(crate) is_ignorable: fn(&ModelSpec, &str) -> bool,
}

/// Name of the head in every family; no prefix stands before it.
pub(crate) const HEAD: &str = "lm_head.weight";

static FAMILIES: &[&Family] = &[&opt::FAMILY, &falcon::FAMILY];

/// The family of a configuration.
pub(crate) fn find(config: &Config) -> Result<&'static Family, ConfigError> {
    let supported = || FAMILIES.iter().map(|family| family.model_types[0]).collect::<Vec<_>>().join(", ");
    if config.get("model_type").is_none() {
        return Err(ConfigError::Missing { key: "model_type".into(), expected: "the name of a model family" });
    }
    let model_type = config.text("model_type", "")?;
    FAMILIES.iter().copied().find(|family| family.model_types.contains(&model_type)).ok_or_else(|| {
        ConfigError::Unsupported {
            key: "model_type".into(),
            found: format!("{:?}", model_type.chars().take(60).collect::<String>()),
            supported: supported(),
        }
    })
}
