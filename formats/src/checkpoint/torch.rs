//! PyTorch's zip archives (`torch.save` since 1.6): a pickle that lists tensors, and one plain member per storage.
//!
//! Only the directory and the pickle are read; the storages stay where they are. Members must be stored uncompressed, so
//! nothing ever grows beyond the file's own length.

use std::collections::HashMap;
use std::io::BufReader;

use zip::{CompressionMethod, ZipArchive};

use super::error::CheckpointError;
use super::file::{SNIFF_BYTES, SourceFile, sniff};
use super::foreign::Foreign;
use super::pickle::{ListedTensor, list_tensors};
use super::tensor::{StoredDtype, StoredTensor};
use super::torch_error::TorchError as Error;

/// Longest `data.pkl`; that of a model with a thousand tensors has some 100 kB.
const PICKLE_BYTES_MAX: u64 = 32 << 20;

/// Tensors may share storages, as tied ones do; beyond this much of the file's length reading all of them is no reading of the file.
const SHARED_MAX: u64 = 8;

/// The tensors of `file`, whose index in the checkpoint is `file_index`.
pub(crate) fn read_archive(file: &SourceFile, file_index: usize) -> Result<Vec<StoredTensor>, CheckpointError> {
    let head = file.head::<SNIFF_BYTES>()?;
    match sniff(&head) {
        Some(Foreign::Zip) => {}
        found => {
            // After its length a safetensors header begins with a brace.
            let other = if head.get(8) == Some(&b'{') { Foreign::Safetensors } else { Foreign::Unknown };
            let found = found.unwrap_or(other);
            return Err(CheckpointError::Foreign { path: file.path.clone(), expected: "a PyTorch zip archive", found });
        }
    }
    let failed = |source| CheckpointError::Torch { path: file.path.clone(), source: Box::new(source) };
    let mut archive = Archive::open(file).map_err(failed)?;
    let pickle = archive.member("data.pkl").map_err(failed)?;
    if pickle.bytes > PICKLE_BYTES_MAX {
        return Err(failed(Error::Limit { what: "bytes", limit: PICKLE_BYTES_MAX as usize }));
    }
    let mut stream = vec![0; pickle.bytes as usize];
    file.read_exact_at(&mut stream, pickle.start)?;
    if let Ok(order) = archive.member("byteorder") {
        let mut text = vec![0; order.bytes.min(16) as usize];
        file.read_exact_at(&mut text, order.start)?;
        if text != b"little" {
            let found = String::from_utf8_lossy(&text).into_owned();
            return Err(failed(Error::ByteOrder { found }));
        }
    }
    let mut storages: HashMap<String, Member> = HashMap::new();
    let (mut tensors, mut listed_bytes) = (Vec::new(), 0_u64);
    for listed in list_tensors(&stream).map_err(failed)? {
        let member = match storages.get(&listed.storage) {
            Some(member) => *member,
            None => {
                let member = archive.member(&format!("data/{}", listed.storage)).map_err(failed)?;
                storages.insert(listed.storage.clone(), member);
                member
            }
        };
        let element_bytes = listed.element.bytes;
        let tensor = place(listed, member, file_index).map_err(failed)?;
        // `place` has held the number of elements against the storage's.
        listed_bytes += tensor.shape.iter().map(|&size| size as u64).product::<u64>() * element_bytes;
        if listed_bytes / SHARED_MAX > file.bytes() {
            return Err(failed(Error::Shared { listed: listed_bytes, stored: file.bytes() }));
        }
        tensors.push(tensor);
    }
    Ok(tensors)
}

/// Where a member's bytes are.
#[derive(Clone, Copy)]
struct Member {
    start: u64,
    bytes: u64,
}

struct Archive<'a> {
    zip: ZipArchive<BufReader<&'a std::fs::File>>,
    file_bytes: u64,
    /// All members stand in one directory, named after the file when it was saved.
    root: String,
}

impl<'a> Archive<'a> {
    fn open(file: &'a SourceFile) -> Result<Self, Error> {
        let zip = ZipArchive::new(BufReader::new(&file.file)).map_err(|e| Error::Zip { reason: e.to_string() })?;
        let root = zip.file_names().find_map(|name| {
            let name = name.ok()?;
            let name = name.strip_suffix("data.pkl")?;
            (name.is_empty() || name.find('/') == Some(name.len() - 1)).then(|| name.to_owned())
        });
        let root = root.ok_or_else(|| Error::NoMember { member: "data.pkl".into() })?;
        Ok(Self { zip, file_bytes: file.bytes(), root })
    }

    fn member(&mut self, name: &str) -> Result<Member, Error> {
        let name = format!("{}{name}", self.root);
        let missing = || Error::NoMember { member: name.clone() };
        let index = self.zip.index_for_name(&name).ok_or_else(missing)?;
        let entry = self.zip.by_index_raw(index).map_err(|e| Error::Zip { reason: e.to_string() })?;
        let bytes = entry.size();
        if entry.compression() != CompressionMethod::Stored || entry.encrypted() || entry.compressed_size() != bytes {
            return Err(Error::NotStored { member: name });
        }
        let start = entry.data_start().ok_or_else(missing)?;
        match start.checked_add(bytes) {
            Some(end) if end <= self.file_bytes => Ok(Member { start, bytes }),
            end => {
                let end = end.unwrap_or(u64::MAX);
                Err(Error::Bounds { member: name, start, end, file_bytes: self.file_bytes })
            }
        }
    }
}

/// Check a listed tensor against its storage.
fn place(listed: ListedTensor, member: Member, file: usize) -> Result<StoredTensor, Error> {
    let ListedTensor { name, element, storage_elements, offset, shape, strides, .. } = listed;
    let stored = storage_elements.min(member.bytes / element.bytes);
    let count = shape.iter().try_fold(1_u64, |n, &size| n.checked_mul(size as u64));
    // One past the last element; nothing at all for a tensor without elements.
    let end = match count {
        Some(0) => Some(offset),
        Some(_) => shape.iter().zip(&strides).try_fold(offset + 1, |end, (&size, &stride)| {
            end.checked_add((size as u64 - 1).checked_mul(stride as u64)?)
        }),
        None => None,
    };
    // A tensor expanded over its storage (stride 0) may have more elements than are stored; no model's weights do.
    let needed = end.unwrap_or(u64::MAX).max(count.unwrap_or(u64::MAX));
    if needed > stored || storage_elements > stored {
        return Err(Error::Storage { tensor: name, needed: needed.max(storage_elements), stored });
    }
    let dtype = element.weight.map_or(StoredDtype::Other(element.name), StoredDtype::Weight);
    let strides = (!is_contiguous(&shape, &strides)).then_some(strides);
    Ok(StoredTensor { name, file, offset: member.start + offset * element.bytes, dtype, shape, strides })
}

/// The distance along a dimension of size one never matters.
fn is_contiguous(shape: &[usize], strides: &[usize]) -> bool {
    let mut expected = 1;
    shape.contains(&0)
        || shape.iter().zip(strides).rev().all(|(&size, &stride)| {
            let fits = size == 1 || stride == expected;
            expected *= size;
            fits
        })
}
