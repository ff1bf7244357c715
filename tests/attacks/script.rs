//! Models that write what they are told: each token is followed by one other.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use flashlm_tests::{pack_checkpoint, scratch};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;
use tempfile::TempDir;

/// Llama's decoder.
pub(crate) const LLAMA: &str = r#"{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"▁"},"content":" "},
    {"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]}"#;
/// GPT-2's.
pub(crate) const BYTE_LEVEL: &str =
    r#"{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true}"#;

const HIDDEN: usize = 64;

/// A bundle of a Llama of one layer that does nothing, so that the head sees the last token only.
pub(crate) struct Script {
    dir: TempDir,
    ids: HashMap<String, u32>,
}

impl Script {
    /// The tokens of `chain` follow each other, and what follows the last is decided by `</s>`, the end.
    pub(crate) fn new(decoder: &str, chain: &[&str]) -> Self {
        Self::with(decoder, chain, None)
    }

    /// As [`Script::new`], with an element of a token's row of the head.
    pub(crate) fn with(decoder: &str, chain: &[&str], odd: Option<(&str, f32)>) -> Self {
        let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>", "<|im_end|>"].map(String::from).into();
        for token in ["▁once", "▁upon", "▁a", "▁time", "▁there"].iter().chain(chain) {
            if !tokens.iter().any(|t| t == token) {
                tokens.push((*token).into());
            }
        }
        let ids: HashMap<_, _> = tokens.iter().cloned().zip(0..).collect();
        let mut dice = crate::Dice(11);
        let embed: Vec<f32> = (0..tokens.len() * HIDDEN).map(|_| dice.below(2) as f32 * 2.0 - 1.0).collect();
        let row = |token: &str| ids[token] as usize * HIDDEN..(ids[token] as usize + 1) * HIDDEN;
        let mut head = vec![0.0_f32; embed.len()];
        for pair in chain.windows(2) {
            let from = &embed[row(pair[0])];
            head[row(pair[1])].iter_mut().zip(from).for_each(|(h, e)| *h += e);
        }
        if let Some((token, value)) = odd {
            head[row(token).start] = value;
        }
        let dir = scratch();
        let square = (vec![HIDDEN, HIDDEN], vec![0.0; HIDDEN * HIDDEN]);
        let (wide, tall) = ((vec![32, HIDDEN], vec![0.0; 32 * HIDDEN]), (vec![HIDDEN, 32], vec![0.0; 32 * HIDDEN]));
        let (norm, table) = ((vec![HIDDEN], vec![1.0; HIDDEN]), vec![tokens.len(), HIDDEN]);
        let layer = |name: &str| format!("model.layers.0.{name}.weight");
        let tensors = [
            ("model.embed_tokens.weight".to_owned(), (table.clone(), embed.clone())),
            ("lm_head.weight".into(), (table, head.clone())),
            ("model.norm.weight".into(), norm.clone()),
            (layer("input_layernorm"), norm.clone()),
            (layer("post_attention_layernorm"), norm),
            (layer("self_attn.q_proj"), square.clone()),
            (layer("self_attn.k_proj"), square.clone()),
            (layer("self_attn.v_proj"), square.clone()),
            (layer("self_attn.o_proj"), square),
            (layer("mlp.gate_proj"), wide.clone()),
            (layer("mlp.up_proj"), wide),
            (layer("mlp.down_proj"), tall),
        ]
        .map(|(name, (shape, values))| (name, shape, values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>()));
        let views = tensors
            .iter()
            .map(|(name, shape, bytes)| (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
        fs::write(dir.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": 32,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": tokens.len(),
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "hidden_act": "relu", "bos_token_id": 1, "eos_token_id": 2,
            "tie_word_embeddings": false, "torch_dtype": "float32",
        });
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let special = |id: usize, content: &str| {
            json!({ "id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false })
        };
        let tokenizer = json!({
            "version": "1.0",
            "added_tokens": [special(1, "<s>"), special(2, "</s>"), special(3, "<|im_end|>")],
            "pre_tokenizer": { "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true },
            "decoder": serde_json::from_str::<serde_json::Value>(decoder).unwrap(),
            "model": { "type": "WordLevel", "vocab": ids, "unk_token": "<unk>" },
        });
        fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let script = Self { dir, ids };
        pack_checkpoint(script.dir.path(), &script.bundle());
        script
    }

    pub(crate) fn bundle(&self) -> PathBuf {
        self.dir.path().join("script.flashlm")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn id(&self, token: &str) -> u32 {
        self.ids[token]
    }
}
