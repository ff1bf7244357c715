//! The text that weights are rounded for: the option that `convert` and `pack` have.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, ensure};
use clap::Args;
use flashlm::text::Tokenizer;
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::recording::HELD_OUT;
use flashlm_prep::record::Calibration;
use flashlm_prep::record::text::Sampling;
use flashlm_prep::rounding::{ROUNDING_TOKENS, Rounded, RoundedFormats, round_for};

use super::formats::FormatArgs;
use super::{Stage, documents, say_notes, threads};

/// Sequences of the text, and the order of its documents.
const SEQUENCE_TOKENS: usize = 512;
const SEED: u64 = 1;

/// Text to round for.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct CalibrateArgs {
    /// Round the weights that --dtype and --resident-dtype quantise for the inputs that they get on this text: files (.txt, .jsonl) or
    /// directories of them
    #[arg(long, value_name = "TEXT", num_args = 1..)]
    pub(crate) calibrate: Vec<PathBuf>,
}

impl CalibrateArgs {
    /// The weights, rounded for the text's inputs where there is a text; without, what that costs is said.
    pub(crate) fn rounded(
        &self,
        checkpoint: &Checkpoint,
        tokenizer: &[u8],
        formats: FormatArgs,
        output: &Path,
    ) -> Result<Option<Arc<Rounded>>> {
        let formats = RoundedFormats { ffn: formats.dtype, attention: formats.resident_dtype };
        let is_any = formats.ffn.is_some() || formats.attention.is_some();
        if self.calibrate.is_empty() {
            if is_any {
                eprintln!(
                    "note: each weight is rounded for itself; --calibrate TEXT rounds for the inputs that occur, which loses less"
                );
            }
            return Ok(None);
        }
        ensure!(
            is_any,
            "--calibrate is for weights that are quantised: expected --dtype or --resident-dtype beside it"
        );
        let sampling =
            Sampling { tokens: ROUNDING_TOKENS, sequence_tokens: SEQUENCE_TOKENS, seed: SEED, held_out: HELD_OUT };
        let tokenizer = Tokenizer::from_json(tokenizer)?;
        let calibration = Calibration::new(&documents(&self.calibrate)?, &tokenizer, checkpoint.spec(), sampling)?;
        say_notes(&calibration.notes);
        let stage = Stage::share("rounding for the text's inputs");
        let dir = output.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let progress = &mut |done, total| stage.set(done, total);
        let rounded = round_for(checkpoint, &calibration, formats, &threads(None)?, dir, progress)?;
        Ok(Some(Arc::new(rounded)))
    }
}
