//! Makes right what is between random bytes and the checks behind it: checksums and lengths.

use flashlm_formats::bundle::{Section, checksum};

/// Bytes of a bundle's header.
const HEADER_BYTES: usize = 512;
/// Where sections may begin.
const ALIGNMENT: usize = 4096;
/// Bytes of data that a made-up header may ask for.
const DATA_BYTES_MAX: u64 = 1 << 18;

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight"))
}

fn put(bytes: &mut [u8], at: usize, number: u64) {
    bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
}

/// Where a section's entry is in the header.
fn entry(section: Section) -> usize {
    24 + 24 * section as usize
}

fn range(bytes: &[u8], section: Section) -> Option<std::ops::Range<usize>> {
    let (from, length) = (number(bytes, entry(section)) as usize, number(bytes, entry(section) + 8) as usize);
    from.checked_add(length).filter(|end| *end <= bytes.len()).map(|end| from..end)
}

/// The checksums of a bundle's header and sections. Those of the groups are as they are: who loads may leave them unchecked.
pub fn bundle(bytes: &mut [u8]) {
    if bytes.len() < HEADER_BYTES {
        return;
    }
    for section in [Section::Manifest, Section::Tokenizer, Section::Index, Section::Resident, Section::Predictors] {
        if let Some(range) = range(bytes, section).filter(|range| !range.is_empty()) {
            let sum = checksum(&bytes[range]);
            put(bytes, entry(section) + 16, sum);
        }
    }
    if let Some(index) = range(bytes, Section::Index).map(|range| bytes[range].to_vec()).filter(|i| i.len() >= 16) {
        let word = |at: usize| u32::from_le_bytes(index[at..at + 4].try_into().expect("four")) as usize;
        let (neurons, groups) = (word(4), word(8));
        let head = 8 + (4 * neurons).next_multiple_of(8);
        let tables = index[16..].chunks_exact((head + 8 * groups).max(1));
        let sums: Vec<u8> = tables.flat_map(|table| table[head..].to_vec()).collect();
        let sum = checksum(&sums);
        put(bytes, entry(Section::Flash) + 16, sum);
    }
    let sum = checksum(&bytes[..HEADER_BYTES - 8]);
    put(bytes, HEADER_BYTES - 8, sum);
}

/// A good bundle with other contents in one section, at its end.
pub fn bundle_with(good: &[u8], section: Section, contents: &[u8]) -> Vec<u8> {
    let mut bytes = good.to_vec();
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
    let at = bytes.len() as u64;
    bytes.extend(contents);
    put(&mut bytes, entry(section), at);
    put(&mut bytes, entry(section) + 8, contents.len() as u64);
    let end = bytes.len() as u64;
    put(&mut bytes, 16, end);
    bundle(&mut bytes);
    bytes
}

/// The resident section of a good bundle with other JSON: its data stay.
pub fn resident_section(good: &[u8], json: &[u8]) -> Vec<u8> {
    let section = range(good, Section::Resident).expect("a good bundle");
    let data = section.start + 8 + number(good, section.start) as usize;
    [&safetensors_head(json, 64), &good[data..section.end]].concat()
}

/// The head of a safetensors file with this JSON, padded with spaces to a multiple of `alignment`.
pub fn safetensors_head(json: &[u8], alignment: usize) -> Vec<u8> {
    let padded = (8 + json.len()).next_multiple_of(alignment) - 8;
    let mut head = (padded as u64).to_le_bytes().to_vec();
    head.extend(json);
    head.resize(8 + padded, b' ');
    head
}

/// A safetensors file with this JSON, and as many zeros as the JSON names if these are few.
pub fn safetensors_file(json: &[u8]) -> Vec<u8> {
    let value: serde_json::Value = serde_json::from_slice(json).unwrap_or_default();
    let entries = value.as_object().into_iter().flat_map(|entries| entries.values());
    let end = entries.filter_map(|entry| entry["data_offsets"][1].as_u64()).max().unwrap_or(0);
    let mut file = safetensors_head(json, 1);
    file.resize(file.len() + end.min(DATA_BYTES_MAX) as usize, 0);
    file
}

/// Renames the seal of a file: with another name it is verified against nothing.
pub fn unseal(bytes: &mut [u8]) {
    if let Some(at) = bytes.windows(6).position(|word| word == b"\"seal\"") {
        bytes[at + 1] = b'm';
    }
}

/// Writes what a recording's token file says of `recording.json`, so that either may change.
pub fn tokens_of(info: &[u8], tokens: &[u8]) -> Vec<u8> {
    let mut tokens = tokens.to_vec();
    unseal(&mut tokens);
    write_digits(&mut tokens, b"\"info\":\"", &format!("{:016x}", checksum(info)));
    tokens
}

/// Writes `digits` after the first `mark`, if there is room.
fn write_digits(bytes: &mut [u8], mark: &[u8], digits: &str) {
    if let Some(at) = bytes.windows(mark.len()).position(|word| word == mark)
        && let Some(place) = bytes[at + mark.len()..].get_mut(..digits.len())
    {
        place.copy_from_slice(digits.as_bytes());
    }
}

/// An order's checksum of its data, and its seal.
pub fn order(bytes: &mut [u8]) {
    unseal(bytes);
    let Some(length) = bytes.first_chunk::<8>().map(|length| u64::from_le_bytes(*length)) else { return };
    let Some(data) = usize::try_from(length).ok().and_then(|length| bytes.get(8..)?.get(length..)) else { return };
    let sum = format!("{:016x}", checksum(data));
    write_digits(bytes, b"\"xxh3\":\"", &sum);
}
