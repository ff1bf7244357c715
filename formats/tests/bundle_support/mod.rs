//! Small bundles with known contents.

// Each test program uses its own part of this, and none of it is seen from outside.
#![allow(dead_code, unreachable_pub)]

pub mod lossy;

use std::path::Path;

use flashlm_formats::bundle::{
    BundlePlan, BundleWriter, Extras, FlashLayout, LayerPredictor, LayoutOptions, Manifest, PredictorDType,
    PredictorInfo, PredictorKind, Provenance, SourceFile, Storage,
};
use flashlm_formats::chat::{Chat, SamplingDefaults};
use flashlm_formats::ids::NeuronId;
use flashlm_formats::model::{
    Activation, Attention, Block, DType, FeedForward, Ffn, LayerSpec, LearnedPositions, ModelSpec, Norm, NormKind,
    Positions, RopeScaling,
};
use flashlm_formats::weight_format::{ResidentFormats, WeightFormat};

/// Bytes that look like nothing else: a fixed sequence for each seed.
pub fn ramp(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| ((seed * 131 + i * 7 + (i >> 8)) % 251) as u8 + 1).collect()
}

/// Scales that are like no other bytes: each is small and finite.
pub fn scales(count: usize) -> Vec<u8> {
    (0..count).flat_map(|i| [(i % 251) as u8, 0x3c]).collect()
}

/// A small model and how it is to be bundled.
pub struct Small {
    pub plan: BundlePlan,
}

impl Small {
    /// Two layers, FFN of two vectors, learned positions, all biases.
    pub fn opt() -> Self {
        let norm = Norm { kind: NormKind::LayerNorm, eps: 1e-5, weight: true, bias: true };
        let layer = LayerSpec {
            norm,
            block: Block::PreNorm,
            attention: Attention { heads: 2, kv_heads: 2, head_dim: 4, qkv_bias: true, out_bias: true, qk_norm: None },
            positions: Positions::None,
            feed_forward: FeedForward::Dense(Ffn {
                size: 37,
                activation: Activation::Relu,
                gated: false,
                up_activated: false,
                gate_bias: false,
                up_bias: true,
                down_bias: true,
            }),
        };
        let model = ModelSpec {
            family: "opt".into(),
            vocab_size: 11,
            hidden_size: 8,
            embed_size: 6,
            max_positions: 5,
            learned_positions: Some(LearnedPositions { offset: 2 }),
            layers: vec![layer; 2],
            final_norm: Some(norm),
            tied_head: true,
            head_bias: false,
            bos: Some(2),
            eos: vec![2],
            thresholds: vec![],
        };
        Self::new(model, DType::F16, LayoutOptions { alignment: 512, group_bytes: 300 })
    }

    /// The same with a second activation, a gate with bias, and a threshold: what format version 2 brought.
    pub fn gated_with_everything() -> Self {
        let gated = Self::gated();
        let mut model = gated.plan.model;
        let (activation, former) = (Activation::Relu, *model.ffn());
        *model.layers[0].ffn_mut() = Ffn { activation, up_activated: true, gate_bias: true, up_bias: true, ..former };
        model.thresholds = vec![0.25];
        Self::new(model, gated.plan.ffn_dtype, gated.plan.layout)
    }

