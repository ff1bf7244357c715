//! What is supported and how that was verified, for `flashlm-prep families` and the README.

use serde::Serialize;

/// A family, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct FamilyInfo {
    /// Its name.
    pub name: &'static str,
    /// Values of `model_type` in config.json that are understood.
    pub model_types: &'static [&'static str],
    /// Published checkpoints of the kind.
    pub checkpoints: &'static str,
    /// What of the architecture is covered.
    pub covers: &'static str,
    /// What was tried, and against what.
    pub verified: &'static str,
    /// Miniature checkpoints in `tests/fixtures/quirks` whose logits and greedy ids are compared with a reference, in every
    /// way of running them.
    pub references: usize,
}

/// Every family that can be read.
pub const FAMILY_INFOS: &[FamilyInfo] = &[
    FamilyInfo {
        name: "opt",
        model_types: &["opt"],
        checkpoints: "facebook/opt-125m .. 66b, Galactica",
        covers: "pre- and post-norm, projected embeddings, without biases, untied head",
        verified: "transformers; a trained model besides",
        references: 5,
    },
    FamilyInfo {
        name: "falcon",
        model_types: &["falcon", "RefinedWebModel", "RefinedWeb"],
        checkpoints: "tiiuae/falcon-7b, -40b, -11b, -rw; relufied ones are the sparse ones",
        covers: "multi-query, grouped, ALiBi, one or two norms, names from before transformers knew it",
        verified: "transformers; a trained model besides",
        references: 10,
    },
    FamilyInfo {
        name: "llama",
        model_types: &["llama", "mistral", "qwen2", "sparsellama", "bamboo"],
        checkpoints: "SparseLLM/ReluLLaMA-*, prosparse-llama-2-*, PowerInfer/Bamboo-*, TurboSparse-Mistral-*; Llama, Mistral, Qwen2",
        covers: "gated FFN; relu, relu2, FATReLU, ReLU on gate and up, silu; grouped queries, head_dim, biases, llama3 and linear \
                 rope scaling; a sliding window limits the context",
        verified: "transformers, for ProSparse and Bamboo its Llama and Mistral with the published FFN put in",
        references: 9,
    },
    FamilyInfo {
        name: "persimmon",
        model_types: &["persimmon"],
        checkpoints: "adept/persimmon-8b-*",
        covers: "squared ReLU, query and key norms, partial rotation",
        verified: "transformers",
        references: 2,
    },
    FamilyInfo {
        name: "phi",
        model_types: &["phi", "phi-msft"],
        checkpoints: "microsoft/phi-1, phi-1_5, phi-2 and relufied ones",
        covers: "parallel block with one norm, partial rotation, head bias, names from before transformers knew it",
        verified: "transformers; phi-msft by the same weights under the old names",
        references: 2,
    },
    FamilyInfo {
        name: "gpt_neox",
        model_types: &["gpt_neox"],
        checkpoints: "EleutherAI/pythia-*, gpt-neox-20b and relufied ones",
        covers: "parallel and sequential blocks, partial rotation, with and without attention biases",
        verified: "transformers",
        references: 2,
    },
];
