//! The manifest: what a bundle holds and where it came from, as JSON.
//!
//! It knows no offsets: those are in the header and the index. Whatever differs between kinds of checkpoint file of the same
//! model stands under `provenance`, and nothing anywhere depends on when or where a bundle was made.

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use super::layout::FlashLayout;
use crate::chat::{Chat, SamplingDefaults};
use crate::model::ModelSpec;
use crate::weight_format::{ResidentFormats, WeightFormat};

/// What a bundle holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The architecture.
    pub model: ModelSpec,
    /// Stored bytes of the source's tensors, tied ones once. Memory budgets in percent are of this number.
    pub model_bytes: u64,
    /// How the FFN's weights are stored.
    pub ffn: FfnStorage,
    /// How resident matrices are stored.
    #[serde(default, skip_serializing_if = "ResidentFormats::is_plain")]
    pub resident: ResidentFormats,
    /// Keys or values of the model may be larger than f16 holds: they are kept in f32 unless the user asks for something else.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub wide_kv: bool,
    /// The predictors, if there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predictors: Option<PredictorInfo>,
    /// Measured sparsity, one entry for each layer, if it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sparsity: Option<Vec<LayerSparsity>>,
    /// Who says which special tokens surround a text.
    #[serde(default, skip_serializing_if = "SpecialTokens::is_architecture")]
    pub special_tokens: SpecialTokens,
    /// How a conversation becomes text, if the publisher says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat: Option<Chat>,
    /// How tokens are to be chosen where the user says nothing.
    #[serde(default, skip_serializing_if = "SamplingDefaults::is_empty")]
    pub sampling: SamplingDefaults,
    /// Where the bundle came from.
    pub provenance: Provenance,
}

/// Who says which special tokens surround a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpecialTokens {
    /// `ModelSpec::bos`, in front of every text; the tokenizer's post-processor is not followed. Older bundles say nothing and mean this.
    #[default]
    Architecture,
    /// The tokenizer's post-processor, and nothing else.
    Tokenizer,
}

impl SpecialTokens {
    fn is_architecture(&self) -> bool {
        *self == Self::Architecture
    }
}

/// How neuron records are stored. Sizes in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FfnStorage {
    /// How every row is stored.
    pub dtype: WeightFormat,
    /// Length of a record.
    pub record_bytes: u64,
    /// Records of a full group.
    pub records_per_group: u64,
    /// Length of a group, padding included.
    pub group_bytes: u64,
    /// What a group's length and place are multiples of.
    pub alignment: u64,
    /// Bytes of the flash section that hold no weights.
    pub padding_bytes: u64,
    /// Name of the strategy that chose the storage orders; `checkpoint` is the source's own order.
    pub order: String,
}

impl FfnStorage {
    /// The description of `layers` layers of `layout`.
    pub(super) fn new(layout: &FlashLayout, layers: usize, dtype: WeightFormat, order: String) -> Self {
        Self {
            dtype,
            record_bytes: layout.record_bytes() as u64,
            records_per_group: layout.records_per_group() as u64,
            group_bytes: layout.group_bytes() as u64,
            alignment: layout.alignment() as u64,
            padding_bytes: layout.layer_padding_bytes() as u64 * layers as u64,
            order,
        }
    }
}

/// What the predictors section holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PredictorInfo {
    /// The kind of predictor.
    pub kind: PredictorKind,
    /// One entry for each layer.
    pub layers: Vec<LayerPredictor>,
}

/// The kind of predictor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PredictorKind {
    /// Two linear maps through a narrow middle.
    LowRank,
    /// Likewise, with a ReLU in the middle of the layers that have a tensor `encoder_relu`.
    LowRankRelu,
}

/// A tensor of a predictor in which only some neurons have rows: their numbers, ascending. The others are never predicted.
pub const PREDICTOR_ROWS: &str = "rows";

/// The predictor of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerPredictor {
    /// Width of the middle; of a quantised projection, which has none, the width of the inputs.
    pub rank: usize,
    /// Element type of its matrices.
    pub dtype: PredictorDType,
    /// Rows of its decoder, where only the neurons that were ever seen active have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<usize>,
    /// Width of the middle of the predictor that sees this layer's input and speaks of the next layer's neurons, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub look_ahead_rank: Option<usize>,
}

/// Element type of a predictor's matrices. Biases and scales are f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PredictorDType {
    /// Half precision.
    F16,
    /// Bytes, with one scale for each row.
    Int8,
    /// Half bytes, with one bf16 scale for each [`PredictorDType::INT4_GROUP`] elements of a row. Only of a quantised projection: a
    /// predictor without an encoder, whose decoder sees the inputs themselves.
    Int4,
}

/// A safetensors type that no predictor's matrix has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{found}, expected F16, I8, or U8 without an encoder")]
pub struct NotAPredictor {
    /// The type.
    pub found: Dtype,
}

impl TryFrom<Dtype> for PredictorDType {
    type Error = NotAPredictor;

    fn try_from(dtype: Dtype) -> Result<Self, NotAPredictor> {
        match dtype {
            Dtype::F16 => Ok(Self::F16),
            Dtype::I8 => Ok(Self::Int8),
            Dtype::U8 => Ok(Self::Int4),
            found => Err(NotAPredictor { found }),
        }
    }
}

impl PredictorDType {
    /// Elements of a row that share a scale in [`PredictorDType::Int4`].
    pub const INT4_GROUP: usize = 64;

    /// The name used in files and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        }
    }
}

/// Measured sparsity of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerSparsity {
    /// Share of neurons that are active for a token, 0 to 1, mean over the measured tokens.
    pub active: f32,
    /// Share of neurons that the predictor chooses, likewise, if that was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted: Option<f32>,
    /// Share of the active neurons that the predictor does not choose, likewise, if that was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missed: Option<f32>,
    /// Tokens after which a use counts half in the neuron cache that suits the layer, if that was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub half_life: Option<u32>,
    /// What a token misses with neuron caches of several sizes, the smallest first; empty if that was not measured.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reuse: Vec<ReusePoint>,
}

/// What a token misses of one layer with a neuron cache of one size, means over the measured tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReusePoint {
    /// Groups that the cache holds.
    pub slots: u32,
    /// Wanted groups that it does not hold.
    pub missed: f32,
    /// Runs of neighbours that they form in storage order: the requests there are where no gap is read through.
    pub runs: f32,
}

/// Where a bundle came from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// Name of the program that wrote the bundle.
    pub tool: String,
    /// Its version.
    pub tool_version: String,
    /// Kind of the source, such as `safetensors` or `torch`.
    pub source_format: String,
    /// The source's files.
    pub files: Vec<SourceFile>,
    /// Hash of the source's tensors, independent of the kind of file, order and layout; 16 hexadecimal digits.
    pub content_hash: String,
}

/// A file that a bundle was made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceFile {
    /// Name without directories.
    pub name: String,
    /// Length.
    pub bytes: u64,
}
