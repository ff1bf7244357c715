//! How much of a layer a neuron cache is likely to hold, before anything is known about the machine.

use flashlm_formats::model::{DType, ModelSpec, ResidentTensor};
use flashlm_formats::weight_format::{ResidentFormats, WeightFormat};

/// Tokens of context that the KV cache is counted for.
const CONTEXT: usize = 512;
/// A cache of less is no cache, and with more there is little left to read.
const LEAST: f64 = 0.1;
const MOST: f64 = 0.5;

/// The share of its neurons that a layer has in memory where the budget is half of the model's 16-bit size (`--memory 50%`): what
/// embeddings, attention, a KV cache and predictors of `predictor_share` of the FFN leave. Between 10 and 50 %.
pub fn typical_cache_share(
    spec: &ModelSpec,
    ffn: WeightFormat,
    resident: ResidentFormats,
    predictor_share: f64,
) -> f64 {
    let tensors = spec.resident_tensors();
    let weights = |shape: &[usize]| shape.iter().product::<usize>() as f64;
    let row = |shape: &[usize]| shape.last().copied().unwrap_or(1);
    let row_bytes = |t: &ResidentTensor| t.format(DType::F16, resident).row_bytes(row(&t.shape)) as f64;
    let held: f64 = tensors.iter().map(|t| weights(&t.shape) / row(&t.shape) as f64 * row_bytes(t)).sum();
    let vectors = (spec.ffn().vectors() * spec.ffn().size * spec.layers.len()) as f64;
    let neurons = vectors * ffn.row_bytes(spec.hidden_size) as f64;
    let attention = spec.attention();
    let context = CONTEXT.min(spec.max_positions);
    let kv = (2 * attention.kv_heads * attention.head_dim * spec.layers.len() * context * 2) as f64;
    let ffn_16 = 2.0 * vectors * spec.hidden_size as f64;
    let half = 0.5 * (ffn_16 + 2.0 * tensors.iter().map(|t| weights(&t.shape)).sum::<f64>());
    ((half - held - kv - predictor_share * ffn_16) / neurons.max(1.0)).clamp(LEAST, MOST)
}

#[cfg(test)]
mod tests {
    use super::*;
    use flashlm_formats::model::*;

    #[test]
    fn half_of_a_large_model_leaves_a_sixth_of_its_neurons() {
        let norm = Norm { kind: NormKind::LayerNorm, eps: 1e-5, weight: true, bias: true };
        let layer = LayerSpec {
            norm,
            block: Block::PreNorm,
            attention: Attention {
                heads: 32,
                kv_heads: 32,
                head_dim: 128,
                qkv_bias: true,
                out_bias: true,
                qk_norm: None,
            },
            positions: Positions::None,
            feed_forward: FeedForward::Dense(Ffn {
                size: 16_384,
                activation: Activation::Relu,
                gated: false,
                up_activated: false,
                gate_bias: false,
                up_bias: true,
                down_bias: true,
            }),
        };
        let opt_6_7b = ModelSpec {
            family: "opt".into(),
            vocab_size: 50_272,
            hidden_size: 4096,
            embed_size: 4096,
            max_positions: 2048,
            learned_positions: Some(LearnedPositions { offset: 2 }),
            layers: vec![layer; 32],
            final_norm: Some(norm),
            tied_head: true,
            head_bias: false,
            bos: Some(2),
            eos: vec![2],
            thresholds: vec![],
        };
        let share = |ffn, resident| typical_cache_share(&opt_6_7b, ffn, ResidentFormats::all(Some(resident)), 0.03);
        let sixteen = WeightFormat::Plain(DType::F16);
        assert!((0.14..0.18).contains(&share(sixteen, sixteen)), "{}", share(sixteen, sixteen));
        assert!(share(WeightFormat::INT8, sixteen) > 0.25, "of smaller neurons more");
        assert_eq!(share(sixteen, WeightFormat::Plain(DType::F32)), LEAST);
        let mut small = opt_6_7b.clone();
        small.vocab_size = 10;
        let attention = Attention { heads: 1, kv_heads: 1, head_dim: 1, ..*small.attention() };
        small.layers.iter_mut().for_each(|layer| layer.attention = attention);
        assert_eq!(typical_cache_share(&small, WeightFormat::INT8, ResidentFormats::default(), 0.0), MOST);
    }
}