    /// One layer, gated, rotary, a group for each neuron, nothing tied.
    pub fn gated() -> Self {
        let norm = Norm { kind: NormKind::RmsNorm, eps: 1e-6, weight: true, bias: false };
        let layer = LayerSpec {
            norm,
            block: Block::ParallelTwoNorms,
            attention: Attention {
                heads: 4,
                kv_heads: 2,
                head_dim: 6,
                qkv_bias: false,
                out_bias: false,
                qk_norm: Some(Norm { kind: NormKind::LayerNorm, bias: true, ..norm }),
            },
            positions: Positions::Rotary {
                dims: 4,
                theta: 10000.0,
                scaling: Some(RopeScaling::Llama3 {
                    factor: 8.0,
                    low_freq_factor: 1.0,
                    high_freq_factor: 4.0,
                    original_positions: 32,
                }),
            },
            feed_forward: FeedForward::Dense(Ffn {
                size: 5,
                activation: Activation::FatRelu(0.01),
                gated: true,
                up_activated: false,
                gate_bias: false,
                up_bias: false,
                down_bias: false,
            }),
        };
        let model = ModelSpec {
            family: "llama".into(),
            vocab_size: 7,
            hidden_size: 12,
            embed_size: 12,
            max_positions: 64,
            learned_positions: None,
            layers: vec![layer; 1],
            final_norm: Some(norm),
            tied_head: false,
            head_bias: true,
            bos: None,
            eos: vec![],
            thresholds: vec![],
        };
        Self::new(model, DType::F32, LayoutOptions { alignment: 8192, group_bytes: 1 })
    }

    /// The first with half bytes for the FFN and bytes for attention and embeddings.
    pub fn quantised() -> Self {
        let mut small = Self::opt();
        small.plan.model.hidden_size = 40;
        small.plan.model.layers.iter_mut().for_each(|layer| layer.attention.head_dim = 20);
        small.plan.ffn_dtype = "int4/32".parse().unwrap();
        small.plan.resident = ResidentFormats::all(Some("int8/64".parse().unwrap()));
        small
    }

    /// The gated one with three layers, of which the last differs from the others in all that it may.
    pub fn layered() -> Self {
        let gated = Self::gated();
        let mut model = gated.plan.model;
        let same = model.layers[0];
        let norm = Norm { kind: NormKind::LayerNorm, eps: 1e-3, weight: false, bias: true };
        let qk_norm = Some(Norm { kind: NormKind::RmsNorm, eps: 1e-2, weight: true, bias: false });
        let mut other = LayerSpec {
            norm,
            block: Block::PreNorm,
            attention: Attention { qkv_bias: true, out_bias: true, qk_norm, ..same.attention },
            positions: Positions::None,
            ..same
        };
        *other.ffn_mut() = Ffn { gate_bias: true, up_bias: true, down_bias: true, ..*same.ffn() };
        model.layers = vec![same, same, other];
        Self::new(model, gated.plan.ffn_dtype, gated.plan.layout)
    }

    pub fn all() -> [Self; 5] {
        [Self::opt(), Self::gated(), Self::gated_with_everything(), Self::quantised(), Self::layered()]
    }

    fn new(model: ModelSpec, ffn_dtype: impl Into<WeightFormat>, layout: LayoutOptions) -> Self {
        let dtypes = [DType::F16, DType::Bf16, DType::F32];
        let resident_dtypes = (0..model.resident_tensors().len()).map(|i| dtypes[i % 3]).collect();
        let plan = BundlePlan {
            model,
            model_bytes: 12345,
            resident_dtypes,
            resident: ResidentFormats::default(),
            ffn_dtype: ffn_dtype.into(),
            layout,
            order: "shuffled".into(),
            tokenizer: br#"{"version":"1.0","model":{}}"#.to_vec(),
        };
        Self { plan }
    }

    /// A fixed order that is neither the identity nor the same in each layer.
    pub fn order(&self, layer: usize) -> Vec<NeuronId> {
        let mut order: Vec<NeuronId> = (0..self.plan.model.ffn().size as u32).rev().map(NeuronId).collect();
        let by = (layer + 1) % order.len();
        order.rotate_left(by);
        order
    }

    /// The weights of one row.
    pub fn row(&self, layer: usize, neuron: NeuronId, vector: usize) -> Vec<u8> {
        let seed = (layer as u64 * 1000 + u64::from(neuron.0)) * 3 + vector as u64;
        ramp(seed + 77, self.plan.ffn_dtype.row_bytes(self.plan.model.hidden_size))
    }

