//! How weights are to be stored: the options that every command that writes a bundle has.

use clap::Args;
use flashlm_formats::weight_format::{ResidentFormats, WeightFormat};

/// Formats of the weights.
#[derive(Args, Clone, Copy, Debug, Default)]
pub(crate) struct FormatArgs {
    /// Store FFN neurons as int8 or int4, with /N in groups of N weights (else 32) that share a scale [default: as the checkpoint has them]
    #[arg(long, value_name = "FORMAT", value_parser = quantised)]
    pub(crate) dtype: Option<WeightFormat>,
    /// Store attention as int8 or int4, likewise, and the embedding and the head as int8
    #[arg(long, value_name = "FORMAT", value_parser = quantised)]
    pub(crate) resident_dtype: Option<WeightFormat>,
    /// Store the embedding and the head as int8 or int4, likewise [default: int8 with --resident-dtype, else as the checkpoint has them]
    #[arg(long, value_name = "FORMAT", value_parser = quantised)]
    pub(crate) embedding_dtype: Option<WeightFormat>,
}

impl FormatArgs {
    pub(crate) fn resident(self) -> ResidentFormats {
        ResidentFormats::new(self.resident_dtype, self.embedding_dtype)
    }
}

fn quantised(text: &str) -> Result<WeightFormat, String> {
    match text.parse::<WeightFormat>() {
        Ok(format) if format.is_quantised() => Ok(format),
        _ => {
            Err("expected int8 or int4, or one of them with /N: groups of N weights, a power of two from 32 to 2^20; \
                  without the option weights stay as the checkpoint has them"
                .into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_numbers_can_be_asked_for() {
        assert_eq!(quantised("int8"), Ok(WeightFormat::INT8));
        assert_eq!(quantised("int4/64").unwrap().to_string(), "int4/64");
        for wrong in ["f16", "int2", "int8/33", ""] {
            assert!(quantised(wrong).is_err(), "{wrong}");
        }
    }
}
