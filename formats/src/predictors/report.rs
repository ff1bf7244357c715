//! `predictors.json`: what is known of each layer's predictor; `training.json` and `timings.json` beside it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::training::{FitLog, SeedPoint};
use crate::bundle::PredictorDType;
use crate::destination::PREDICTORS_FORMAT;
use crate::publish::publish_bytes;
use crate::regular::read_regular;

/// Name of the file in a directory of predictors.
pub const PREDICTORS_JSON: &str = "predictors.json";
/// Longest file that is read; those of models with many layers have a few megabytes.
const BYTES_MAX: u64 = 256 << 20;

/// The whole of `predictors.json`. Later versions may say more, which is ignored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainReport {
    /// [`TrainReport::FORMAT`].
    pub format: String,
    /// [`TrainReport::VERSION`].
    pub version: u32,
    /// Id of the recording.
    pub recording: String,
    /// Stored bytes of the predictors of these layers.
    pub predictor_bytes: u64,
    /// FFN bytes of these layers.
    pub ffn_bytes: u64,
    /// Trained layers, ascending.
    pub layers: Vec<LayerReport>,
}

/// What is known of one layer's predictor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerReport {
    /// Number of the layer.
    pub layer: usize,
    /// Rank of the predictor; of a quantised projection the width of the inputs.
    pub rank: usize,
    /// How it is stored.
    pub dtype: PredictorDType,
    /// Neurons of the layer; earlier builds did not say it.
    #[serde(default)]
    pub neurons: usize,
    /// Neurons that have a row in it, where not all have: the others never fired in training and are never predicted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<usize>,
    /// Stored bytes, look-ahead excluded.
    pub bytes: u64,
    /// Bytes of the layer's FFN weights.
    pub ffn_bytes: u64,
    /// Measured on held-out tokens, as stored.
    pub held_out: OperatingPoint,
    /// Measured on another recording, as stored, when one was given.
    pub validation: Option<OperatingPoint>,
    /// Other thresholds of this predictor, for each way to store it; on the other recording if there is one.
    pub curves: Vec<DTypeCurve>,
    /// Predictors for the next layer from this one's input.
    #[serde(default)]
    pub look_ahead: Option<LookAheadReport>,
    /// The trial, when ranks were chosen automatically.
    pub trial: Option<RankCurve>,
    /// Time of the fit alone. Not part of the file, which holds nothing of the machine.
    #[serde(skip)]
    pub seconds: f64,
    /// How the fit went, where there was one. Kept apart, in `training.json`.
    #[serde(skip)]
    pub fit: Option<FitLog>,
}

/// An entry of `training.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerTraining {
    /// Number of the layer.
    pub layer: usize,
    /// What was trained.
    pub form: PredictorForm,
    /// How the fit went; none of a quantised projection, which is not trained.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub fit: Option<FitLog>,
    /// The same predictor trained with several seeds, the kept one first; empty with one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub seeds: Vec<SeedPoint>,
}

/// What happens at one threshold. Rates are pooled over tokens: see `false_negative_rate` and the rest.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperatingPoint {
    /// Taken off the logits.
    pub threshold: f32,
    /// Missed / active.
    pub false_negative_rate: f64,
    /// False alarms / inactive.
    pub false_positive_rate: f64,
    /// Predicted / all neurons.
    pub predicted_fraction: f64,
    /// Active / all neurons.
    pub active_fraction: f64,
    /// Predicted / active.
    pub over_fetch: f64,
    /// Share of the activation energy that the predicted neurons keep.
    pub energy_recall: f64,
    /// Hits / predicted; recall is one less the false-negative rate.
    pub precision: f64,
}

/// Points of a predictor stored one way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DTypeCurve {
    /// How it is stored.
    pub dtype: PredictorDType,
    /// Stored bytes.
    pub bytes: u64,
    /// Points at rising shares of misses.
    pub points: Vec<OperatingPoint>,
}

/// Two ways to know the next layer's active neurons early; on the validation recording if there is one, else on held-out tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LookAheadReport {
    /// Rank of the small predictor.
    pub rank: usize,
    /// Its stored bytes.
    pub bytes: u64,
    /// The small predictor as stored.
    pub own: OperatingPoint,
    /// The small predictor at other thresholds.
    pub own_points: Vec<OperatingPoint>,
    /// The next layer's predictor on this layer's input, at the same shares of misses; empty where it was not compared.
    pub next_layers_points: Vec<OperatingPoint>,
}

