//! The JSON of an architecture: layers as runs of equal ones, `[{"repeat": 30, ..}]`.
//!
//! Bundles and recordings from before layers were data say `"layers": 30`, and what all of them are beside it; they are read
//! as well.

use std::fmt;

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use super::ffn::{FeedForward, Ffn};
use super::layer::{Attention, Block, LayerSpec, Norm, NormKind, Positions, RopeScaling};
use super::spec::{LAYERS_MAX, LearnedPositions, ModelSpec};

/// A [`ModelSpec`] as it is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StoredModel {
    family: String,
    vocab_size: usize,
    hidden_size: usize,
    embed_size: usize,
    max_positions: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    learned_positions: Option<LearnedPositions>,
    layers: Layers,
    final_norm: FinalNorm,
    tied_head: bool,
    head_bias: bool,
    bos: Option<u32>,
    eos: Vec<u32>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    thresholds: Vec<f32>,
    // Only beside a number of layers.
    #[serde(default, skip_serializing)]
    norm: Option<Norm>,
    #[serde(default, skip_serializing)]
    positions: Option<FormerPositions>,
    #[serde(default, skip_serializing)]
    attention: Option<FormerAttention>,
    #[serde(default, skip_serializing)]
    block: Option<Block>,
    #[serde(default, skip_serializing)]
    ffn: Option<Ffn>,
}

/// Layers that are equal and follow each other.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Run {
    repeat: usize,
    norm: Norm,
    block: Block,
    attention: Attention,
    positions: Positions,
    feed_forward: FeedForward,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Layers {
    Runs(Vec<Run>),
    Number(u64),
}

#[derive(Serialize)]
#[serde(untagged)]
enum FinalNorm {
    Norm(Option<Norm>),
    /// Whether there is one, like those of the layers.
    LikeLayers(bool),
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum FormerPositions {
    Learned { offset: usize },
    Rotary { dims: usize, theta: f32, scaling: Option<RopeScaling> },
    Alibi,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
struct FormerAttention {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    qkv_bias: bool,
    out_bias: bool,
    qk_norm: bool,
}

/// Why the JSON is no architecture.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum StoredError {
    #[error("layers: 1 to {LAYERS_MAX} layers expected, found {found}")]
    Count { found: u128 },
    #[error("layers[{run}].repeat: 1 or more expected, found 0")]
    EmptyRun { run: usize },
    #[error("{key}: expected where layers is a number, found nothing")]
    Missing { key: &'static str },
    #[error("{key}: expected {expected}")]
    Mixed { key: &'static str, expected: &'static str },
}

impl Serialize for ModelSpec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        StoredModel::from(self.clone()).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for ModelSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        StoredModel::deserialize(deserializer)?.try_into().map_err(serde::de::Error::custom)
    }
}

impl From<ModelSpec> for StoredModel {
    fn from(spec: ModelSpec) -> Self {
        Self {
            layers: Layers::Runs(runs(&spec.layers)),
            family: spec.family,
            vocab_size: spec.vocab_size,
            hidden_size: spec.hidden_size,
            embed_size: spec.embed_size,
            max_positions: spec.max_positions,
            learned_positions: spec.learned_positions,
            final_norm: FinalNorm::Norm(spec.final_norm),
            tied_head: spec.tied_head,
            head_bias: spec.head_bias,
            bos: spec.bos,
            eos: spec.eos,
            thresholds: spec.thresholds,
            norm: None,
            positions: None,
            attention: None,
            block: None,
            ffn: None,
        }
    }
}

impl TryFrom<StoredModel> for ModelSpec {
    type Error = StoredError;

