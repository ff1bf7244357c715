//! How the order of one layer is kept: a safetensors file with one tensor.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::bundle::FlashLayout;
use crate::ids::NeuronId;
use crate::publish::publish_bytes;
use crate::regular::open_regular;
use crate::seal::{self, SEAL, SealBroken};

/// The version this build writes.
const VERSION: u32 = 1;
/// The versions this build reads.
const VERSIONS_READ: std::ops::RangeInclusive<u32> = 1..=1;
const FORMAT: &str = "flashlm-order";
/// Metadata of the groups.
const RECORDS: &str = "records_per_group";
const GROUP_BYTES: &str = "group_bytes";
/// Longest header that is read; real ones are about 300 bytes.
const HEADER_BYTES_MAX: u64 = 1 << 16;

/// How neurons are grouped on flash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupShape {
    /// Neuron records in a group.
    pub records: usize,
    /// Bytes of a group, padding included.
    pub bytes: usize,
}

impl From<&FlashLayout> for GroupShape {
    fn from(layout: &FlashLayout) -> Self {
        Self { records: layout.records_per_group(), bytes: layout.group_bytes() }
    }
}

impl fmt::Display for GroupShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let records = if self.records == 1 { "record" } else { "records" };
        write!(f, "groups of {} {records} in {} bytes", self.records, self.bytes)
    }
}

/// The storage order of one layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OrderFile {
    /// Which layer.
    pub layer: usize,
    /// Name of the strategy that made it.
    pub strategy: String,
    /// Id of the recording that it was made from.
    pub recording: String,
    /// The groups that it was made for; files of earlier builds do not say.
    pub groups: Option<GroupShape>,
    /// `order[position] = neuron`; every neuron once.
    pub order: Vec<NeuronId>,
}

/// What can be wrong with an order file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OrderFileError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// File or directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The header is not the JSON it should be.
    #[error("{}: {source}", path.display())]
    Json {
        /// File.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A length, an offset, a number or a checksum is not what it should be.
    #[error("{}: {what}: expected {expected}, found {found}", path.display())]
    Mismatch {
        /// File.
        path: PathBuf,
        /// Which.
        what: &'static str,
        /// What would be right.
        expected: String,
        /// What is there.
        found: String,
    },
    /// Written by a later version of flashlm.
    #[error("{}: order version {found} is newer than {newest}, the newest that this build reads", path.display())]
    TooNew {
        /// File.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest known one.
        newest: u32,
    },
    /// A neuron is out of range or occurs twice.
    #[error("{}: order[{at}] is {neuron}: not a neuron of {neurons}, or there already", path.display())]
    NoPermutation {
        /// File.
        path: PathBuf,
        /// Position.
        at: usize,
        /// What is there.
        neuron: NeuronId,
        /// Neurons of the layer.
        neurons: usize,
    },
}

#[derive(Serialize, Deserialize)]
struct Tensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

#[derive(Serialize, Deserialize)]
struct Header {
    #[serde(rename = "__metadata__")]
    metadata: BTreeMap<String, String>,
    order: Tensor,
}

impl OrderFile {
    /// Where the order of `layer` lies in `dir`.
    pub fn path(dir: &Path, layer: usize) -> PathBuf {
        dir.join(format!("layer-{layer:03}.order.safetensors"))
    }

