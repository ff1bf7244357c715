//! Whether a model's keys and values always fit half precision, by its weights alone.
//!
//! What enters a block's attention comes from a norm: `n * w + b`, where `n` is at most `sqrt(hidden)` long. So a key or value
//! is at most `|row * w| sqrt(hidden) + |row . b + bias|`, whatever the text. Where a model goes without that norm (the first block
//! of a post-norm model) nothing is known, and the runtime's own check is all there is.

use flashlm::tensors::element;
use flashlm_formats::model::{Block, DType, LayerSpec, ModelSpec, Positions};
use flashlm_kernels::to_f32;
use rayon::prelude::*;

/// The largest number in f16 is 65504; rows that are quantised may become somewhat longer.
const LIMIT: f64 = 50_000.0;

/// Adds up bounds while a model's tensors pass by.
pub(crate) struct KvRange<'a> {
    spec: &'a ModelSpec,
    /// The norm in front of the current layer's attention.
    before: Norm,
    /// The norm after the layer before, if that is a post-norm one.
    behind: Option<Norm>,
    /// Of the current layer's keys and values: the longest that the row can make the product, and what is always added.
    rows: Vec<(f64, f64)>,
    /// Norm of key heads, in models that have it.
    key_norm: Norm,
    largest: f64,
}

#[derive(Clone, Default)]
struct Norm {
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl<'a> KvRange<'a> {
    pub(crate) fn new(spec: &'a ModelSpec) -> Self {
        let (before, key_norm) = (Norm::default(), Norm::default());
        Self { spec, before, behind: None, rows: Vec::new(), key_norm, largest: 0.0 }
    }

    /// Looks at a tensor. To be called with every resident tensor in the order in which a bundle holds them.
    pub(crate) fn see(&mut self, name: &str, dtype: DType, bytes: &[u8]) {
        let Some((number, name)) = name.strip_prefix("layers.").and_then(|name| name.split_once('.')) else { return };
        let Some(layer) = number.parse().ok().and_then(|number: usize| self.spec.layers.get(number)) else { return };
        match name {
            "attention_norm.weight" => self.before.weight = floats(dtype, bytes),
            "attention_norm.bias" => self.before.bias = floats(dtype, bytes),
            "ffn_norm.weight" => self.behind.iter_mut().for_each(|norm| norm.weight = floats(dtype, bytes)),
            "ffn_norm.bias" => self.behind.iter_mut().for_each(|norm| norm.bias = floats(dtype, bytes)),
            "attention.qkv.weight" => self.rows = self.products(layer, dtype, bytes),
            "attention.qkv.bias" => {
                let queries = layer.attention.heads * layer.attention.head_dim;
                let biases = floats(dtype, bytes);
                self.rows.iter_mut().zip(&biases[queries..]).for_each(|(row, bias)| row.1 += f64::from(*bias));
            }
            "attention.k_norm.weight" => self.key_norm.weight = floats(dtype, bytes),
            "attention.k_norm.bias" => self.key_norm.bias = floats(dtype, bytes),
            // After all that matters of its layer.
            "attention.out.weight" => self.close_layer(layer),
            _ => {}
        }
    }

    /// Whether a key or value may be larger than f16 holds.
    pub(crate) fn is_wide(&self) -> bool {
        self.largest > LIMIT
    }

    fn products(&self, layer: &LayerSpec, dtype: DType, bytes: &[u8]) -> Vec<(f64, f64)> {
        // What enters a post-norm layer is what the layer before gave.
        let norm = if layer.block == Block::PostNorm { self.behind.as_ref() } else { Some(&self.before) };
        let Some(norm) = norm else { return Vec::new() };
        let (hidden, attention) = (self.spec.hidden_size, &layer.attention);
        let row_bytes = hidden * dtype.bytes();
        let of_keys_and_values = &bytes[attention.heads * attention.head_dim * row_bytes..];
        let long = (hidden as f64).sqrt();
        let bound = |row: &mut Vec<f32>, bytes: &[u8]| {
            row.resize(hidden, 0.0);
            to_f32(element(dtype), bytes, row);
            let squares =
                row.iter().enumerate().map(|(i, r)| f64::from(r * norm.weight.get(i).unwrap_or(&1.0)).powi(2));
            let offset = row.iter().zip(&norm.bias).map(|(r, b)| f64::from(*r) * f64::from(*b)).sum::<f64>();
            (squares.sum::<f64>().sqrt() * long, offset)
        };
        of_keys_and_values.par_chunks_exact(row_bytes).map_init(Vec::new, bound).collect()
    }

    fn close_layer(&mut self, layer: &LayerSpec) {
        let (attention, key_norm) = (&layer.attention, std::mem::take(&mut self.key_norm));
        let key_rows = attention.kv_heads * attention.head_dim;
        // Turning a pair of elements can make one as long as both.
        let turned = if matches!(layer.positions, Positions::Rotary { .. }) { 2f64.sqrt() } else { 1.0 };
        for (number, (product, offset)) in self.rows.drain(..).enumerate() {
            let (is_key, mut bound) = (number < key_rows, product + offset.abs());
            if is_key && attention.qk_norm.is_some() {
                let of = |values: &[f32], absent: f32| {
                    f64::from(values.get(number % attention.head_dim).map_or(absent, |v| v.abs()))
                };
                let longest = (attention.head_dim as f64).sqrt();
                bound = longest * of(&key_norm.weight, 1.0) + of(&key_norm.bias, 0.0);
            }
            self.largest = self.largest.max(bound * if is_key { turned } else { 1.0 });
        }
        self.before = Norm::default();
        self.behind = (layer.block == Block::PostNorm).then(Norm::default);
    }
}

fn floats(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; bytes.len() / dtype.bytes()];
    to_f32(element(dtype), bytes, &mut values);
    values
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use flashlm_formats::checkpoint::Checkpoint;
    use flashlm_kernels::{layer_norm, rms_norm};

