//! The published models whose shape can be synthesized, and their `config.json`.

use serde_json::{Value, json};

use super::SynthesizeError;

/// A model family, as far as its configuration goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    Opt { embed_size: usize, pre_norm: bool },
    Falcon { kv_heads: Option<usize> },
}

/// The shape of a published model.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Name of the published model.
    pub name: &'static str,
    /// Layers it has.
    pub layers: usize,
    hidden_size: usize,
    heads: usize,
    pub(crate) family: Family,
}

const fn opt(name: &'static str, hidden_size: usize, layers: usize, heads: usize) -> Geometry {
    Geometry { name, layers, hidden_size, heads, family: Family::Opt { embed_size: hidden_size, pre_norm: true } }
}

const fn falcon(
    name: &'static str,
    hidden_size: usize,
    layers: usize,
    heads: usize,
    kv_heads: Option<usize>,
) -> Geometry {
    Geometry { name, layers, hidden_size, heads, family: Family::Falcon { kv_heads } }
}

/// Every geometry there is.
pub const GEOMETRIES: &[Geometry] = &[
    opt("opt-125m", 768, 12, 12),
    Geometry { family: Family::Opt { embed_size: 512, pre_norm: false }, ..opt("opt-350m", 1024, 24, 16) },
    opt("opt-1.3b", 2048, 24, 32),
    opt("opt-2.7b", 2560, 32, 32),
    opt("opt-6.7b", 4096, 32, 32),
    opt("opt-13b", 5120, 40, 40),
    opt("opt-30b", 7168, 48, 56),
    falcon("falcon-7b", 4544, 32, 71, None),
    falcon("falcon-40b", 8192, 60, 128, Some(8)),
];

impl Geometry {
    /// The geometry called `name`.
    ///
    /// # Errors
    /// `UnknownGeometry`, which lists them.
    pub fn find(name: &str) -> Result<&'static Geometry, SynthesizeError> {
        let found = GEOMETRIES.iter().find(|geometry| geometry.name == name);
        found.ok_or_else(|| SynthesizeError::UnknownGeometry { name: name.to_owned() })
    }

    /// `config.json` with the published values, of this many layers.
    pub(crate) fn config(&self, layers: usize) -> Value {
        match self.family {
            Family::Opt { embed_size, pre_norm } => json!({
                "_remove_final_layer_norm": false,
                "activation_dropout": 0.0,
                "activation_function": "relu",
                "architectures": ["OPTForCausalLM"],
                "attention_dropout": 0.0,
                "bos_token_id": 2,
                "do_layer_norm_before": pre_norm,
                "dropout": 0.1,
                "eos_token_id": 2,
                "ffn_dim": 4 * self.hidden_size,
                "hidden_size": self.hidden_size,
                "init_std": 0.02,
                "layerdrop": 0.0,
                "max_position_embeddings": 2048,
                "model_type": "opt",
                "num_attention_heads": self.heads,
                "num_hidden_layers": layers,
                "pad_token_id": 1,
                "prefix": "</s>",
                "torch_dtype": "float16",
                "use_cache": true,
                "vocab_size": 50272,
                "word_embed_proj_dim": embed_size,
            }),
            Family::Falcon { kv_heads } => {
                let mut config = json!({
                    "alibi": false,
                    "apply_residual_connection_post_layernorm": false,
                    "architectures": ["FalconForCausalLM"],
                    "attention_dropout": 0.0,
                    "bias": false,
                    "bos_token_id": 11,
                    "eos_token_id": 11,
                    "hidden_dropout": 0.0,
                    "hidden_size": self.hidden_size,
                    "initializer_range": 0.02,
                    "layer_norm_epsilon": 1e-5,
                    "model_type": "falcon",
                    "multi_query": true,
                    "new_decoder_architecture": kv_heads.is_some(),
                    "num_attention_heads": self.heads,
                    "num_hidden_layers": layers,
                    "parallel_attn": true,
                    "torch_dtype": "bfloat16",
                    "use_cache": true,
                    "vocab_size": 65024,
                });
                if let Some(kv_heads) = kv_heads {
                    config["num_kv_heads"] = kv_heads.into();
                }
                config
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use flashlm_formats::checkpoint::published_tensors;
    use flashlm_formats::model::{Activation, Block};

    use super::*;

    #[test]
    fn every_geometry_is_the_published_one() {
        // Name, hidden, ffn, layers, heads, heads for keys, width of the embedding, millions of parameters (tied ones once).
        let published = [
            ("opt-125m", 768, 3072, 12, 12, 12, 768, 125.2),
            ("opt-350m", 1024, 4096, 24, 16, 16, 512, 331.2),
            ("opt-1.3b", 2048, 8192, 24, 32, 32, 2048, 1_315.8),
            ("opt-2.7b", 2560, 10240, 32, 32, 32, 2560, 2_651.6),
            ("opt-6.7b", 4096, 16384, 32, 32, 32, 4096, 6_658.5),
            ("opt-13b", 5120, 20480, 40, 40, 40, 5120, 12_853.5),
            ("opt-30b", 7168, 28672, 48, 56, 56, 7168, 29_974.5),
            ("falcon-7b", 4544, 18176, 32, 71, 1, 4544, 6_921.7),
            ("falcon-40b", 8192, 32768, 60, 128, 8, 8192, 41_303.3),
        ];
        assert_eq!(published.map(|row| row.0).to_vec(), GEOMETRIES.iter().map(|g| g.name).collect::<Vec<_>>());
        for (name, hidden, ffn, layers, heads, kv_heads, embed, millions) in published {
            let geometry = Geometry::find(name).unwrap();
            let config = geometry.config(geometry.layers).to_string();
            let (spec, tensors) = published_tensors(config.as_bytes()).unwrap();
            let found = (
                spec.hidden_size,
                spec.ffn().size,
                spec.layers.len(),
                spec.attention().heads,
                spec.attention().kv_heads,
            );
            assert_eq!(found, (hidden, ffn, layers, heads, kv_heads), "{name}");
            assert_eq!((spec.embed_size, spec.max_positions), (embed, 2048), "{name}");
            let parameters: usize = tensors.iter().map(|t| t.shape.iter().product::<usize>()).sum();
            let off = parameters as f64 / (millions * 1e6) - 1.0;
            assert!(off.abs() < 0.01, "{name}: {parameters} parameters, {millions} million published");
        }
    }

    #[test]
    fn families_differ_where_the_published_models_do() {
        let spec =
            |name: &str| published_tensors(Geometry::find(name).unwrap().config(1).to_string().as_bytes()).unwrap().0;
        let blocks = ["opt-125m", "opt-350m", "falcon-7b", "falcon-40b"].map(|name| spec(name).layers[0].block);
        assert_eq!(blocks, [Block::PreNorm, Block::PostNorm, Block::ParallelOneNorm, Block::ParallelTwoNorms]);
        assert_eq!([spec("opt-6.7b").bos, spec("falcon-7b").bos], [Some(2), None]);
        assert_eq!(spec("opt-6.7b").ffn().activation, Activation::Relu);
        assert!(matches!(Geometry::find("gpt-2"), Err(SynthesizeError::UnknownGeometry { .. })));
    }
}
