//! A safetensors file that is read and written in parts, so that its largest tensor never has to be in memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::Metadata;

use xxhash_rust::xxh3::Xxh3;

use super::RecordingError;
use crate::regular::open_regular;
use crate::seal::{self, SEAL};

/// Bytes of the length that precedes a safetensors header.
const LENGTH_BYTES: u64 = 8;
/// Where the data begins in the files that we write: the header is padded with spaces up to here, so that its length
/// does not depend on numbers that are known only at the end.
pub(super) const DATA_OFFSET: u64 = 4096;
/// Longest header that is read; real ones are under 4 KiB.
const HEADER_BYTES_MAX: u64 = 1 << 20;
/// Bytes read at once to check a seal.
const SEAL_PIECE_BYTES: usize = 1 << 18;

/// Name, type and shape of a tensor to be written.
pub(super) struct Region {
    name: String,
    dtype: &'static str,
    shape: Vec<u64>,
}

impl Region {
    pub(super) fn new(name: &str, dtype: &'static str, shape: &[u64]) -> Self {
        Region { name: name.into(), dtype, shape: shape.to_vec() }
    }

    pub(super) fn bytes(&self) -> u64 {
        let element = match self.dtype {
            "U8" => 1,
            "F16" => 2,
            _ => 4,
        };
        self.shape.iter().product::<u64>() * element
    }
}

