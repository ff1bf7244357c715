//! What a checkpoint of a given configuration holds, for those who make one: the reader's plan, inverted.

use std::collections::BTreeMap;
use std::path::Path;

use super::CheckpointError;
use super::families::{self, Admitted, Config};
use super::plan::Plan;
use crate::model::ModelSpec;

/// A tensor under the name that the family's files give it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublishedTensor {
    /// Name, such as `model.decoder.layers.3.fc1.weight`.
    pub name: String,
    /// Shape; matrices are `[outputs, inputs]`.
    pub shape: Vec<usize>,
}

/// The architecture that a `config.json` describes, and every tensor such a checkpoint holds, sorted by name.
///
/// # Errors
/// What is wrong with the configuration.
pub fn published_tensors(config: &[u8]) -> Result<(ModelSpec, Vec<PublishedTensor>), CheckpointError> {
    let path = Path::new("config.json");
    let config = Config::parse(config).map_err(|reason| CheckpointError::Json { path: path.to_owned(), reason })?;
    let wrong = |source| CheckpointError::Config { path: path.to_owned(), source: Box::new(source) };
    let Admitted { family, config, .. } = families::admit(config).map_err(wrong)?;
    let spec = (family.spec)(&config).map_err(wrong)?;
    let mut plan = Plan::default();
    (family.plan)(&spec, &config, family.prefixes[0], &mut plan).map_err(wrong)?;
    // A stored tensor may be several parts; each names the whole of it.
    let tensors: BTreeMap<_, _> = plan.parts().map(|part| (part.source.to_string(), part.shape.clone())).collect();
    Ok((spec, tensors.into_iter().map(|(name, shape)| PublishedTensor { name, shape }).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fused_tensor_is_listed_once_and_whole() {
        let config = br#"{"model_type":"falcon","hidden_size":128,"num_attention_heads":4,"num_kv_heads":2,
            "num_hidden_layers":1,"new_decoder_architecture":true,"vocab_size":64}"#;
        let (_, tensors) = published_tensors(config).unwrap();
        let fused: Vec<_> = tensors.iter().filter(|t| t.name.contains("query_key_value")).collect();
        assert_eq!(fused.len(), 1);
        assert_eq!(fused[0].name, "transformer.h.0.self_attention.query_key_value.weight");
        assert_eq!(fused[0].shape, [(4 + 2 * 2) * 32, 128]);
    }

    #[test]
    fn a_wrong_configuration_is_an_error() {
        assert!(matches!(published_tensors(b"["), Err(CheckpointError::Json { .. })));
        assert!(matches!(published_tensors(br#"{"model_type":"none"}"#), Err(CheckpointError::Config { .. })));
    }
}