    fn try_from(stored: StoredModel) -> Result<Self, StoredError> {
        let mut learned_positions = stored.learned_positions;
        let (layers, final_norm) = match (&stored.layers, &stored.final_norm) {
            (Layers::Runs(runs), FinalNorm::Norm(final_norm)) => {
                stored.refuse_former()?;
                (expand(runs)?, *final_norm)
            }
            (Layers::Number(count), FinalNorm::LikeLayers(has_final_norm)) => {
                if learned_positions.is_some() {
                    return Err(StoredError::Mixed {
                        key: "learned_positions",
                        expected: "none beside a number of layers",
                    });
                }
                let (layer, offset) = stored.former_layer()?;
                learned_positions = offset.map(|offset| LearnedPositions { offset });
                (vec![layer; checked_count(u128::from(*count))?], has_final_norm.then_some(layer.norm))
            }
            (Layers::Runs(_), FinalNorm::LikeLayers(_)) => {
                return Err(StoredError::Mixed { key: "final_norm", expected: "a norm or null" });
            }
            (Layers::Number(_), FinalNorm::Norm(_)) => {
                return Err(StoredError::Mixed {
                    key: "final_norm",
                    expected: "true or false where layers is a number",
                });
            }
        };
        Ok(Self {
            family: stored.family,
            vocab_size: stored.vocab_size,
            hidden_size: stored.hidden_size,
            embed_size: stored.embed_size,
            max_positions: stored.max_positions,
            learned_positions,
            layers,
            final_norm,
            tied_head: stored.tied_head,
            head_bias: stored.head_bias,
            bos: stored.bos,
            eos: stored.eos,
            thresholds: stored.thresholds,
        })
    }
}

impl StoredModel {
    /// Keys of the layers may not stand beside a list of them.
    fn refuse_former(&self) -> Result<(), StoredError> {
        let former = [
            ("norm", self.norm.is_some()),
            ("positions", self.positions.is_some()),
            ("attention", self.attention.is_some()),
            ("block", self.block.is_some()),
            ("ffn", self.ffn.is_some()),
        ];
        match former.into_iter().find(|(_, is_there)| *is_there) {
            Some((key, _)) => Err(StoredError::Mixed { key, expected: "inside a list of layers, not beside it" }),
            None => Ok(()),
        }
    }

    /// What all layers are, and the offset of learned positions if there are some.
    fn former_layer(&self) -> Result<(LayerSpec, Option<usize>), StoredError> {
        let missing = |key| StoredError::Missing { key };
        let norm = self.norm.ok_or(missing("norm"))?;
        let block = self.block.ok_or(missing("block"))?;
        let feed_forward = FeedForward::Dense(self.ffn.ok_or(missing("ffn"))?);
        let (positions, offset) = match self.positions.ok_or(missing("positions"))? {
            FormerPositions::Learned { offset } => (Positions::None, Some(offset)),
            FormerPositions::Rotary { dims, theta, scaling } => (Positions::Rotary { dims, theta, scaling }, None),
            FormerPositions::Alibi => (Positions::Alibi, None),
        };
        let FormerAttention { heads, kv_heads, head_dim, qkv_bias, out_bias, qk_norm } =
            self.attention.ok_or(missing("attention"))?;
        // It was Persimmon's.
        let qk_norm = qk_norm.then_some(Norm { kind: NormKind::LayerNorm, eps: norm.eps, weight: true, bias: true });
        let attention = Attention { heads, kv_heads, head_dim, qkv_bias, out_bias, qk_norm };
        Ok((LayerSpec { norm, block, attention, positions, feed_forward }, offset))
    }
}

/// Equal neighbours as one run.
fn runs(layers: &[LayerSpec]) -> Vec<Run> {
    let runs = layers.chunk_by(PartialEq::eq);
    runs.map(|run| {
        let LayerSpec { norm, block, attention, positions, feed_forward } = run[0];
        Run { repeat: run.len(), norm, block, attention, positions, feed_forward }
    })
    .collect()
}

/// The layers of the runs, once it is known that they are not too many.
fn expand(runs: &[Run]) -> Result<Vec<LayerSpec>, StoredError> {
    if let Some(run) = runs.iter().position(|run| run.repeat == 0) {
        return Err(StoredError::EmptyRun { run });
    }
    let count = checked_count(runs.iter().map(|run| run.repeat as u128).sum())?;
    let mut layers = Vec::with_capacity(count);
    for &Run { repeat, norm, block, attention, positions, feed_forward } in runs {
        let layer = LayerSpec { norm, block, attention, positions, feed_forward };
        layers.extend(std::iter::repeat_n(layer, repeat));
    }
    Ok(layers)
}

fn checked_count(found: u128) -> Result<usize, StoredError> {
    let count = usize::try_from(found).ok().filter(|count| (1..=LAYERS_MAX).contains(count));
    count.ok_or(StoredError::Count { found })
}