    pub fn provenance(&self) -> Provenance {
        Provenance {
            tool: "tests".into(),
            tool_version: "1".into(),
            source_format: "safetensors".into(),
            files: vec![SourceFile { name: "model.safetensors".into(), bytes: 42 }],
            content_hash: "0123456789abcdef".into(),
        }
    }

    /// The description of predictors of `rank`.
    pub fn predictor_info(&self, rank: usize) -> PredictorInfo {
        let layer = LayerPredictor { rank, dtype: PredictorDType::F16, rows: None, look_ahead_rank: None };
        PredictorInfo { kind: PredictorKind::LowRank, layers: vec![layer; self.plan.model.layers.len()] }
    }

    /// What the publisher of some says of conversations.
    pub fn chat() -> (Option<Chat>, SamplingDefaults) {
        let texts =
            |pairs: &[(&str, &str)]| pairs.iter().map(|(name, text)| ((*name).into(), (*text).into())).collect();
        let templates =
            texts(&[("default", "{{ bos_token }}{{ messages[0].content }}\n"), ("tool_use", "{{ tools }}")]);
        let chat = Chat { templates, special_tokens: texts(&[("bos_token", "<s>")]) };
        let sampling = SamplingDefaults { temperature: Some(0.5), top_k: Some(20), ..SamplingDefaults::default() };
        (Some(chat), sampling)
    }

    /// Writes the bundle; `predictors` is a blob of any bytes.
    pub fn write(&self, path: &Path, predictors: Option<Vec<u8>>) -> Manifest {
        self.fill(BundleWriter::create(path, self.plan.clone(), false).unwrap(), predictors)
    }

    /// All groups of a layer.
    pub fn groups(&self, layout: &FlashLayout, layer: usize) -> Vec<u8> {
        let mut data = vec![0; layout.layer_bytes()];
        for (position, neuron) in self.order(layer).iter().enumerate() {
            for vector in 0..layout.vectors() {
                let at = layout.vector_offset(position, vector);
                data[at..at + layout.row_bytes()].copy_from_slice(&self.row(layer, *neuron, vector));
            }
        }
        data
    }

    /// Gives a writer everything.
    pub fn fill<S: Storage>(&self, mut writer: BundleWriter<S>, predictors: Option<Vec<u8>>) -> Manifest {
        let tensors = self.plan.model.resident_tensors();
        for (seed, (tensor, dtype)) in tensors.iter().zip(&self.plan.resident_dtypes).enumerate() {
            let format = tensor.format(*dtype, self.plan.resident);
            let (rows, cols) =
                (tensor.shape[..tensor.shape.len() - 1].iter().product::<usize>(), tensor.shape.last().unwrap());
            writer.resident(&ramp(seed as u64, rows * format.row_bytes(*cols))).unwrap();
            writer.resident(&scales(rows * format.scales(*cols))).unwrap();
        }
        let layout = *writer.layout();
        for layer in 0..self.plan.model.layers.len() {
            writer.begin_layer(self.order(layer)).unwrap();
            let groups = self.groups(&layout, layer);
            groups.chunks(3 * layout.group_bytes()).for_each(|groups| writer.groups(groups).unwrap());
            let model = &self.plan.model;
            writer
                .resident(&scales(
                    model.ffn().size * model.ffn().vectors() * self.plan.ffn_dtype.scales(model.hidden_size),
                ))
                .unwrap();
        }
        let predictors = predictors.map(|blob| (self.predictor_info(4), blob));
        // Some with, some without.
        let wide_kv = self.plan.model.ffn().gated;
        let (chat, sampling) = if wide_kv { Self::chat() } else { (None, SamplingDefaults::default()) };
        let provenance = self.provenance();
        writer.finish(Extras { predictors, wide_kv, chat, sampling, provenance, ..Extras::default() }).unwrap()
    }
}
