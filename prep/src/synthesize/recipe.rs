//! How each tensor is made: most are plain normal numbers, those that decide which neurons fire are shaped.
//!
//! Rows of shaped matrices have streams of their own, so that a bias can be computed from the row it belongs to without
//! keeping either.

use flashlm_formats::checkpoint::PublishedTensor;
use flashlm_formats::model::{Block, DType, ModelSpec};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::SeedableRng;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::SynthesizeOptions;
use super::random::{Normals, Table, from_f64, to_f64};
use super::shape::{CONSTANT, GROUP_SHARE, LayerShape, NOISE, Shape, stream_deviation};

/// Deviation of freshly initialised biases.
const SMALL: f64 = 0.02;
/// Deviation of the embeddings; after a norm in post-norm models, whose logits are not normed again.
const EMBEDDING: [f64; 2] = [0.25, 0.05];
/// What attention to a single token adds to the residual stream, in deviations of it. Random attention spreads over the
/// context and adds less the longer that is; were it more, tokens would resemble their neighbours.
const ATTENTION: f64 = 0.2;
/// Deviation of the logits.
const LOGITS: f64 = 1.5;

/// How a tensor is made.
#[derive(Clone, Debug)]
pub(super) enum Recipe {
    /// Normal numbers of this table.
    Normal(usize),
    /// These.
    Values(Vec<u16>),
    /// Rows that neurons are decided by.
    Up,
    /// Their thresholds.
    UpBias,
    /// Down projection: the second half of each row is the negative of the first.
    Down(usize),
}

/// The recipes of one model.
pub(super) struct Recipes {
    spec: ModelSpec,
    dtype: DType,
    seed: u64,
    /// Without biases in the feed-forward layers thresholds are carried by a constant coordinate.
    biases: bool,
    tables: Vec<(u64, u64, Table)>,
    normals: Normals,
    shape: Shape,
    layers: Vec<LayerShape>,
}

impl Recipes {
    pub(super) fn new(spec: ModelSpec, biases: bool, dtype: DType, options: SynthesizeOptions) -> Self {
        let layer = |layer| LayerShape::new(spec.ffn().size, layer, spec.layers.len(), options);
        Recipes {
            shape: Shape::new(spec.hidden_size, options.seed),
            layers: (0..spec.layers.len()).map(layer).collect(),
            normals: Normals::new(),
            tables: Vec::new(),
            seed: options.seed,
            biases,
            dtype,
            spec,
        }
    }

    /// How `tensor`, of layer `layer` if of any, is made.
    pub(super) fn recipe(&mut self, tensor: &PublishedTensor, layer: Option<usize>) -> Recipe {
        let post_norm = self.spec.layers[0].block == Block::PostNorm;
        let embedding = EMBEDDING[usize::from(post_norm)];
        let stream = match layer {
            Some(layer) if !post_norm => embedding * stream_deviation(layer),
            Some(layer) if layer > 0 => 1.0,
            _ => embedding,
        };
        let inputs = *tensor.shape.last().unwrap_or(&1) as f64;
        let is = |names: &[&str]| names.iter().any(|name| tensor.name.ends_with(name));
        let feeding = match self.spec.layers[0].block {
            Block::PreNorm => "final_layer_norm",
            Block::PostNorm => "self_attn_layer_norm",
            Block::ParallelTwoNorms => "ln_mlp",
            _ => "input_layernorm",
        };
        let feeds = layer.is_some() && tensor.name.contains(feeding);
        let gains = || self.shape.gains(self.spec.hidden_size, !self.biases);
        let bits = |values: Vec<f64>| Recipe::Values(values.into_iter().map(|v| from_f64(self.dtype, v)).collect());
        if feeds && is(&[".weight"]) {
            return bits(gains());
        }
        if feeds && is(&[".bias"]) && !self.biases {
            let mut values = vec![0.0; self.spec.hidden_size];
            values[self.shape.constant] = CONSTANT;
            return bits(values);
        }
        if post_norm && layer.is_some() && is(&["final_layer_norm.weight"]) {
            return bits(gains().into_iter().map(|gain| 1.0 / gain).collect());
        }
        if layer.is_some() && is(&["fc1.weight", "dense_h_to_4h.weight"]) {
            return Recipe::Up;
        }
        if layer.is_some() && is(&["fc1.bias"]) {
            return Recipe::UpBias;
        }
        if let (Some(layer), true) = (layer, is(&["fc2.weight", "dense_4h_to_h.weight"])) {
            // A post-norm layer adds to its own input, which has unit variance.
            let stream = if post_norm { 1.0 } else { stream };
            return Recipe::Down(self.table(0.0, stream * self.layers[layer].down_deviation));
        }
        let (mean, deviation) = if is(&["embed_positions.weight"]) {
            (0.0, embedding * 0.2)
        } else if is(&["embed_tokens.weight", "word_embeddings.weight"]) {
            (0.0, embedding)
        } else if is(&["out_proj.weight", "self_attention.dense.weight"]) {
            (0.0, ATTENTION * stream / inputs.sqrt())
        } else if tensor.shape.len() > 1 {
            (0.0, 1.0 / inputs.sqrt())
        } else if layer.is_none() && is(&[".weight"]) {
            (LOGITS / (embedding * inputs.sqrt()), 0.0)
        } else if is(&[".weight"]) {
            (1.0, SMALL)
        } else {
            (0.0, SMALL * stream)
        };
        Recipe::Normal(self.table(mean, deviation))
    }

