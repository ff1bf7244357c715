//! How a configuration describes rotary positions: base, stretching, and the part of a head that is rotated.

use super::Config;
use super::config::{POSITIONS_MAX, shorten, unsupported};
use crate::checkpoint::config_error::ConfigError;
use crate::model::{Positions, RopeScaling};

/// Keys of the objects that describe rotary positions; the first counts where both are there.
pub(crate) const OBJECTS: [&str; 2] = ["rope_scaling", "rope_parameters"];

/// Every key that one of them may have: those that are read, and those of kinds that are refused by name.
const KEYS: &[&str] = &[
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "short_factor",
    "long_factor",
    "finetuned",
];

/// Keys inside [`OBJECTS`] that nobody knows, with the object's name in front.
pub(crate) fn unknown_keys(config: &Config) -> Vec<String> {
    let objects = OBJECTS.iter().filter_map(|name| Some((name, config.get(name)?.as_object()?)));
    let keys = objects.flat_map(|(name, map)| map.keys().map(move |key| (name, key)));
    keys.filter(|(_, key)| !KEYS.contains(&key.as_str()))
        .map(|(name, key)| format!("{name}.{}", shorten(key)))
        .collect()
}

/// Where a family's configurations say it, before transformers 5, and what holds where they do not.
pub(crate) struct RotaryKeys {
    pub(crate) theta: &'static str,
    pub(crate) default_theta: f32,
    /// The key of the share of a head that is rotated, and its default; without one heads are rotated whole.
    pub(crate) share: Option<(&'static str, f32)>,
}

/// Heads rotated whole, base 10 000: most families.
pub(crate) const PLAIN: RotaryKeys = RotaryKeys { theta: "rope_theta", default_theta: 10_000.0, share: None };

/// Rotary positions of heads of width `head_dim`, as transformers reads them: `rope_scaling` (before version 5) or
/// `rope_parameters`, and what is in there before what is beside it.
pub(crate) fn rotary(
    config: &Config,
    keys: &RotaryKeys,
    head_dim: usize,
    max_positions: usize,
) -> Result<Positions, ConfigError> {
    rotary_part(config, keys, head_dim, head_dim, max_positions)
}

/// The same where the width that the share is of is not that of the heads.
pub(crate) fn rotary_part(
    config: &Config,
    keys: &RotaryKeys,
    width: usize,
    head_dim: usize,
    max_positions: usize,
) -> Result<Positions, ConfigError> {
    let mut theta = config.positive(keys.theta, keys.default_theta)?;
    let mut share = match keys.share {
        Some((key, default)) => config.positive(key, default)?,
        None => 1.0,
    };
    let mut scaling = None;
    let mut object = None;
    for name in OBJECTS {
        object = object.or(config.object(name)?.map(|object| (name, object)));
    }
    if let Some((key, rope)) = object {
        let inside = |error: ConfigError| error.within(key);
        theta = rope.positive("rope_theta", theta).map_err(inside)?;
        scaling = stretching(&rope, config, key, max_positions)?;
        // Where heads are rotated whole the plain frequencies do not ask for a share; stretched ones do, and would not fit.
        if keys.share.is_some() || scaling.is_some() {
            share = rope.positive("partial_rotary_factor", share).map_err(inside)?;
            if keys.share.is_none() && share != 1.0 {
                let found = rope.get("partial_rotary_factor").unwrap_or(&serde_json::Value::Null);
                return Err(unsupported(&format!("{key}.partial_rotary_factor"), found, "1"));
            }
        }
    }
    // Rounded down, as Python does it; the product in double precision, so that 80 x 0.4 is 32.
    let dims = (width as f64 * decimal(share)) as usize;
    if share > 1.0 || dims == 0 || dims > head_dim || !dims.is_multiple_of(2) {
        return Err(ConfigError::Contradiction {
            first: format!("heads of width {head_dim}"),
            second: format!("{share} of {width} rotated"),
            rule: "rotary positions need an even number of dimensions, and no more than there are",
        });
    }
    Ok(Positions::Rotary { dims, theta, scaling })
}

/// The double that a decimal of few digits stood for before it became a single.
fn decimal(single: f32) -> f64 {
    single.to_string().parse().unwrap_or(f64::from(single))
}

/// The context that a model with stretched frequencies was first trained for.
const ORIGINAL: &str = "original_max_position_embeddings";

fn stretching(
    rope: &Config,
    config: &Config,
    key: &str,
    max_positions: usize,
) -> Result<Option<RopeScaling>, ConfigError> {
    let inside = |error: ConfigError| error.within(key);
    let kind = rope.text(if rope.says("rope_type") { "rope_type" } else { "type" }, "default").map_err(inside)?;
    let required = |name: &str| match rope.get(name) {
        Some(_) => rope.positive(name, 1.0).map_err(inside),
        None => Err(ConfigError::Missing { key: format!("{key}.{name}"), expected: "a positive number" }),
    };
    Ok(match kind {
        "default" => None,
        // Plain up to max_position_embeddings, which is where contexts end here.
        "dynamic" => required("factor").map(|_| None)?,
        "linear" => Some(RopeScaling::Linear { factor: required("factor")? }),
        "llama3" => Some(RopeScaling::Llama3 {
            factor: required("factor")?,
            low_freq_factor: required("low_freq_factor")?,
            high_freq_factor: required("high_freq_factor")?,
            // What stands beside the object goes before what is in it.
            original_positions: match config.says(ORIGINAL) {
                true => config.count(&[ORIGINAL], None, POSITIONS_MAX)?,
                false => rope.count(&[ORIGINAL], Some(max_positions), POSITIONS_MAX).map_err(inside)?,
            },
        }),
        other => {
            let supported = "default, linear, llama3, dynamic";
            return Err(unsupported(&format!("{key}.rope_type"), &other.into(), supported));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn part_of_a_head_is_rounded_as_in_python() {
        let keys = RotaryKeys { share: Some(("rotary_pct", 0.25)), ..PLAIN };
        let dims = |json: &str, head_dim| match rotary(&Config::parse(json.as_bytes()).unwrap(), &keys, head_dim, 64) {
            Ok(Positions::Rotary { dims, .. }) => Some(dims),
            _ => None,
        };
        assert_eq!(dims("{}", 64), Some(16));
        assert_eq!(dims(r#"{"rotary_pct": 0.4}"#, 80), Some(32));
        assert_eq!(dims(r#"{"rotary_pct": 1.0}"#, 12), Some(12));
        assert_eq!(dims(r#"{"rotary_pct": 0.5, "rope_parameters": {"partial_rotary_factor": 0.25}}"#, 80), Some(20));
        assert_eq!(dims(r#"{"rotary_pct": 0.25}"#, 12), None, "three dimensions");
        assert_eq!(dims(r#"{"rotary_pct": 1.5}"#, 12), None);
    }
}
