//! Reading single values of a `config.json`: typed, bounded, with defaults, never a panic. Knows no family.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::super::config_error::ConfigError;
use super::super::python_json;
use crate::model::Activation;

/// Bounds far beyond any model, so that sizes derived from them cannot overflow 64 bits.
pub(crate) const WIDTH_MAX: usize = 1 << 20;
pub(crate) const LAYERS_MAX: usize = 1 << 12;
pub(crate) const HEADS_MAX: usize = 1 << 12;
pub(crate) const VOCABULARY_MAX: usize = 1 << 24;
pub(crate) const POSITIONS_MAX: usize = 1 << 24;

/// Names of activation functions, as configurations have them: those that are exactly zero for many inputs first.
const ACTIVATIONS: &str =
    "relu, relu2, gelu, gelu_new, gelu_fast, gelu_pytorch_tanh, silu, and fatrelu in a sparsellama";

/// A parsed `config.json`.
pub(crate) struct Config(Map<String, Value>);

impl Config {
    /// Parse; the error says what is not as it should be.
    pub(crate) fn parse(json: &[u8]) -> Result<Self, String> {
        match python_json::parse(json)? {
            Value::Object(map) => Ok(Self(map)),
            other => Err(format!("expected an object, found {}. Get the original again", short(&other))),
        }
    }

    /// Every key with its value.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Forget the keys that are not wanted.
    pub(crate) fn retain(&mut self, is_wanted: impl Fn(&str) -> bool) {
        self.0.retain(|key, _| is_wanted(key));
    }

    /// The value of `key`, if it is there and not null.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    /// Whether `key` is there, if only to say null.
    pub(crate) fn says(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    /// An integer in `1..=max`, if it is there.
    pub(crate) fn optional_count(&self, key: &str, max: usize) -> Result<Option<usize>, ConfigError> {
        self.whole(key, 1..=max)
    }

    /// An integer within bounds, if it is there.
    pub(crate) fn whole(&self, key: &str, range: RangeInclusive<usize>) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().and_then(|count| usize::try_from(count).ok()) {
            Some(count) if range.contains(&count) => Ok(Some(count)),
            None if !value.is_number() => Err(wrong_type(key, "an integer", value)),
            _ => Err(out_of_range(key, format!("an integer in {range:?}"), value)),
        }
    }

    /// An integer in `1..=max`, under the first of `names` that is there; later names are those of old versions.
    pub(crate) fn count(&self, names: &[&str], default: Option<usize>, max: usize) -> Result<usize, ConfigError> {
        let mut found: Option<(&str, usize)> = None;
        for name in names {
            match (self.optional_count(name, max)?, found) {
                (Some(count), Some((first, other))) if count != other => {
                    return Err(ConfigError::Contradiction {
                        first: format!("{first} = {other}"),
                        second: format!("{name} = {count}"),
                        rule: "both name the same thing",
                    });
                }
                (Some(count), None) => found = Some((name, count)),
                _ => {}
            }
        }
        found
            .map(|(_, count)| count)
            .or(default)
            .ok_or_else(|| ConfigError::Missing { key: names[0].into(), expected: "an integer" })
    }

    /// A truth value. Null is false, as where Python reads it.
    pub(crate) fn flag(&self, key: &str, default: bool) -> Result<bool, ConfigError> {
        match self.0.get(key) {
            None => Ok(default),
            Some(Value::Null) => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(wrong_type(key, "true or false", other)),
        }
    }

    /// A number, as far as single precision can hold it.
    pub(crate) fn number(&self, key: &str) -> Result<Option<f32>, ConfigError> {
        self.get(key).map(|value| number(key, value).map(|number| number as f32)).transpose()
    }

    /// A finite positive number that single precision can hold.
    pub(crate) fn positive(&self, key: &str, default: f32) -> Result<f32, ConfigError> {
        self.0.get(key).map_or(Ok(default), |value| positive(key, value))
    }

    /// The epsilon of a norm; 0 is one.
    pub(crate) fn epsilon(&self, key: &str, default: f32) -> Result<f32, ConfigError> {
        let Some(value) = self.0.get(key) else { return Ok(default) };
        let eps = number(key, value)? as f32;
        if (0.0..=1.0).contains(&eps) { Ok(eps) } else { Err(out_of_range(key, "a number in 0..=1".into(), value)) }
    }

    /// A text.
    pub(crate) fn text<'a>(&'a self, key: &str, default: &'a str) -> Result<&'a str, ConfigError> {
        match self.0.get(key) {
            None => Ok(default),
            Some(Value::String(text)) => Ok(text),
            Some(other) => Err(wrong_type(key, "a text", other)),
        }
    }

    /// An activation function by transformers' name.
    pub(crate) fn activation(&self, key: &str, default: &str) -> Result<Activation, ConfigError> {
        Ok(match self.text(key, default)? {
            "relu" => Activation::Relu,
            "relu2" => Activation::Relu2,
            "gelu" | "gelu_python" => Activation::Gelu,
            "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" | "gelu_accurate" | "gelu_python_tanh" => {
                Activation::GeluTanh
            }
            "silu" | "swish" => Activation::Silu,
            other => return Err(unsupported(key, &other.into(), ACTIVATIONS)),
        })
    }

