//! Layers of one model may differ: each is computed as its own spec says, compared with plain arithmetic.

use std::collections::HashMap;

use flashlm::options::FfnChoice;
use flashlm_formats::bundle::{Bundle, BundlePlan, BundleWriter, Extras, LayoutOptions, Provenance};
use flashlm_formats::ids::NeuronId;
use flashlm_formats::model::{
    Activation, Attention, Block, DType, FeedForward, Ffn, LayerSpec, ModelSpec, Norm, NormKind, Positions,
};
use flashlm_formats::weight_format::ResidentFormats;
use flashlm_tests::{largest_difference, loaded, logits, options, scratch};

const HIDDEN: usize = 16;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 4;
const NEURONS: usize = 8;
const VOCAB: usize = 32;

const LAYER_NORM: Norm = Norm { kind: NormKind::LayerNorm, eps: 1e-5, weight: true, bias: true };
const RMS_NORM: Norm = Norm { kind: NormKind::RmsNorm, eps: 1e-2, weight: true, bias: false };

fn layer(norm: Norm, block: Block, positions: Positions, qk_norm: Option<Norm>, bias: bool) -> LayerSpec {
    let ffn = Ffn {
        size: NEURONS,
        activation: Activation::Relu,
        gated: false,
        up_activated: false,
        gate_bias: false,
        up_bias: bias,
        down_bias: bias,
    };
    LayerSpec {
        norm,
        block,
        attention: Attention {
            heads: HEADS,
            kv_heads: KV_HEADS,
            head_dim: DIM,
            qkv_bias: bias,
            out_bias: bias,
            qk_norm,
        },
        positions,
        feed_forward: FeedForward::Dense(ffn),
    }
}

/// No two layers are alike.
fn spec() -> ModelSpec {
    let rotary = |dims, theta| Positions::Rotary { dims, theta, scaling: None };
    let bare = Norm { weight: false, bias: false, ..LAYER_NORM };
    ModelSpec {
        family: "mixed".into(),
        vocab_size: VOCAB,
        hidden_size: HIDDEN,
        embed_size: HIDDEN,
        max_positions: 64,
        learned_positions: None,
        layers: vec![
            layer(LAYER_NORM, Block::PreNorm, rotary(4, 1e4), None, true),
            layer(RMS_NORM, Block::PreNorm, Positions::None, Some(Norm { eps: 0.5, ..RMS_NORM }), false),
            layer(LAYER_NORM, Block::ParallelTwoNorms, rotary(2, 50.0), Some(LAYER_NORM), true),
            layer(bare, Block::PostNorm, Positions::Alibi, None, false),
            layer(RMS_NORM, Block::ParallelOneNorm, rotary(4, 1e4), Some(bare), true),
        ],
        final_norm: Some(RMS_NORM),
        tied_head: true,
        head_bias: false,
        bos: None,
        eos: vec![],
        thresholds: vec![],
    }
}

/// Tensors by name; those of the FFN are `up` (rows) and `down` (columns), a row for each neuron.
struct Weights(HashMap<String, Vec<f32>>);

impl Weights {
    fn new(spec: &ModelSpec) -> Self {
        let mut state = 7u64;
        let mut values = |count: usize| -> Vec<f32> {
            let next = || {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
            };
            std::iter::repeat_with(next).take(count).collect()
        };
        let mut all: HashMap<_, _> = spec
            .resident_tensors()
            .into_iter()
            .map(|tensor| (tensor.name, values(tensor.shape.iter().product())))
            .collect();
        // Around 1, so that what a norm gives is not small.
        let gains = all.iter_mut().filter(|(name, _)| name.ends_with("norm.weight"));
        gains.for_each(|(_, gains)| gains.iter_mut().for_each(|gain| *gain += 1.0));
        for layer in 0..spec.layers.len() {
            all.insert(format!("layers.{layer}.up"), values(NEURONS * HIDDEN));
            all.insert(format!("layers.{layer}.down"), values(NEURONS * HIDDEN));
        }
        Self(all)
    }

    fn get(&self, name: &str) -> Option<&[f32]> {
        self.0.get(name).map(Vec::as_slice)
    }

    /// `W x + b`.
    fn linear(&self, weight: &str, bias: &str, x: &[f64]) -> Vec<f64> {
        let rows = self.0[weight].chunks_exact(x.len());
        let products = rows.map(|row| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum::<f64>());
        let bias = self.get(bias);
        products.enumerate().map(|(at, y)| y + bias.map_or(0.0, |bias| f64::from(bias[at]))).collect()
    }

