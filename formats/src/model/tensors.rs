//! The canonical names and shapes of the tensors that stay in memory.

use super::layer::{LayerSpec, Norm};
use super::spec::ModelSpec;

/// A tensor that stays in memory: canonical name and shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResidentTensor {
    /// Canonical name, such as `layers.3.attention.qkv.weight`.
    pub name: String,
    /// Shape; matrices are `[outputs, inputs]`.
    pub shape: Vec<usize>,
}

impl ModelSpec {
    /// Every resident tensor of the model, in the order in which a bundle holds them.
    ///
    /// FFN projections are not among them: they are the flash section's neuron records. The FFN's `gate_bias` and `up_bias`
    /// are, and are in storage order like everything in a bundle that has one entry per neuron.
    pub fn resident_tensors(&self) -> Vec<ResidentTensor> {
        let (hidden, mut list) = (self.hidden_size, List(Vec::new()));
        list.add("embed.tokens", &[self.vocab_size, self.embed_size]);
        if let Some(positions) = self.learned_positions {
            list.add("embed.positions", &[self.max_positions + positions.offset, hidden]);
        }
        if self.embed_size != hidden {
            list.add("embed.project_in", &[hidden, self.embed_size]);
        }
        for (number, layer) in self.layers.iter().enumerate() {
            list.add_layer(number, layer, hidden);
        }
        if let Some(norm) = &self.final_norm {
            list.add_norm(norm, "final_norm", hidden);
        }
        if self.embed_size != hidden {
            list.add("embed.project_out", &[self.embed_size, hidden]);
        }
        if !self.tied_head {
            list.add("head.weight", &[self.vocab_size, self.embed_size]);
        }
        if self.head_bias {
            list.add("head.bias", &[self.vocab_size]);
        }
        list.0
    }
}

struct List(Vec<ResidentTensor>);

impl List {
    fn add(&mut self, name: impl Into<String>, shape: &[usize]) {
        self.0.push(ResidentTensor { name: name.into(), shape: shape.to_vec() });
    }

    fn add_norm(&mut self, norm: &Norm, name: &str, width: usize) {
        if norm.weight {
            self.add(format!("{name}.weight"), &[width]);
        }
        if norm.bias {
            self.add(format!("{name}.bias"), &[width]);
        }
    }

    fn add_layer(&mut self, number: usize, layer: &LayerSpec, hidden: usize) {
        let (attention, ffn, p) = (&layer.attention, layer.ffn(), format!("layers.{number}"));
        self.add_norm(&layer.norm, &format!("{p}.attention_norm"), hidden);
        self.add(format!("{p}.attention.qkv.weight"), &[attention.qkv_size(), hidden]);
        if attention.qkv_bias {
            self.add(format!("{p}.attention.qkv.bias"), &[attention.qkv_size()]);
        }
        if let Some(norm) = &attention.qk_norm {
            self.add_norm(norm, &format!("{p}.attention.q_norm"), attention.head_dim);
            self.add_norm(norm, &format!("{p}.attention.k_norm"), attention.head_dim);
        }
        self.add(format!("{p}.attention.out.weight"), &[hidden, attention.heads * attention.head_dim]);
        if attention.out_bias {
            self.add(format!("{p}.attention.out.bias"), &[hidden]);
        }
        if layer.block.has_ffn_norm() {
            self.add_norm(&layer.norm, &format!("{p}.ffn_norm"), hidden);
        }
        if ffn.gate_bias {
            self.add(format!("{p}.ffn.gate_bias"), &[ffn.size]);
        }
        if ffn.up_bias {
            self.add(format!("{p}.ffn.up_bias"), &[ffn.size]);
        }
        if ffn.down_bias {
            self.add(format!("{p}.ffn.down_bias"), &[hidden]);
        }
    }
}