    /// Writes the file into `dir` whole, or not at all. The same order gives the same bytes.
    pub fn write(&self, dir: &Path) -> Result<PathBuf, OrderFileError> {
        let path = Self::path(dir, self.layer);
        let data: Vec<u8> = self.order.iter().flat_map(|n| n.0.to_le_bytes()).collect();
        let groups = self.groups.iter();
        let groups = groups.flat_map(|g| [(RECORDS, g.records.to_string()), (GROUP_BYTES, g.bytes.to_string())]);
        let metadata = [
            ("format", FORMAT.to_string()),
            ("version", VERSION.to_string()),
            ("layer", self.layer.to_string()),
            ("strategy", self.strategy.clone()),
            ("recording", self.recording.clone()),
            ("xxh3", format!("{:016x}", xxh3_64(&data))),
            (SEAL.0, SEAL.1.to_string()),
        ];
        let header = Header {
            metadata: metadata.into_iter().chain(groups).map(|(k, v)| (k.to_string(), v)).collect(),
            order: Tensor {
                dtype: "U32".into(),
                shape: vec![self.order.len() as u64],
                data_offsets: [0, data.len() as u64],
            },
        };
        let mut json =
            serde_json::to_vec(&header).map_err(|source| OrderFileError::Json { path: path.clone(), source })?;
        // The data begin at a multiple of eight bytes, as the safetensors format asks for.
        json.resize(json.len().next_multiple_of(8), b' ');
        let mut bytes = [&(json.len() as u64).to_le_bytes()[..], &json, &data].concat();
        seal::seal(&mut bytes);
        publish_bytes(&path, &bytes).map_err(|source| OrderFileError::Io { path: path.clone(), source })?;
        Ok(path)
    }

    /// Reads and checks the order of `layer` from `dir`, for a layer of `neurons` neurons.
    pub fn read(dir: &Path, layer: usize, neurons: usize) -> Result<Self, OrderFileError> {
        Self::read_from(&Self::path(dir, layer), layer, neurons)
    }

    /// The same from a file of any name.
    pub fn read_from(path: &Path, layer: usize, neurons: usize) -> Result<Self, OrderFileError> {
        let bytes_max = 8 + HEADER_BYTES_MAX + 4 * neurons as u64;
        let io = |source| OrderFileError::Io { path: path.to_path_buf(), source };
        let length = std::fs::metadata(path).map_err(io)?.len();
        if length > bytes_max {
            return Err(mismatch(path, "length of the file", format!("at most {bytes_max}"), length));
        }
        let mut bytes = Vec::new();
        open_regular(path).and_then(|mut file| file.read_to_end(&mut bytes)).map_err(io)?;
        Self::parse(&bytes, path, layer, neurons)
    }

    fn parse(bytes: &[u8], path: &Path, layer: usize, neurons: usize) -> Result<Self, OrderFileError> {
        let short = || mismatch(path, "length of the file", "a header and its length", bytes.len());
        let (length, rest) = bytes.split_first_chunk::<8>().ok_or_else(short)?;
        let length = u64::from_le_bytes(*length);
        let json = usize::try_from(length)
            .ok()
            .filter(|&l| length <= HEADER_BYTES_MAX && l <= rest.len())
            .ok_or_else(short)?;
        let (json, data) = rest.split_at(json);
        let header: Header =
            serde_json::from_slice(json).map_err(|source| OrderFileError::Json { path: path.to_path_buf(), source })?;
        let said = |key: &str| header.metadata.get(key).map_or("nothing", String::as_str);
        let check = |what, expected: String, found: &str| {
            if expected == found { Ok(()) } else { Err(mismatch(path, what, expected, found)) }
        };
        check("format", FORMAT.into(), said("format"))?;
        match said("version").parse::<u32>() {
            Ok(v) if VERSIONS_READ.contains(&v) => {}
            Ok(found) if found > VERSION => {
                return Err(OrderFileError::TooNew { path: path.to_path_buf(), found, newest: VERSION });
            }
            _ => return Err(mismatch(path, "version", VERSION, said("version"))),
        }
        check("layer", layer.to_string(), said("layer"))?;
        let tensor = &header.order;
        check("type", "U32".into(), &tensor.dtype)?;
        check("shape", format!("{:?}", [neurons as u64]), &format!("{:?}", tensor.shape))?;
        check("data_offsets", format!("{:?}", [0, 4 * neurons as u64]), &format!("{:?}", tensor.data_offsets))?;
        check("bytes of data", (4 * neurons).to_string(), &data.len().to_string())?;
        check("checksum", format!("{:016x}", xxh3_64(data)), said("xxh3"))?;
        if let Err(SealBroken { expected, found }) = seal::check(bytes) {
            return Err(mismatch(path, "seal", format!("{expected:016x}"), format_args!("{found:016x}")));
        }
        let order: Vec<NeuronId> = data.as_chunks().0.iter().map(|&b| NeuronId(u32::from_le_bytes(b))).collect();
        let mut there = vec![false; neurons];
        for (at, &neuron) in order.iter().enumerate() {
            match there.get_mut(neuron.index()) {
                Some(seen) if !*seen => *seen = true,
                _ => return Err(OrderFileError::NoPermutation { path: path.to_path_buf(), at, neuron, neurons }),
            }
        }
        let number = |key: &str| header.metadata.get(key)?.parse().ok();
        let groups = number(RECORDS).zip(number(GROUP_BYTES)).map(|(records, bytes)| GroupShape { records, bytes });
        Ok(OrderFile { layer, strategy: said("strategy").into(), recording: said("recording").into(), groups, order })
    }
}