    fn norm(&self, norm: &Norm, name: &str, x: &[f64]) -> Vec<f64> {
        let n = x.len() as f64;
        let mean = if norm.kind == NormKind::LayerNorm { x.iter().sum::<f64>() / n } else { 0.0 };
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
        let (weight, bias) = (self.get(&format!("{name}.weight")), self.get(&format!("{name}.bias")));
        assert_eq!((weight.is_some(), bias.is_some()), (norm.weight, norm.bias), "{name}");
        let of = |values: Option<&[f32]>, at: usize, absent| values.map_or(absent, |values| f64::from(values[at]));
        let scale = 1.0 / (variance + f64::from(norm.eps)).sqrt();
        x.iter().enumerate().map(|(at, x)| (x - mean) * scale * of(weight, at, 1.0) + of(bias, at, 0.0)).collect()
    }
}

/// Keys and values of a layer's tokens so far, `[token][kv head][dim]`.
#[derive(Default)]
struct Cache(Vec<(Vec<f64>, Vec<f64>)>);

fn attention(weights: &Weights, number: usize, layer: &LayerSpec, x: &[f64], cache: &mut Cache) -> Vec<f64> {
    let (p, position) = (format!("layers.{number}.attention"), cache.0.len());
    let mut qkv = weights.linear(&format!("{p}.qkv.weight"), &format!("{p}.qkv.bias"), x);
    for (head, values) in qkv.chunks_exact_mut(DIM).take(HEADS + KV_HEADS).enumerate() {
        if let Some(norm) = &layer.attention.qk_norm {
            let which = if head < HEADS { "q_norm" } else { "k_norm" };
            values.copy_from_slice(&weights.norm(norm, &format!("{p}.{which}"), values));
        }
        if let Positions::Rotary { dims, theta, .. } = layer.positions {
            for i in 0..dims / 2 {
                let angle = position as f64 / f64::from(theta).powf(2.0 * i as f64 / dims as f64);
                let (a, b) = (values[i], values[i + dims / 2]);
                values[i] = a * angle.cos() - b * angle.sin();
                values[i + dims / 2] = b * angle.cos() + a * angle.sin();
            }
        }
    }
    let (queries, rest) = qkv.split_at(HEADS * DIM);
    let (keys, values) = rest.split_at(KV_HEADS * DIM);
    cache.0.push((keys.to_vec(), values.to_vec()));
    let mut attended = vec![0.0; HEADS * DIM];
    for (head, query) in queries.chunks_exact(DIM).enumerate() {
        let kv = head / (HEADS / KV_HEADS) * DIM;
        let score = |(at, (keys, _)): (usize, &(Vec<f64>, Vec<f64>))| {
            let product: f64 = query.iter().zip(&keys[kv..kv + DIM]).map(|(q, k)| q * k).sum();
            // The slopes of four heads are powers of 4.
            let bias =
                if layer.positions == Positions::Alibi { at as f64 * 0.25f64.powi(head as i32 + 1) } else { 0.0 };
            ((product + bias) / (DIM as f64).sqrt()).exp()
        };
        let scores: Vec<f64> = cache.0.iter().enumerate().map(score).collect();
        let total: f64 = scores.iter().sum();
        for (score, (_, values)) in scores.iter().zip(&cache.0) {
            for (i, value) in values[kv..kv + DIM].iter().enumerate() {
                attended[head * DIM + i] += score / total * value;
            }
        }
    }
    weights.linear(&format!("{p}.out.weight"), &format!("{p}.out.bias"), &attended)
}

fn feed_forward(weights: &Weights, number: usize, x: &[f64]) -> Vec<f64> {
    let p = format!("layers.{number}");
    let up = weights.linear(&format!("{p}.up"), &format!("{p}.ffn.up_bias"), x);
    let mut out = vec![0.0; HIDDEN];
    for (neuron, column) in up.iter().zip(weights.0[&format!("{p}.down")].chunks_exact(HIDDEN)) {
        out.iter_mut().zip(column).for_each(|(out, w)| *out += neuron.max(0.0) * f64::from(*w));
    }
    if let Some(bias) = weights.get(&format!("{p}.ffn.down_bias")) {
        out.iter_mut().zip(bias).for_each(|(out, bias)| *out += f64::from(*bias));
    }
    out
}