    use super::*;

    fn quirks() -> Vec<Checkpoint> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("tests/fixtures/quirks");
        let dirs = dir.read_dir().unwrap().map(|entry| entry.unwrap().path());
        dirs.filter(|dir| dir.join("model.safetensors").exists()).map(|dir| Checkpoint::open(dir).unwrap()).collect()
    }

    /// The largest key or value before it is turned, of vectors that went through the first norm, and the bound.
    fn found_and_bound(checkpoint: &Checkpoint) -> (f64, f64) {
        let spec = checkpoint.spec();
        let (mut range, mut bytes) = (KvRange::new(spec), Vec::new());
        let mut norm = Norm::default();
        let mut found = 0f64;
        for tensor in spec.resident_tensors().iter().filter(|t| t.name.starts_with("layers.0.")) {
            let dtype = checkpoint.resident(&tensor.name).unwrap().dtype;
            checkpoint.read_resident(&tensor.name, &mut bytes).unwrap();
            range.see(&tensor.name, dtype, &bytes);
            match tensor.name.as_str() {
                "layers.0.attention_norm.weight" => norm.weight = floats(dtype, &bytes),
                "layers.0.attention_norm.bias" => norm.bias = floats(dtype, &bytes),
                "layers.0.attention.qkv.weight" => {
                    let weights = floats(dtype, &bytes);
                    let skipped = spec.attention().heads * spec.attention().head_dim;
                    for (at, row) in weights.chunks_exact(spec.hidden_size).enumerate().skip(skipped) {
                        // The worst input of a row is the row itself.
                        let mut normed = vec![0.0; spec.hidden_size];
                        let (weight, bias) = (some(&norm.weight), some(&norm.bias));
                        match spec.layers[0].norm.kind {
                            flashlm_formats::model::NormKind::LayerNorm => {
                                layer_norm(row, weight, bias, 1e-12, &mut normed)
                            }
                            flashlm_formats::model::NormKind::RmsNorm => rms_norm(row, weight, 1e-12, &mut normed),
                        }
                        let product: f32 = row.iter().zip(&normed).map(|(a, b)| a * b).sum();
                        let is_key = at < skipped + spec.attention().kv_heads * spec.attention().head_dim;
                        if !(is_key && spec.attention().qk_norm.is_some()) {
                            found = found.max(f64::from(product.abs()));
                        }
                    }
                }
                _ => {}
            }
        }
        (found, range.largest)
    }

    fn some(values: &[f32]) -> Option<&[f32]> {
        (!values.is_empty()).then_some(values)
    }

    #[test]
    fn no_key_or_value_is_above_the_bound_and_the_bound_is_near() {
        let checkpoints = quirks();
        assert!(checkpoints.len() > 10);
        for checkpoint in
            checkpoints.iter().filter(|c| c.spec().layers[0].block != Block::PostNorm && !c.spec().attention().qkv_bias)
        {
            let (found, bound) = found_and_bound(checkpoint);
            assert!(found <= bound && bound < 20.0 * found, "{}: {found} {bound}", checkpoint.dir().display());
        }
    }
}
