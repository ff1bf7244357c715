//! The header of a safetensors file, in one validating pass: every inconsistency has a name.
//!
//! Only the header is read; the tensors stay where they are.

use std::fmt;

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};

use super::error::CheckpointError;
use super::file::{SNIFF_BYTES, SourceFile, sniff};
use super::foreign::Foreign;
use super::safetensors_error::SafetensorsError as Lie;
use super::tensor::{StoredDtype, StoredTensor};
use crate::model::{DType, NotAWeight};

/// The format's own bound on headers.
const HEADER_BYTES_MAX: u64 = 100_000_000;
const LENGTH_BYTES: u64 = 8;

/// The tensors of `file`, whose index in the checkpoint is `file_index`.
pub(crate) fn read_header(file: &SourceFile, file_index: usize) -> Result<Vec<StoredTensor>, CheckpointError> {
    let head = file.head::<SNIFF_BYTES>()?;
    if let Some(found) = sniff(&head) {
        return Err(CheckpointError::Foreign { path: file.path.clone(), expected: "safetensors", found });
    }
    let lie = |source| CheckpointError::Safetensors { path: file.path.clone(), source: Box::new(source) };
    let Some(length) = head.first_chunk::<8>() else {
        return Err(lie(Lie::TooShort { expected: LENGTH_BYTES, found: file.bytes() }));
    };
    let (claimed, room) = (u64::from_le_bytes(*length), file.bytes() - LENGTH_BYTES);
    if claimed > room.min(HEADER_BYTES_MAX) {
        // Text in place of a length: some other file altogether.
        if head.iter().all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace()) {
            let found = Foreign::Unknown;
            return Err(CheckpointError::Foreign { path: file.path.clone(), expected: "safetensors", found });
        }
        return Err(lie(Lie::HeaderLength { claimed, room, limit: HEADER_BYTES_MAX }));
    }
    let mut json = vec![0; claimed as usize];
    file.read_exact_at(&mut json, LENGTH_BYTES)?;
    let data_start = LENGTH_BYTES + claimed;
    parse(&json, file.bytes() - data_start).map_err(lie).map(|entries| {
        let tensor = |(name, info): (String, TensorInfo)| StoredTensor {
            name,
            file: file_index,
            offset: data_start + info.data_offsets.0 as u64,
            dtype: stored(info.dtype),
            shape: info.shape,
            strides: None,
        };
        entries.into_iter().map(tensor).collect()
    })
}

/// Entries in order of their bytes, which fill `data_bytes` without gap or overlap.
fn parse(json: &[u8], data_bytes: u64) -> Result<Vec<(String, TensorInfo)>, Lie> {
    let Header { mut entries, duplicate } =
        serde_json::from_slice(json).map_err(|e| Lie::Header { reason: e.to_string() })?;
    if let Some(tensor) = duplicate {
        return Err(Lie::Duplicate { tensor });
    }
    entries.sort_by_key(|(_, info)| info.data_offsets);
    let mut expected = 0;
    for (name, info) in &entries {
        let (start, end) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
        if start != expected || end < start {
            return Err(Lie::Offsets { tensor: name.clone(), start, end, expected });
        }
        let bits = info.shape.iter().try_fold(info.dtype.bitsize() as u64, |n, &size| n.checked_mul(size as u64));
        let Some(bits) = bits else {
            return Err(Lie::Overflow { tensor: name.clone(), shape: info.shape.clone() });
        };
        if bits % 8 != 0 || bits / 8 != end - start {
            return Err(Lie::Size { tensor: name.clone(), expected: bits.div_ceil(8), found: end - start });
        }
        expected = end;
    }
    if expected != data_bytes {
        return Err(Lie::Length { expected, found: data_bytes });
    }
    Ok(entries)
}

/// The header as it is, with the first name that occurs twice: JSON maps would silently keep the last.
struct Header {
    entries: Vec<(String, TensorInfo)>,
    duplicate: Option<String>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let (mut entries, mut duplicate) = (Vec::new(), None);
                let mut seen = std::collections::HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    entries.push((name.clone(), map.next_value()?));
                    if duplicate.is_none() && !seen.insert(name.clone()) {
                        duplicate = Some(name);
                    }
                }
                Ok(Header { entries, duplicate })
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

fn stored(dtype: Dtype) -> StoredDtype {
    let other = match DType::try_from(dtype) {
        Ok(weight) => return StoredDtype::Weight(weight),
        Err(NotAWeight { found }) => found,
    };
    StoredDtype::Other(match other {
        Dtype::BOOL => "bool",
        Dtype::U8 => "u8",
        Dtype::I8 => "i8",
        Dtype::I16 => "i16",
        Dtype::U16 => "u16",
        Dtype::I32 => "i32",
        Dtype::U32 => "u32",
        Dtype::I64 => "i64",
        Dtype::U64 => "u64",
        Dtype::F64 => "f64",
        Dtype::C64 => "complex64",
        _ => "a number of 8 bits or fewer",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lie(json: &str, data_bytes: u64) -> Lie {
        parse(json.as_bytes(), data_bytes).expect_err(json)
    }

    #[test]
    fn every_lie_of_a_header_has_its_name() {
        let good = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F16","shape":[2],"data_offsets":[8,12]},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}}"#;
        let names: Vec<_> = parse(good.as_bytes(), 12).unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(lie(good, 13), Lie::Length { expected: 12, found: 13 });

        let one = |shape: &str, start: i64, end: i64| {
            format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[{start},{end}]}}}}"#)
        };
        assert!(matches!(lie(&one("[2]", 4, 12), 12), Lie::Offsets { start: 4, expected: 0, .. }));
        assert!(matches!(lie(&one("[2]", 8, 0), 8), Lie::Offsets { start: 8, .. }));
        assert!(matches!(lie(&one("[2]", -8, 0), 8), Lie::Header { .. }));
        assert!(matches!(lie(&one("[3]", 0, 8), 8), Lie::Size { expected: 12, found: 8, .. }));
        assert!(matches!(lie(&one("[4294967296,4294967296,4]", 0, 8), 8), Lie::Overflow { .. }));
        assert!(matches!(lie(&one("[1.5]", 0, 8), 8), Lie::Header { .. }));
        let twice = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
        assert_eq!(lie(twice, 8), Lie::Duplicate { tensor: "a".into() });
        let overlap = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
        assert!(matches!(lie(overlap, 12), Lie::Offsets { start: 4, expected: 8, .. }));
        let dtype = r#"{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}"#;
        assert!(matches!(lie(dtype, 8), Lie::Header { .. }));
        for broken in ["", "[", "[]", "null", "{\"a\":1}", &"[".repeat(100_000), &"{\"a\":".repeat(100_000)] {
            assert!(matches!(lie(broken, 0), Lie::Header { .. }));
        }
    }
}