/// What a layer's predictor is: in JSON the rank, or `"projection"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PredictorForm {
    /// Two thin matrices with this many numbers between.
    LowRank(usize),
    /// The quantised projection itself.
    Projection(Projection),
}

/// The only word of its kind, as serde wants it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Projection {
    /// Its four-bit integers.
    Projection,
}

impl PredictorForm {
    /// The quantised projection.
    pub const PROJECTION: Self = Self::Projection(Projection::Projection);

    /// In words, for a sentence.
    pub fn in_words(&self) -> String {
        match self {
            Self::LowRank(rank) => format!("rank {rank}"),
            Self::Projection(_) => "int4 projection".into(),
        }
    }
}

impl fmt::Display for PredictorForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LowRank(rank) => rank.fmt(f),
            Self::Projection(_) => f.pad("int4"),
        }
    }
}

/// What the trial of a layer found: remaining false positives by what was tried, in the order of its size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankCurve {
    /// What was tried.
    pub ranks: Vec<PredictorForm>,
    /// Stored bytes of each; earlier builds did not say it.
    #[serde(default)]
    pub bytes: Vec<u64>,
    /// False-positive rate of each.
    pub costs: Vec<f64>,
    /// Share of the neurons that each admits, with the threshold that it would get; earlier builds did not say it.
    #[serde(default)]
    pub admitted: Vec<f64>,
    /// Sizes of the layer's neuron cache that each was tried with, in groups, and the nanoseconds that a token's reads and the chosen
    /// neurons' bytes in memory then take; earlier builds did not say it.
    #[serde(default)]
    pub slots: Vec<u32>,
    /// Likewise: of each that was tried, for each size.
    #[serde(default)]
    pub token_ns: Vec<Vec<f64>>,
}

/// `predictors.json` cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainReportError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not the JSON it should be.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// It is of another format, or of a version that this build does not know.
    #[error("{}: it says {found:?} version {version}, expected {expected:?} version {newest} at most", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The format that would be right.
        expected: &'static str,
        /// The newest known version.
        newest: u32,
        /// Its format.
        found: String,
        /// Its version.
        version: u32,
    },
}

/// An entry of `timings.json`.
#[derive(Serialize)]
struct Timing {
    layer: usize,
    /// Of the fit alone.
    seconds: f64,
}

impl TrainReport {
    /// What the file says that it is.
    pub const FORMAT: &str = PREDICTORS_FORMAT;
    /// The version that this build writes, and the newest that it reads.
    pub const VERSION: u32 = 1;

    /// Of predictors that were made from `recording`.
    pub fn new(recording: &str, layers: Vec<LayerReport>) -> Self {
        Self {
            format: Self::FORMAT.into(),
            version: Self::VERSION,
            recording: recording.into(),
            predictor_bytes: layers.iter().map(|r| r.bytes).sum(),
            ffn_bytes: layers.iter().map(|r| r.ffn_bytes).sum(),
            layers,
        }
    }

    /// Writes the file, and `timings.json` beside it, which alone depends on the machine, into `dir`: each whole, or not at all.
    ///
    /// # Errors
    /// `Io`.
    pub fn write(&self, dir: &Path) -> Result<(), TrainReportError> {
        publish(dir, PREDICTORS_JSON, self)?;
        let timings: Vec<_> = self.layers.iter().map(|r| Timing { layer: r.layer, seconds: r.seconds }).collect();
        publish(dir, "timings.json", &timings)
    }

    /// Reads the file in `dir`.
    ///
    /// # Errors
    /// If there is none, or none that this build knows.
    pub fn read(dir: &Path) -> Result<Self, TrainReportError> {
        let path = dir.join(PREDICTORS_JSON);
        let json = match read_regular(&path, BYTES_MAX) {
            Ok(json) => json,
            Err(source) => return Err(TrainReportError::Io { path, source }),
        };
        let read: Self = match serde_json::from_slice(&json) {
            Ok(read) => read,
            Err(source) => return Err(TrainReportError::Json { path, source }),
        };
        if read.format != Self::FORMAT || read.version > Self::VERSION {
            let (expected, newest) = (Self::FORMAT, Self::VERSION);
            return Err(TrainReportError::Format { path, expected, newest, found: read.format, version: read.version });
        }
        Ok(read)
    }
}