impl<'de> Deserialize<'de> for Layers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct LayersVisitor;
        impl<'de> Visitor<'de> for LayersVisitor {
            type Value = Layers;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of runs of layers, or their number")
            }

            fn visit_u64<E>(self, number: u64) -> Result<Layers, E> {
                Ok(Layers::Number(number))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Layers, A::Error> {
                Deserialize::deserialize(SeqAccessDeserializer::new(list)).map(Layers::Runs)
            }
        }
        deserializer.deserialize_any(LayersVisitor)
    }
}

impl<'de> Deserialize<'de> for FinalNorm {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FinalNormVisitor;
        impl<'de> Visitor<'de> for FinalNormVisitor {
            type Value = FinalNorm;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a norm or null, or a boolean beside a number of layers")
            }

            fn visit_bool<E>(self, is_there: bool) -> Result<FinalNorm, E> {
                Ok(FinalNorm::LikeLayers(is_there))
            }

            fn visit_unit<E>(self) -> Result<FinalNorm, E> {
                Ok(FinalNorm::Norm(None))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<FinalNorm, A::Error> {
                Norm::deserialize(MapAccessDeserializer::new(map)).map(|norm| FinalNorm::Norm(Some(norm)))
            }
        }
        deserializer.deserialize_any(FinalNormVisitor)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const NORM: Norm = Norm { kind: NormKind::LayerNorm, eps: 1e-5, weight: true, bias: true };

    fn layer() -> LayerSpec {
        LayerSpec {
            norm: NORM,
            block: Block::PreNorm,
            attention: Attention {
                heads: 4,
                kv_heads: 2,
                head_dim: 6,
                qkv_bias: false,
                out_bias: true,
                qk_norm: Some(NORM),
            },
            positions: Positions::Rotary { dims: 4, theta: 1e4, scaling: Some(RopeScaling::Linear { factor: 2.0 }) },
            feed_forward: FeedForward::Dense(Ffn {
                size: 5,
                activation: super::super::Activation::FatRelu(0.01),
                gated: true,
                up_activated: false,
                gate_bias: false,
                up_bias: false,
                down_bias: false,
            }),
        }
    }

    fn spec(layers: Vec<LayerSpec>) -> ModelSpec {
        ModelSpec {
            family: "llama".into(),
            vocab_size: 7,
            hidden_size: 12,
            embed_size: 12,
            max_positions: 64,
            learned_positions: None,
            layers,
            final_norm: Some(NORM),
            tied_head: false,
            head_bias: true,
            bos: None,
            eos: vec![2],
            thresholds: vec![],
        }
    }

    /// The JSON of `spec(vec![layer(); 30])` as it was before layers were data.
    fn former() -> Value {
        let norm = json!({"kind": "layer_norm", "eps": 1e-5, "weight": true, "bias": true});
        json!({
            "family": "llama", "vocab_size": 7, "hidden_size": 12, "embed_size": 12, "layers": 30, "max_positions": 64,
            "norm": norm, "positions": {"rotary": {"dims": 4, "theta": 1e4, "scaling": {"linear": {"factor": 2.0}}}},
            "attention": {"heads": 4, "kv_heads": 2, "head_dim": 6, "qkv_bias": false, "out_bias": true, "qk_norm": true},
            "block": "pre_norm",
            "ffn": {"size": 5, "activation": {"fat_relu": 0.01}, "gated": true, "up_bias": false, "down_bias": false},
            "final_norm": true, "tied_head": false, "head_bias": true, "bos": null, "eos": [2],
        })
    }

    fn error(json: &Value) -> String {
        serde_json::from_value::<ModelSpec>(json.clone()).unwrap_err().to_string()
    }

    fn with(mut json: Value, pointer: &str, value: Value) -> Value {
        *json.pointer_mut(pointer).unwrap() = value;
        json
    }

    #[test]
    fn equal_neighbours_are_one_run_and_all_layers_come_back_in_order() {
        let (plain, turned) = (layer(), LayerSpec { positions: Positions::None, ..layer() });
        let layers = [vec![plain; 3], vec![turned], vec![plain; 26]].concat();
        let written = serde_json::to_value(spec(layers.clone())).unwrap();
        let runs = written["layers"].as_array().unwrap();
        assert_eq!(runs.iter().map(|run| run["repeat"].as_u64().unwrap()).collect::<Vec<_>>(), [3, 1, 26]);
        assert_eq!(runs[0]["feed_forward"]["dense"]["size"], 5);
        assert_eq!(serde_json::from_value::<ModelSpec>(written).unwrap(), spec(layers));
    }