/// The first [`DATA_OFFSET`] bytes of a file that holds `regions` one after another, not sealed yet.
pub(super) fn header_bytes(regions: &[Region], metadata: &[(&str, &str)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let metadata: serde_json::Map<_, _> =
        metadata.iter().chain(&[SEAL]).map(|&(k, v)| (k.to_string(), v.to_string().into())).collect();
    header.insert("__metadata__".into(), metadata.into());
    let mut at = 0;
    for region in regions {
        let end = at + region.bytes();
        let entry = serde_json::json!({ "dtype": region.dtype, "shape": region.shape, "data_offsets": [at, end] });
        header.insert(region.name.clone(), entry);
        at = end;
    }
    let mut json = serde_json::to_vec(&header).expect("plain data serialises");
    let padded = (DATA_OFFSET - LENGTH_BYTES) as usize;
    assert!(json.len() <= padded, "at most eight tensors with short names");
    json.resize(padded, b' ');
    let mut bytes = (padded as u64).to_le_bytes().to_vec();
    bytes.extend(json);
    bytes
}

/// A safetensors file whose header has been checked against the file's length.
pub(super) struct TensorFile {
    path: PathBuf,
    file: File,
    metadata: Metadata,
    data_offset: u64,
}

impl TensorFile {
    pub(super) fn open(path: &Path) -> Result<Self, RecordingError> {
        let io = |e| RecordingError::io(path, e);
        let layout =
            |what, expected, found| Err(RecordingError::Layout { path: path.to_path_buf(), what, expected, found });
        let mut file = open_regular(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        if length < LENGTH_BYTES {
            return layout("file length, at least", LENGTH_BYTES, length);
        }
        let mut prefix = [0; LENGTH_BYTES as usize];
        file.read_exact(&mut prefix).map_err(io)?;
        let header_length = u64::from_le_bytes(prefix);
        let limit = HEADER_BYTES_MAX.min(length - LENGTH_BYTES);
        if header_length > limit {
            return layout("header length, at most", limit, header_length);
        }
        let mut header = vec![0; header_length as usize];
        file.read_exact(&mut header).map_err(io)?;
        // Checks that the tensors lie one after another without holes and that their sizes fit their shapes.
        let metadata: Metadata = serde_json::from_slice(&header)
            .map_err(|source| RecordingError::Json { path: path.to_path_buf(), source })?;
        let data_offset = LENGTH_BYTES + header_length;
        let found = length - data_offset;
        if metadata.data_len() as u64 != found {
            return layout("bytes of tensor data", metadata.data_len() as u64, found);
        }
        let mut file = TensorFile { path: path.to_path_buf(), file, metadata, data_offset };
        file.check_seal(&[&prefix[..], &header].concat())?;
        Ok(file)
    }

    /// Holds a sealed file against its seal, reading all of it once.
    fn check_seal(&mut self, head: &[u8]) -> Result<(), RecordingError> {
        if !seal::is_sealed(head) {
            return Ok(());
        }
        let mut tensors = Vec::new();
        let mut piece = vec![0; SEAL_PIECE_BYTES];
        for (from, to) in seal::in_file_order(&self.metadata) {
            let mut hash = Xxh3::new();
            for at in (from..to).step_by(SEAL_PIECE_BYTES) {
                let piece = &mut piece[..SEAL_PIECE_BYTES.min(to - at)];
                self.read_at(self.data_offset + at as u64, piece)?;
                hash.update(piece);
            }
            tensors.push(hash.digest());
        }
        let damaged = |source| RecordingError::Damaged { path: self.path.clone(), source };
        seal::check_head(head, &tensors).map_err(damaged)
    }

    pub(super) fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// Where a tensor of this type and shape lies in the file.
    pub(super) fn find(&self, name: &'static str, dtype: Dtype, shape: &[u64]) -> Result<u64, RecordingError> {
        let info = self.metadata.info(name).ok_or(RecordingError::MissingTensor { path: self.path.clone(), name })?;
        if info.dtype != dtype || info.shape.iter().map(|&n| n as u64).ne(shape.iter().copied()) {
            return Err(RecordingError::TensorShape {
                path: self.path.clone(),
                name,
                expected: format!("{dtype:?} {shape:?}"),
                found: format!("{:?} {:?}", info.dtype, info.shape),
            });
        }
        Ok(self.data_offset + info.data_offsets.0 as u64)
    }

    /// Length of a one-dimensional tensor, whatever its type.
    pub(super) fn length_of(&self, name: &'static str) -> Result<u64, RecordingError> {
        let info = self.metadata.info(name).ok_or(RecordingError::MissingTensor { path: self.path.clone(), name })?;
        Ok(info.shape.iter().map(|&n| n as u64).product())
    }

    pub(super) fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), RecordingError> {
        self.file
            .seek(SeekFrom::Start(offset))
            .and_then(|_| self.file.read_exact(buffer))
            .map_err(|e| RecordingError::io(&self.path, e))
    }

    pub(super) fn read_bytes(
        &mut self,
        name: &'static str,
        dtype: Dtype,
        shape: &[u64],
    ) -> Result<Vec<u8>, RecordingError> {
        let offset = self.find(name, dtype, shape)?;
        // `find` compared the shape with the header, and the header was checked against the file's length.
        let mut bytes = vec![0; shape.iter().product::<u64>() as usize * dtype.bitsize() / 8];
        self.read_at(offset, &mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn read_u32(&mut self, name: &'static str, shape: &[u64]) -> Result<Vec<u32>, RecordingError> {
        let bytes = self.read_bytes(name, Dtype::U32, shape)?;
        Ok(bytes.as_chunks().0.iter().map(|&b| u32::from_le_bytes(b)).collect())
    }

    /// Reads numbers that must be finite and not negative.
    pub(super) fn read_f32(&mut self, name: &'static str, shape: &[u64]) -> Result<Vec<f32>, RecordingError> {
        let bytes = self.read_bytes(name, Dtype::F32, shape)?;
        let values: Vec<_> = bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
        match values.iter().position(|v| !v.is_finite() || *v < 0.0) {
            Some(at) => Err(RecordingError::NotFinite { path: self.path.clone(), what: name, at, value: values[at] }),
            None => Ok(values),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl std::fmt::Debug for TensorFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: BTreeMap<_, _> = self.metadata.tensors().into_iter().map(|(k, v)| (k, &v.shape)).collect();
        f.debug_struct("TensorFile").field("path", &self.path).field("tensors", &names).finish()
    }
}