    /// Layers repeat each other's distributions and need no more tables.
    fn table(&mut self, mean: f64, deviation: f64) -> usize {
        let key = (mean.to_bits(), deviation.to_bits());
        self.tables.iter().position(|t| (t.0, t.1) == key).unwrap_or_else(|| {
            self.tables.push((key.0, key.1, Table::new(self.dtype, mean, deviation)));
            self.tables.len() - 1
        })
    }

    /// Prepares what all layers draw from, when every recipe is known.
    pub(super) fn ready(&mut self) -> Ready<'_> {
        let up = self.table(0.0, 1.0 / (self.spec.hidden_size as f64).sqrt());
        Ready { recipes: self, up }
    }
}

/// Recipes that can be followed, by any number of threads.
pub(super) struct Ready<'a> {
    recipes: &'a Recipes,
    up: usize,
}

impl Ready<'_> {
    /// Elements of which a piece holds whole multiples.
    pub(super) fn row(recipe: &Recipe, tensor: &PublishedTensor) -> usize {
        match recipe {
            Recipe::Normal(_) => 1,
            Recipe::Values(_) | Recipe::UpBias => tensor.shape[0],
            Recipe::Up | Recipe::Down(_) => tensor.shape[1],
        }
    }

    /// Fills `out` with the piece of a tensor that begins with element `first`, the `number`-th one.
    pub(super) fn fill(
        &self,
        recipe: &Recipe,
        tensor: &PublishedTensor,
        layer: usize,
        (first, number): (u64, u64),
        out: &mut [u8],
    ) {
        let recipes = self.recipes;
        match recipe {
            Recipe::Normal(table) => recipes.tables[*table].2.fill(recipes.seed, &tensor.name, number, out),
            Recipe::Values(values) => put(values.iter().copied(), out),
            Recipe::UpBias => {
                let name = tensor.name.replace(".bias", ".weight");
                let biases = (0..tensor.shape[0]).map(|row| {
                    let (_, threshold) = self.latent(&name, layer, row);
                    from_f64(recipes.dtype, -threshold)
                });
                put(biases, out);
            }
            Recipe::Up => {
                let width = tensor.shape[1];
                for (index, row) in out.chunks_exact_mut(2 * width).enumerate() {
                    let number = first as usize / width + index;
                    recipes.tables[self.up].2.fill(recipes.seed, &tensor.name, number as u64, row);
                    let (latent, threshold) = self.latent(&tensor.name, layer, number);
                    let mut set = |at: usize, value| row[2 * at..2 * at + 2].copy_from_slice(&u16::to_le_bytes(value));
                    recipes.shape.latent.iter().zip(latent).for_each(|(&at, value)| set(at, value));
                    if !recipes.biases {
                        set(recipes.shape.constant, from_f64(recipes.dtype, -threshold / CONSTANT));
                    }
                }
            }
            Recipe::Down(table) => {
                let width = tensor.shape[1];
                for (index, row) in out.chunks_exact_mut(2 * width).enumerate() {
                    let number = first / width as u64 + index as u64;
                    let (half, other) = row.split_at_mut(width);
                    recipes.tables[*table].2.fill(recipes.seed, &tensor.name, number, half);
                    for (to, from) in other.chunks_exact_mut(2).zip(half.chunks_exact(2)) {
                        to.copy_from_slice(&[from[0], from[1] ^ 0x80]);
                    }
                }
            }
        }
    }

    /// A row's elements at the latent coordinates, and what its product with the input must exceed.
    fn latent(&self, name: &str, layer: usize, row: usize) -> (Vec<u16>, f64) {
        let recipes = self.recipes;
        let (shape, neurons) = (&recipes.shape, &recipes.layers[layer]);
        let key = xxh3_64_with_seed(name.as_bytes(), recipes.seed);
        let mut own = Xoshiro256PlusPlus::seed_from_u64(key ^ 0x006f_776e ^ ((row as u64 + 1) << 24));
        let mut group =
            Xoshiro256PlusPlus::seed_from_u64(key ^ 0x0067_726f_7570 ^ (u64::from(neurons.groups[row] + 1) << 40));
        let (mine, shared) = ((1.0 - GROUP_SHARE).sqrt(), GROUP_SHARE.sqrt());
        let scale = 1.0 / (recipes.spec.hidden_size as f64).sqrt();
        let bits: Vec<u16> = (0..shape.latent.len())
            .map(|_| scale * (mine * recipes.normals.next(&mut own) + shared * recipes.normals.next(&mut group)))
            .map(|value| from_f64(recipes.dtype, value))
            .collect();
        let squares: f64 = bits.iter().map(|&b| to_f64(recipes.dtype, b).powi(2)).sum();
        let deviation = (shape.latent_gain.powi(2) * squares + NOISE).sqrt();
        (bits, f64::from(neurons.thresholds[row]) * deviation)
    }
}

fn put(values: impl Iterator<Item = u16>, out: &mut [u8]) {
    for (to, value) in out.chunks_exact_mut(2).zip(values) {
        to.copy_from_slice(&value.to_le_bytes());
    }
}
