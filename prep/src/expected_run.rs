//! The run that a bundle is prepared for, before anything is known about the machine: what it leaves for predictors and cached neurons,
//! and what its reads cost.

use flashlm::disk_cost::ReadCost;
use flashlm_formats::model::{DType, ModelSpec, ResidentTensor};
use flashlm_formats::weight_format::{ResidentFormats, WeightFormat};

/// Tokens of context that the KV cache is counted for.
const CONTEXT: usize = 512;
/// What predictors are taken to have, as a share of the 16-bit FFN, where they are not known.
pub const PREDICTOR_SHARE: f64 = 0.05;
/// The least share of a layer's neurons that a cache is taken to hold: with less it is none.
const LEAST: f64 = 0.1;
/// The most that orders are made for: with more there is little left to read.
const MOST: f64 = 0.5;

/// The run that a bundle is prepared for.
#[derive(Clone, Copy, Debug)]
pub struct ExpectedRun {
    /// Memory, as a share of the model's 16-bit size, as `--memory 50%` says it.
    pub memory: f64,
    /// How neurons are stored.
    pub ffn: WeightFormat,
    /// How resident matrices are.
    pub resident: ResidentFormats,
    /// What reads cost.
    pub cost: ReadCost,
}

impl ExpectedRun {
    /// Memory, where nothing else is asked for.
    pub const MEMORY: f64 = 0.5;

    /// In half of the model's size, all other weights in 16 bits, from a usual disk.
    pub fn new(ffn: WeightFormat) -> Self {
        Self { memory: Self::MEMORY, ffn, resident: ResidentFormats::default(), cost: ReadCost::USUAL }
    }

    /// The bytes that embeddings, attention and a KV cache leave for predictors and cached neurons: at least a tenth of the neurons beside
    /// the predictors.
    pub fn room(&self, spec: &ModelSpec) -> f64 {
        self.left(spec).max(LEAST * self.neurons(spec) + PREDICTOR_SHARE * 2.0 * weights(spec))
    }

    /// The share of its neurons that a layer has in memory beside the predictors: between 10 and 50 %.
    pub fn cache_share(&self, spec: &ModelSpec) -> f64 {
        let cached = self.left(spec) - PREDICTOR_SHARE * 2.0 * weights(spec);
        (cached / self.neurons(spec).max(1.0)).clamp(LEAST, MOST)
    }

    fn left(&self, spec: &ModelSpec) -> f64 {
        let tensors = spec.resident_tensors();
        let elements = |shape: &[usize]| shape.iter().product::<usize>() as f64;
        let row = |shape: &[usize]| shape.last().copied().unwrap_or(1);
        let row_bytes = |t: &ResidentTensor| t.format(DType::F16, self.resident).row_bytes(row(&t.shape)) as f64;
        let held: f64 = tensors.iter().map(|t| elements(&t.shape) / row(&t.shape) as f64 * row_bytes(t)).sum();
        let attention = spec.attention();
        let context = CONTEXT.min(spec.max_positions);
        let kv = (2 * attention.kv_heads * attention.head_dim * spec.layers.len() * context * 2) as f64;
        let whole = 2.0 * (weights(spec) + tensors.iter().map(|t| elements(&t.shape)).sum::<f64>());
        self.memory * whole - held - kv
    }

    /// Bytes of all neurons.
    fn neurons(&self, spec: &ModelSpec) -> f64 {
        weights(spec) / spec.hidden_size as f64 * self.ffn.row_bytes(spec.hidden_size) as f64
    }
}

/// Weights of all neurons.
fn weights(spec: &ModelSpec) -> f64 {
    (spec.ffn().vectors() * spec.ffn().size * spec.layers.len() * spec.hidden_size) as f64
}

/// The shape of OPT-6.7B.
#[cfg(test)]
pub(crate) fn opt_6_7b() -> ModelSpec {
    use flashlm_formats::model::*;
    let norm = Norm { kind: NormKind::LayerNorm, eps: 1e-5, weight: true, bias: true };
    let layer = LayerSpec {
        norm,
        block: Block::PreNorm,
        attention: Attention { heads: 32, kv_heads: 32, head_dim: 128, qkv_bias: true, out_bias: true, qk_norm: None },
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
    ModelSpec {
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
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flashlm_formats::model::*;

    #[test]
    fn half_of_a_large_model_leaves_a_sixth_of_its_neurons() {
        let opt_6_7b = opt_6_7b();
        let run =
            |ffn, resident| ExpectedRun { resident: ResidentFormats::all(Some(resident)), ..ExpectedRun::new(ffn) };
        let share = |ffn, resident| run(ffn, resident).cache_share(&opt_6_7b);
        let sixteen = WeightFormat::Plain(DType::F16);
        assert!((0.12..0.16).contains(&share(sixteen, sixteen)), "{}", share(sixteen, sixteen));
        assert!(share(WeightFormat::INT8, sixteen) > 0.25, "of smaller neurons more");
        assert_eq!(share(sixteen, WeightFormat::Plain(DType::F32)), LEAST);
        let more = ExpectedRun { memory: 0.7, ..run(sixteen, sixteen) };
        assert!((0.4..0.5).contains(&more.cache_share(&opt_6_7b)), "{}", more.cache_share(&opt_6_7b));
        // Predictors and that cache are what there is room for.
        let (room, ffn) = (more.room(&opt_6_7b), 2.0 * 32.0 * 2.0 * 4096.0 * 16_384.0);
        assert!((room / ffn - PREDICTOR_SHARE - more.cache_share(&opt_6_7b)).abs() < 1e-9);
        assert!((ExpectedRun { memory: 0.1, ..more }.room(&opt_6_7b) / ffn - LEAST - PREDICTOR_SHARE).abs() < 1e-9);
        let mut small = opt_6_7b.clone();
        small.vocab_size = 10;
        let attention = Attention { heads: 1, kv_heads: 1, head_dim: 1, ..*small.attention() };
        small.layers.iter_mut().for_each(|layer| layer.attention = attention);
        assert_eq!(ExpectedRun::new(WeightFormat::INT8).cache_share(&small), MOST);
    }
}