    #[test]
    fn a_number_of_layers_means_as_many_of_what_stands_beside_it() {
        let read: ModelSpec = serde_json::from_value(former()).unwrap();
        assert_eq!(read, spec(vec![layer(); 30]));
        let learned = with(former(), "/positions", json!({"learned": {"offset": 2}}));
        let learned = with(learned, "/final_norm", json!(false));
        let read: ModelSpec = serde_json::from_value(with(learned, "/attention/qk_norm", json!(false))).unwrap();
        assert_eq!(read.learned_positions, Some(LearnedPositions { offset: 2 }));
        assert_eq!((read.final_norm, read.layers[29].positions), (None, Positions::None));
        assert_eq!(read.layers[29].attention.qk_norm, None);
    }

    #[test]
    fn layers_that_are_none_or_too_many_are_refused_before_they_are_made() {
        let now = serde_json::to_value(spec(vec![layer(); 2])).unwrap();
        let run = now["layers"][0].clone();
        let repeated = |times: u64| with(run.clone(), "/repeat", json!(times));
        for (layers, found) in [
            (json!([]), "found 0"),
            (json!([repeated(1 << 60)]), "found 1152921504606846976"),
            (json!([repeated(u64::MAX), repeated(u64::MAX)]), "found 36893488147419103230"),
            (json!([repeated(LAYERS_MAX as u64), repeated(1)]), "found 16385"),
        ] {
            let error = error(&with(now.clone(), "/layers", layers));
            assert!(error.contains("layers: 1 to 16384 layers expected") && error.contains(found), "{error}");
        }
        let error_of = |layers| error(&with(now.clone(), "/layers", layers));
        assert!(error_of(json!([repeated(2), repeated(0)])).contains("layers[1].repeat: 1 or more expected, found 0"));
        assert!(error_of(json!("30")).contains("a list of runs of layers, or their number"));
        assert!(error_of(json!(-1)).contains("a list of runs of layers, or their number"));
        for number in [0, 16385, u64::MAX] {
            let error = error(&with(former(), "/layers", json!(number)));
            assert!(error.contains(&format!("layers: 1 to 16384 layers expected, found {number}")), "{error}");
        }
    }

    #[test]
    fn the_two_shapes_are_not_mixed() {
        let now = serde_json::to_value(spec(vec![layer(); 2])).unwrap();
        for key in ["norm", "positions", "attention", "block", "ffn"] {
            let mut both = now.clone();
            both[key] = former()[key].clone();
            assert!(error(&both).contains(&format!("{key}: expected inside a list")), "{key}");
            let mut missing = former();
            missing.as_object_mut().unwrap().remove(key);
            assert!(error(&missing).contains(&format!("{key}: expected where layers is a number")), "{key}");
        }
        assert!(error(&with(now.clone(), "/final_norm", json!(true))).contains("final_norm: expected a norm or null"));
        assert!(error(&with(former(), "/final_norm", Value::Null)).contains("final_norm: expected true or false"));
        let mut both = former();
        both["learned_positions"] = json!({"offset": 2});
        assert!(error(&both).contains("learned_positions: expected none"));
        let twisted = with(now, "/layers/0/attention/qk_norm", json!(true));
        assert!(error(&twisted).contains("invalid type: boolean"), "{}", error(&twisted));
    }

    #[test]
    fn a_layer_that_differs_in_what_all_share_is_named() {
        let mut other = layer();
        other.ffn_mut().size = 6;
        let mismatch = spec(vec![layer(), layer(), other]).check_shared().unwrap_err();
        assert_eq!((mismatch.layer, mismatch.what), (2, "ffn.size"));
        assert!(mismatch.to_string().starts_with("layer 2: ffn.size is 6, and 5 in layer 0"), "{mismatch}");
        let mut other = layer();
        other.attention.kv_heads = 4;
        assert_eq!(spec(vec![layer(), other]).check_shared().unwrap_err().what, "attention.kv_heads");
        let own = LayerSpec { positions: Positions::Alibi, block: Block::PostNorm, ..layer() };
        assert_eq!(spec(vec![layer(), own]).check_shared(), Ok(()));
    }
}