impl LayerReport {
    /// What the predictor is.
    pub fn form(&self) -> PredictorForm {
        match self.dtype {
            PredictorDType::Int4 => PredictorForm::PROJECTION,
            _ => PredictorForm::LowRank(self.rank),
        }
    }

    /// The chosen point, on text that the predictor was not trained on.
    pub fn judged(&self) -> &OperatingPoint {
        self.validation.as_ref().unwrap_or(&self.held_out)
    }

    /// The points of the predictor as it is stored, from few misses to many.
    pub fn stored_curve(&self) -> &[OperatingPoint] {
        self.curves.iter().find(|c| c.dtype == self.dtype).map_or(&[], |c| &c.points)
    }
}

impl LayerTraining {
    /// What a report knows of its fit, and what was measured with several seeds.
    pub fn new(report: &LayerReport, seeds: Vec<SeedPoint>) -> Self {
        Self { layer: report.layer, form: report.form(), fit: report.fit.clone(), seeds }
    }

    /// Writes the file into `dir`, whole or not at all.
    ///
    /// # Errors
    /// `Io`.
    pub fn write(layers: &[Self], dir: &Path) -> Result<(), TrainReportError> {
        publish(dir, "training.json", &layers)
    }
}

/// Writes a file of `dir` whole, or not at all.
fn publish(dir: &Path, name: &str, value: &impl Serialize) -> Result<(), TrainReportError> {
    let (path, mut json) = (dir.join(name), serde_json::to_vec_pretty(value).expect("plain data serialises"));
    json.push(b'\n');
    publish_bytes(&path, &json).map_err(|source| TrainReportError::Io { path, source })
}

impl RankCurve {
    /// Share of the neurons that this predictor admits, if it was tried.
    pub fn admitted_at(&self, form: PredictorForm) -> Option<f64> {
        let at = self.ranks.iter().position(|&tried| tried == form)?;
        self.admitted.get(at).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_another_file_is_not() {
        let point = OperatingPoint {
            threshold: -0.5,
            false_negative_rate: 0.02,
            false_positive_rate: 0.1,
            predicted_fraction: 0.2,
            active_fraction: 0.1,
            over_fetch: 2.0,
            energy_recall: 0.99,
            precision: 0.5,
        };
        let curve = |dtype| DTypeCurve { dtype, bytes: 100, points: vec![point] };
        let layer = LayerReport {
            layer: 0,
            rank: 8,
            dtype: PredictorDType::Int8,
            neurons: 9,
            rows: Some(3),
            bytes: 100,
            ffn_bytes: 1000,
            held_out: point,
            validation: None,
            curves: vec![curve(PredictorDType::F16), curve(PredictorDType::Int8)],
            look_ahead: None,
            trial: Some(RankCurve {
                ranks: vec![PredictorForm::LowRank(8), PredictorForm::PROJECTION],
                bytes: vec![100, 200],
                costs: vec![0.1, 0.01],
                admitted: vec![0.2, 0.11],
                slots: vec![0, 9],
                token_ns: vec![vec![2.0, 1.0], vec![1.5, 0.5]],
            }),
            seconds: 0.0,
            fit: None,
        };
        let report = TrainReport::new("made from", vec![layer]);
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(TrainReport::read(dir.path()), Err(TrainReportError::Io { .. })));
        report.write(dir.path()).unwrap();
        assert_eq!(TrainReport::read(dir.path()).unwrap(), report);
        let path = dir.path().join(PREDICTORS_JSON);
        let json = std::fs::read_to_string(&path).unwrap();
        let read = |from: &str, to: &str| {
            let changed = json.replace(from, to);
            assert_ne!(changed, json, "{from}");
            std::fs::write(&path, changed).unwrap();
            TrainReport::read(dir.path())
        };
        assert_eq!(read("\"rank\": 8,", "\"rank\": 8, \"later\": {},").unwrap(), report);
        let unknown = [("\"version\": 1", "\"version\": 2"), ("flashlm-predictors", "flashlm-orders")];
        for (from, to) in unknown {
            assert!(matches!(read(from, to), Err(TrainReportError::Format { .. })), "{to}");
        }
        assert!(matches!(read("\"rank\": 8,", ""), Err(TrainReportError::Json { .. })));
        assert!(matches!(read("\"int8\"", "\"int3\""), Err(TrainReportError::Json { .. })));
    }
}