fn mismatch(path: &Path, what: &'static str, expected: impl ToString, found: impl ToString) -> OrderFileError {
    OrderFileError::Mismatch {
        path: path.to_path_buf(),
        what,
        expected: expected.to_string(),
        found: found.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> OrderFile {
        let groups = Some(GroupShape { records: 2, bytes: 512 });
        OrderFile {
            layer: 3,
            strategy: "path".into(),
            recording: "abc".into(),
            groups,
            order: [2, 0, 4, 1, 3].map(NeuronId).to_vec(),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = example().write(dir.path()).unwrap();
        assert_eq!(OrderFile::read(dir.path(), 3, 5).unwrap(), example());
        let silent = OrderFile { groups: None, ..example() };
        silent.write(dir.path()).unwrap();
        assert_eq!(OrderFile::read(dir.path(), 3, 5).unwrap(), silent, "as earlier builds wrote it");
        example().write(dir.path()).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        example().write(dir.path()).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), bytes, "the same bytes again");
        assert!(safetensors_like(&bytes), "data begin at a multiple of eight");
        assert!(OrderFile::read(dir.path(), 3, 6).is_err(), "another layer size");
        assert!(matches!(OrderFile::read(dir.path(), 2, 5), Err(OrderFileError::Io { .. })));
    }

    fn safetensors_like(bytes: &[u8]) -> bool {
        u64::from_le_bytes(bytes[..8].try_into().unwrap()).is_multiple_of(8)
    }

    #[test]
    fn every_lie_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = std::fs::read(example().write(dir.path()).unwrap()).unwrap();
        let parse = |b: &[u8]| OrderFile::parse(b, Path::new("x"), 3, 5);
        assert!(parse(&bytes).is_ok());
        for cut in 0..bytes.len() {
            assert!(parse(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        for at in bytes.len() - 20..bytes.len() {
            let mut wrong = bytes.clone();
            wrong[at] ^= 1;
            assert!(matches!(parse(&wrong), Err(OrderFileError::Mismatch { what: "checksum", .. })), "flip at {at}");
        }
        let text = String::from_utf8_lossy(&bytes[8..bytes.len() - 20]).into_owned();
        let table = [
            ("\"flashlm-order\"", "\"flashlm-other\""),
            ("\"version\":\"1\"", "\"version\":\"9\""),
            ("\"version\":\"1\"", "\"version\":\"0\""),
            ("\"layer\":\"3\"", "\"layer\":\"4\""),
            ("\"U32\"", "\"F32\""),
            ("\"shape\":[5]", "\"shape\":[4]"),
            ("[0,20]", "[0,24]"),
            ("[0,20]", "[4,20]"),
        ];
        for (from, to) in table {
            let wrong = text.replace(from, to);
            assert_ne!(wrong, text, "{from}");
            let mut file = (wrong.len() as u64).to_le_bytes().to_vec();
            file.extend(wrong.as_bytes());
            file.extend(&bytes[bytes.len() - 20..]);
            assert!(parse(&file).is_err(), "{to}");
        }
        let twice = OrderFile { order: [0, 1, 2, 2, 4].map(NeuronId).to_vec(), ..example() };
        let bytes = std::fs::read(twice.write(dir.path()).unwrap()).unwrap();
        assert!(matches!(parse(&bytes), Err(OrderFileError::NoPermutation { at: 3, neuron: NeuronId(2), .. })));
    }
}
