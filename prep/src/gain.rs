//! Whether there is anything to gain from reading only some neurons, in words: printed before the work, and again after it.

use std::path::Path;

use flashlm_formats::bundle::LayerSparsity;
use flashlm_formats::model::ModelSpec;

/// Where predictors admit more of the neurons than this, reading only these costs more than it saves: all of them, read in one
/// go, come faster, and nobody has to be asked.
pub const POINTLESS: f64 = 0.8;

/// From this mean share of active neurons on, reading only these gains too little.
pub const DENSE: f64 = 0.35;

/// The share of the neurons that are active, mean over layers.
pub fn active(sparsity: &[LayerSparsity]) -> f64 {
    sparsity.iter().map(|layer| f64::from(layer.active)).sum::<f64>() / sparsity.len().max(1) as f64
}

/// What a mean share of active neurons means for speed.
pub fn verdict(mean: f64) -> String {
    let percent = 100.0 * mean;
    let meaning = match mean {
        m if m <= 0.12 => "sparse: most of the feed-forward weights can stay on flash",
        m if m <= DENSE => "moderately sparse: expect a gain, but several times the reads of a sparse model",
        _ => {
            "not sparse: most neurons are needed for every token, so reading only the needed ones gains little; use a ReLU \
              (relufied) version of this model, or allow a larger loss (`prepare --quality-loss`)"
        }
    };
    format!("{percent:.1} % of the neurons are active on average. This model is {meaning}.")
}

/// What the activation says by itself: nothing of a model with exact zeros, which has to be recorded to know more.
pub fn dense_by_nature(spec: &ModelSpec) -> Option<String> {
    let name = spec.ffn().activation;
    (!name.is_sparse()).then(|| {
        format!(
            "no neuron of this model is ever exactly zero ({name}): what can be left out costs quality, and published models of \
             this kind need half of their neurons or more, so flash gains little; a relufied version gains much"
        )
    })
}

/// The share of the neurons that the predictors of a bundle admit, mean over layers, if that was measured.
pub fn admitted(sparsity: &[LayerSparsity]) -> Option<f64> {
    let shares = sparsity.iter().map(|layer| layer.predicted.map(f64::from)).collect::<Option<Vec<f64>>>()?;
    (!shares.is_empty()).then(|| shares.iter().sum::<f64>() / shares.len() as f64)
}

/// Says that predictors admit too much to be worth anything, and what to do instead.
pub fn pointless(admitted: f64, checkpoint: &Path, output: &Path) -> String {
    format!(
        "the predictors admit {:.0} % of the neurons, so a token would read nearly all of them, one by one: a bundle without \
         predictors is faster: flashlm-prep convert {} -o {}{}",
        100.0 * admitted,
        checkpoint.display(),
        output.display(),
        if output.exists() { " --force (which replaces the bundle that is there)" } else { "" }
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_name_what_is_better() {
        assert!(verdict(0.05).contains("is sparse") && verdict(0.2).contains("moderately"));
        assert!(verdict(0.6).contains("not sparse") && verdict(0.6).contains("--quality-loss"));
        let said = pointless(0.954, Path::new("/models/x"), Path::new("x.flashlm"));
        assert!(said.contains("95 %") && said.ends_with("flashlm-prep convert /models/x -o x.flashlm"), "{said}");
        // A bundle that is there is not replaced unasked.
        let there = tempfile::NamedTempFile::new().unwrap();
        let said = pointless(0.954, Path::new("/models/x"), there.path());
        assert!(said.contains(&format!("-o {} --force", there.path().display())), "{said}");
    }
}