/// The logits of every token, `[token, vocab]`.
fn by_plain_arithmetic(spec: &ModelSpec, weights: &Weights, ids: &[u32]) -> Vec<f32> {
    let mut caches: Vec<Cache> = spec.layers.iter().map(|_| Cache::default()).collect();
    let mut logits = Vec::new();
    for id in ids {
        let row = &weights.0["embed.tokens"][*id as usize * HIDDEN..][..HIDDEN];
        let mut x: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
        let add = |x: &mut Vec<f64>, y: &[f64]| x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
        for (number, (layer, cache)) in spec.layers.iter().zip(&mut caches).enumerate() {
            let norm = |which: &str, x: &[f64]| weights.norm(&layer.norm, &format!("layers.{number}.{which}"), x);
            match layer.block {
                Block::PreNorm => {
                    let attended = attention(weights, number, layer, &norm("attention_norm", &x), cache);
                    add(&mut x, &attended);
                    let fed = feed_forward(weights, number, &norm("ffn_norm", &x));
                    add(&mut x, &fed);
                }
                Block::PostNorm => {
                    let attended = attention(weights, number, layer, &x, cache);
                    add(&mut x, &attended);
                    x = norm("attention_norm", &x);
                    let fed = feed_forward(weights, number, &x);
                    add(&mut x, &fed);
                    x = norm("ffn_norm", &x);
                }
                Block::ParallelOneNorm | Block::ParallelTwoNorms => {
                    let which = if layer.block.has_ffn_norm() { "ffn_norm" } else { "attention_norm" };
                    let attended = attention(weights, number, layer, &norm("attention_norm", &x), cache);
                    let fed = feed_forward(weights, number, &norm(which, &x));
                    add(&mut x, &attended);
                    add(&mut x, &fed);
                }
            }
        }
        let x = weights.norm(&spec.final_norm.expect("it has one"), "final_norm", &x);
        logits.extend(weights.linear("embed.tokens", "", &x).into_iter().map(|logit| logit as f32));
    }
    logits
}

fn write(spec: &ModelSpec, weights: &Weights, path: &std::path::Path) -> Bundle {
    let tensors = spec.resident_tensors();
    let plan = BundlePlan {
        model: spec.clone(),
        model_bytes: 1 << 16,
        resident_dtypes: vec![DType::F32; tensors.len()],
        resident: ResidentFormats::default(),
        ffn_dtype: DType::F32.into(),
        layout: LayoutOptions::default(),
        order: "checkpoint".into(),
        tokenizer: b"{}".to_vec(),
    };
    let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let mut writer = BundleWriter::create(path, plan, false).unwrap();
    tensors.iter().for_each(|tensor| writer.resident(&bytes(&weights.0[&tensor.name])).unwrap());
    let layout = *writer.layout();
    for layer in 0..spec.layers.len() {
        let mut groups = vec![0; layout.layer_bytes()];
        for (vector, name) in ["up", "down"].into_iter().enumerate() {
            for (neuron, row) in weights.0[&format!("layers.{layer}.{name}")].chunks_exact(HIDDEN).enumerate() {
                let at = layout.vector_offset(neuron, vector);
                groups[at..at + layout.row_bytes()].copy_from_slice(&bytes(row));
            }
        }
        writer.begin_layer((0..NEURONS as u32).map(NeuronId).collect()).unwrap();
        writer.groups(&groups).unwrap();
    }
    let provenance = Provenance {
        tool: "tests".into(),
        tool_version: "1".into(),
        source_format: "safetensors".into(),
        files: vec![],
        content_hash: "0123456789abcdef".into(),
    };
    writer.finish(Extras { provenance, ..Extras::default() }).unwrap();
    Bundle::open(path).unwrap()
}

#[test]
fn layers_that_differ_are_each_computed_as_they_say() {
    let (dir, spec) = (scratch(), spec());
    let weights = Weights::new(&spec);
    let bundle = write(&spec, &weights, &dir.path().join("mixed.flashlm"));
    assert_eq!(bundle.spec(), &spec);
    let ids: Vec<u32> = (0..24).map(|i| (i * 11 + 3) % VOCAB as u32).collect();
    let expected = by_plain_arithmetic(&spec, &weights, &ids);
    let resident = logits(&mut loaded(&bundle, &options(ids.len(), FfnChoice::Resident)), &ids);
    let difference = largest_difference(&resident, &expected);
    assert!(difference < 1e-4, "{difference:e}");
    for choice in [FfnChoice::Streamed, FfnChoice::Flash] {
        assert!(logits(&mut loaded(&bundle, &options(ids.len(), choice)), &ids) == resident, "{choice:?}");
    }
    // Each difference between layers is one that the logits show.
    let changes: [fn(&mut ModelSpec); 6] = [
        |spec| spec.layers[0].positions = spec.layers[2].positions,
        |spec| spec.layers[1].positions = spec.layers[0].positions,
        |spec| spec.layers[1].attention.qk_norm = Some(RMS_NORM),
        |spec| spec.layers[2].norm.eps = 0.5,
        |spec| spec.layers[3].positions = Positions::None,
        |spec| spec.final_norm = Some(Norm { eps: 0.5, ..RMS_NORM }),
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let mut other = spec.clone();
        change(&mut other);
        let found = by_plain_arithmetic(&other, &weights, &ids);
        assert!(largest_difference(&found, &expected) > 1e-3, "change {number} is not seen");
    }
}