    /// One token id.
    pub(crate) fn token(&self, key: &str, default: Option<u32>, vocab_size: usize) -> Result<Option<u32>, ConfigError> {
        match self.0.get(key) {
            None => Ok(default.filter(|&id| (id as usize) < vocab_size)),
            Some(Value::Null) => Ok(None),
            Some(value) => token(key, value, vocab_size).map(Some),
        }
    }

    /// Token ids: one, or a list.
    pub(crate) fn tokens(&self, key: &str, default: &[u32], vocab_size: usize) -> Result<Vec<u32>, ConfigError> {
        match self.0.get(key) {
            None => Ok(default.to_vec()),
            Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(|value| token(key, value, vocab_size)).collect(),
            Some(value) => token(key, value, vocab_size).map(|id| vec![id]),
        }
    }

    /// An object that is there and not empty.
    pub(crate) fn object(&self, key: &str) -> Result<Option<Self>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok((!map.is_empty()).then(|| Self(map.clone()))),
            Some(other) => Err(wrong_type(key, "an object", other)),
        }
    }

    /// Names of the model's classes; what is no text is ignored.
    pub(crate) fn architectures(&self) -> Vec<String> {
        let list = self.get("architectures").and_then(Value::as_array);
        list.into_iter().flatten().filter_map(Value::as_str).map(shorten).collect()
    }

    /// Refuse weights that another tool has quantised.
    pub(crate) fn refuse_quantized(&self) -> Result<(), ConfigError> {
        match self.get("quantization_config") {
            None => Ok(()),
            Some(value) => {
                let method = value.get("quant_method").and_then(Value::as_str).unwrap_or("unknown method");
                Err(ConfigError::Quantized { method: shorten(method) })
            }
        }
    }
}

impl ConfigError {
    /// The same error about a key inside the object `outer`.
    pub(crate) fn within(self, outer: &str) -> Self {
        let nest = |key: String| format!("{outer}.{key}");
        match self {
            Self::Missing { key, expected } => Self::Missing { key: nest(key), expected },
            Self::WrongType { key, expected, found } => Self::WrongType { key: nest(key), expected, found },
            Self::OutOfRange { key, expected, found } => Self::OutOfRange { key: nest(key), expected, found },
            Self::Unsupported { key, found, supported } => Self::Unsupported { key: nest(key), found, supported },
            other => other,
        }
    }
}

/// `hidden / heads`, which must go without remainder.
pub(crate) fn head_dim(hidden: (&str, usize), heads: (&str, usize)) -> Result<usize, ConfigError> {
    if hidden.1.is_multiple_of(heads.1) {
        return Ok(hidden.1 / heads.1);
    }
    Err(ConfigError::Contradiction {
        first: format!("{} = {}", hidden.0, hidden.1),
        second: format!("{} = {}", heads.0, heads.1),
        rule: "the width must be a multiple of the number of heads",
    })
}

/// A value that is understood and not supported.
pub(crate) fn unsupported(key: &str, found: &Value, supported: &str) -> ConfigError {
    ConfigError::Unsupported { key: key.into(), found: short(found), supported: supported.into() }
}

/// Infinity and its kin are numbers, too, but never in range.
fn number(key: &str, value: &Value) -> Result<f64, ConfigError> {
    match value.get(python_json::FLOAT_KEY) {
        Some(_) => Ok(f64::NAN),
        None => value.as_f64().ok_or_else(|| wrong_type(key, "a number", value)),
    }
}

fn positive(key: &str, value: &Value) -> Result<f32, ConfigError> {
    let single = number(key, value)? as f32;
    if single.is_finite() && single > 0.0 {
        Ok(single)
    } else {
        Err(out_of_range(key, "a positive finite number".into(), value))
    }
}

fn token(key: &str, value: &Value, vocab_size: usize) -> Result<u32, ConfigError> {
    match value.as_u64() {
        Some(id) if id < vocab_size as u64 => Ok(id as u32),
        None if !value.is_number() => Err(wrong_type(key, "a token id", value)),
        _ => Err(out_of_range(key, format!("a token id below vocab_size = {vocab_size}"), value)),
    }
}

fn wrong_type(key: &str, expected: &'static str, found: &Value) -> ConfigError {
    ConfigError::WrongType { key: key.into(), expected, found: short(found) }
}

fn out_of_range(key: &str, expected: String, found: &Value) -> ConfigError {
    ConfigError::OutOfRange { key: key.into(), expected, found: short(found) }
}

/// A value for a message: not longer than a line.
fn short(value: &Value) -> String {
    match value {
        Value::Array(_) => "an array".into(),
        Value::Object(map) => match map.get(python_json::FLOAT_KEY) {
            Some(Value::String(word)) => shorten(word),
            _ => "an object".into(),
        },
        scalar => shorten(&scalar.to_string()),
    }
}

pub(crate) fn shorten(text: &str) -> String {
    let mut short: String = text.chars().take(60).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}
