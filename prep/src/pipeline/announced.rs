//! What a preparation will take, as announced before the long work.

use std::fmt::{self, Display, Formatter};

use flashlm::budget::human_bytes;

/// What a preparation will take.
#[derive(Clone, Debug)]
pub struct Estimate {
    /// The model's family.
    pub family: String,
    /// Bytes of its weights.
    pub model_bytes: u64,
    /// Bytes that will be written for the bundle.
    pub bundle_bytes: u64,
    /// Bytes of scratch files at most.
    pub scratch_bytes: u64,
    /// Bytes of those that are there already.
    pub here_bytes: u64,
    /// Bytes of memory at least.
    pub memory_bytes: u64,
    /// Seconds of computing, roughly.
    pub seconds: f64,
    /// Minutes that the model may write for besides, if it has to.
    pub writing_minutes: Option<u64>,
}

impl Display for Estimate {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "preparing a model of family {}, {}, takes", self.family, human_bytes(self.model_bytes))?;
        write!(f, "  time    about {} of computing", duration(self.seconds))?;
        if let Some(minutes) = self.writing_minutes {
            write!(f, ", up to {minutes} minutes for calibration text")?;
        }
        let [bundle, scratch] = [self.bundle_bytes, self.scratch_bytes].map(human_bytes);
        write!(f, "\n  disk    {bundle} for the bundle, up to {scratch} of scratch files")?;
        if self.here_bytes > 0 {
            write!(f, " ({} are there)", human_bytes(self.here_bytes))?;
        }
        write!(f, "\n  memory  {} at least", human_bytes(self.memory_bytes))
    }
}

/// A time that is not known to the second.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 1.5 => "a second".into(),
        s if s < 90.0 => format!("{s:.0} seconds"),
        s if s < 5400.0 => format!("{:.0} minutes", s / 60.0),
        s => format!("{:.1} hours", s / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_said_as_finely_as_they_are_known() {
        assert_eq!([0.2, 5.0, 90.0, 7200.0].map(duration), ["a second", "5 seconds", "2 minutes", "2.0 hours"]);
    }
}
