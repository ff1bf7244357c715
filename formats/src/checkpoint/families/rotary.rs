//! How a configuration describes rotary positions: base, stretching, and the part of a head that is rotated.

use super::Config;
use super::config::POSITIONS_MAX;
use crate::checkpoint::error::ConfigError;
use crate::model::{Positions, RopeScaling};

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
    let mut theta = config.positive(keys.theta, keys.default_theta)?;
    let mut share = match keys.share {
        Some((key, default)) => config.positive(key, default)?,
        None => 1.0,
    };
    let mut scaling = None;
    let object = match config.object("rope_scaling")? {
        Some(object) => Some(("rope_scaling", object)),
        None => config.object("rope_parameters")?.map(|object| ("rope_parameters", object)),
    };
    if let Some((key, rope)) = object {
        let inside = |error: ConfigError| error.within(key);
        theta = rope.positive("rope_theta", theta).map_err(inside)?;
        if keys.share.is_some() {
            share = rope.positive("partial_rotary_factor", share).map_err(inside)?;
        }
        scaling = stretching(&rope, key, max_positions)?;
    }
    // Rounded down, as Python does it; the product in double precision, so that 80 x 0.4 is 32.
    let dims = (head_dim as f64 * decimal(share)) as usize;
    if share > 1.0 || dims == 0 || !dims.is_multiple_of(2) {
        return Err(ConfigError::Contradiction {
            first: format!("heads of width {head_dim}"),
            second: format!("{share} of each rotated"),
            rule: "rotary positions need an even number of dimensions",
        });
    }
    Ok(Positions::Rotary { dims, theta, scaling })
}

/// The double that a decimal of few digits stood for before it became a single.
fn decimal(single: f32) -> f64 {
    single.to_string().parse().unwrap_or(f64::from(single))
}

fn stretching(rope: &Config, key: &str, max_positions: usize) -> Result<Option<RopeScaling>, ConfigError> {
    let inside = |error: ConfigError| error.within(key);
    let kind =
        rope.text(if rope.get("rope_type").is_some() { "rope_type" } else { "type" }, "default").map_err(inside)?;
    let required = |name: &str| match rope.get(name) {
        Some(_) => rope.positive(name, 1.0).map_err(inside),
        None => Err(ConfigError::Missing { key: format!("{key}.{name}"), expected: "a positive number" }),
    };
    Ok(match kind {
        "default" => None,
        "linear" => Some(RopeScaling::Linear { factor: required("factor")? }),
        "llama3" => Some(RopeScaling::Llama3 {
            factor: required("factor")?,
            low_freq_factor: required("low_freq_factor")?,
            high_freq_factor: required("high_freq_factor")?,
            original_positions: rope
                .count(&["original_max_position_embeddings"], Some(max_positions), POSITIONS_MAX)
                .map_err(inside)?,
        }),
        other => return Err(rope.unsupported(&format!("{key}.rope_type"), other, "default, linear, llama3")),
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
