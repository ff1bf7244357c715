//! What a file can be, other than what its name says.

/// A file that is not what its name promises, or a format that is not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Foreign {
    /// Nothing in it.
    Empty,
    /// A placeholder of git-lfs.
    GitLfsPointer,
    /// A web page.
    Html,
    /// PyTorch before 1.6: a bare pickle.
    LegacyTorch,
    /// A zip archive where none should be.
    Zip,
    /// safetensors where PyTorch's format should be.
    Safetensors,
    /// llama.cpp's format.
    Gguf,
    /// Keras / TensorFlow weights.
    TensorFlow,
    /// Flax weights.
    Flax,
    /// Original (not Hugging Face) PyTorch weights.
    OriginalTorch,
    /// Adapter weights only.
    Adapter,
    /// An exported graph.
    Onnx,
    /// Shards whose index is missing.
    ShardsWithoutIndex,
    /// Compressed.
    Gzip,
    /// Anything else.
    Unknown,
}

impl Foreign {
    /// What it is, for a sentence.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::GitLfsPointer => "a git-lfs pointer",
            Self::Html => "a web page",
            Self::LegacyTorch => "a PyTorch file from before version 1.6",
            Self::Zip => "a zip archive",
            Self::Safetensors => "safetensors",
            Self::Gguf => "GGUF",
            Self::TensorFlow => "TensorFlow weights",
            Self::Flax => "Flax weights",
            Self::OriginalTorch => "original PyTorch weights",
            Self::Adapter => "adapter weights",
            Self::Onnx => "ONNX",
            Self::ShardsWithoutIndex => "a shard without its index",
            Self::Gzip => "compressed",
            Self::Unknown => "of an unknown format",
        }
    }

    /// What to do about it.
    pub const fn hint(self) -> &'static str {
        match self {
            Self::Empty | Self::Unknown => "download it again",
            Self::GitLfsPointer => "the weights were not fetched; run `git lfs pull` in the directory",
            Self::Html => "the download saved an error or login page; download it again with access to the model",
            Self::LegacyTorch => "load it with PyTorch 1.6 or later and save it again with torch.save",
            Self::Zip => "unpack it, or rename it if it is a pytorch_model.bin",
            Self::Safetensors => "rename it to model.safetensors",
            Self::Gguf => "GGUF is not read; start from the original Hugging Face checkpoint",
            Self::TensorFlow => "load it in transformers with from_tf=True and save_pretrained",
            Self::Flax => "load it in transformers with from_flax=True and save_pretrained",
            Self::OriginalTorch => "convert it to Hugging Face format with the model's conversion script",
            Self::Adapter => "merge it into its base model (peft: merge_and_unload) and save_pretrained",
            Self::Onnx => "start from the original Hugging Face checkpoint",
            Self::ShardsWithoutIndex => {
                "download the index file (model.safetensors.index.json or pytorch_model.bin.index.json) too"
            }
            Self::Gzip => "decompress it first",
        }
    }
}
