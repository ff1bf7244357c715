//! The first sector of a bundle: magic, version, the table of sections, and a checksum of itself.
//!
//! It is the only thing that is ever overwritten in a bundle, and it fits the smallest unit that disks write at once.

use super::checksum;
use super::error::Fault;
use super::section::{Extent, SECTION_ALIGNMENT, Section, SectionInfo};

/// Guard bytes as in PNG: a byte outside ASCII, a name, both kinds of line end, and the end-of-file of old systems.
pub(crate) const MAGIC: [u8; 8] = *b"\x89FLM\r\n\x1a\n";

/// The bundle format that this crate writes, and the newest that it reads.
pub const FORMAT_VERSION: u32 = 4;
/// The oldest format that this crate reads.
pub(super) const OLDEST_VERSION: u32 = 1;

/// Bytes of the header.
pub(super) const HEADER_BYTES: usize = 512;

pub(crate) const MAGIC_OFFSET: usize = 0;
pub(super) const VERSION_OFFSET: usize = MAGIC_OFFSET + MAGIC.len();
pub(super) const SECTION_COUNT_OFFSET: usize = VERSION_OFFSET + 4;
pub(super) const FILE_BYTES_OFFSET: usize = SECTION_COUNT_OFFSET + 4;
pub(super) const SECTION_TABLE_OFFSET: usize = FILE_BYTES_OFFSET + 8;
/// Bytes of one entry of the table: offset, length, checksum.
pub(super) const SECTION_ENTRY_BYTES: usize = 24;
pub(super) const RESERVED_OFFSET: usize = SECTION_TABLE_OFFSET + Section::ALL.len() * SECTION_ENTRY_BYTES;
pub(super) const HEADER_CHECKSUM_OFFSET: usize = HEADER_BYTES - 8;

/// The header's contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// End of the last section.
    pub(super) file_bytes: u64,
    pub(super) sections: [SectionInfo; Section::ALL.len()],
}

/// Why a header is refused.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum HeaderProblem {
    NotABundle,
    TooNew { found: u32 },
    Fault(Fault),
}

impl From<Fault> for HeaderProblem {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("eight bytes"))
}

impl Header {
    pub(super) fn section(&self, section: Section) -> SectionInfo {
        self.sections[section as usize]
    }

    /// Sections that are there, in the order in which they lie in the file.
    pub(super) fn in_file_order(&self) -> Vec<(Section, Extent)> {
        let present = |s: &Section| self.section(*s) != SectionInfo::default();
        let mut list: Vec<_> = Section::ALL.into_iter().filter(present).map(|s| (s, self.section(s).extent)).collect();
        list.sort_by_key(|(_, extent)| extent.offset);
        list
    }

    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        let mut put = |offset: usize, bytes: &[u8]| out[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(MAGIC_OFFSET, &MAGIC);
        put(VERSION_OFFSET, &FORMAT_VERSION.to_le_bytes());
        put(SECTION_COUNT_OFFSET, &(Section::ALL.len() as u32).to_le_bytes());
        put(FILE_BYTES_OFFSET, &self.file_bytes.to_le_bytes());
        for (number, info) in self.sections.iter().enumerate() {
            let entry = SECTION_TABLE_OFFSET + number * SECTION_ENTRY_BYTES;
            put(entry, &info.extent.offset.to_le_bytes());
            put(entry + 8, &info.extent.bytes.to_le_bytes());
            put(entry + 16, &info.checksum.to_le_bytes());
        }
        let sum = checksum(&out[..HEADER_CHECKSUM_OFFSET]);
        out[HEADER_CHECKSUM_OFFSET..].copy_from_slice(&sum.to_le_bytes());
        out
    }

    /// Names the contents of the whole file: the header's checksum, which covers those of all sections.
    pub(super) fn identity(&self) -> u64 {
        u64_at(&self.encode(), HEADER_CHECKSUM_OFFSET)
    }

    /// Reads the first sector. Says nothing yet about the file after it: see [`Header::check`].
    ///
    /// The checksum is looked at before the version: its place is the same in every version, so that a damaged version
    /// number is not taken for a newer format.
    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, HeaderProblem> {
        if bytes[..MAGIC.len()] != MAGIC {
            return Err(HeaderProblem::NotABundle);
        }
        let (expected, found) = (u64_at(bytes, HEADER_CHECKSUM_OFFSET), checksum(&bytes[..HEADER_CHECKSUM_OFFSET]));
        if expected != found {
            return Err(Fault::checksum(None, "the header itself", expected, found).into());
        }
        let version = u32_at(bytes, VERSION_OFFSET);
        if version > FORMAT_VERSION {
            return Err(HeaderProblem::TooNew { found: version });
        }
        if version < OLDEST_VERSION {
            let range = format!("{OLDEST_VERSION} to {FORMAT_VERSION}");
            return Err(Fault::new(None, "format version", range, version).into());
        }
        let count = u32_at(bytes, SECTION_COUNT_OFFSET);
        if count as usize != Section::ALL.len() {
            return Err(Fault::new(None, "number of sections", Section::ALL.len(), count).into());
        }
        if let Some(at) = (RESERVED_OFFSET..HEADER_CHECKSUM_OFFSET).find(|&at| bytes[at] != 0) {
            return Err(Fault::new(None, format!("reserved byte {at}"), 0, bytes[at]).into());
        }
        let sections = std::array::from_fn(|number| {
            let entry = SECTION_TABLE_OFFSET + number * SECTION_ENTRY_BYTES;
            let extent = Extent { offset: u64_at(bytes, entry), bytes: u64_at(bytes, entry + 8) };
            SectionInfo { extent, checksum: u64_at(bytes, entry + 16) }
        });
        Ok(Self { file_bytes: u64_at(bytes, FILE_BYTES_OFFSET), sections })
    }

    /// Checks the table of sections in one pass through the file: each begins after the last one's end, none reaches
    /// beyond the end that the header states, and the last one ends there.
    pub(super) fn check(&self) -> Result<(), Fault> {
        for section in Section::ALL {
            if self.section(section) == SectionInfo::default() && section != Section::Predictors {
                return Err(Fault::new(section, "section", "to be there", "nothing"));
            }
        }
        let mut end = HEADER_BYTES as u64;
        for (section, extent) in self.in_file_order() {
            if extent.bytes == 0 {
                return Err(Fault::new(section, "length", "more than 0", 0));
            }
            if !extent.offset.is_multiple_of(SECTION_ALIGNMENT) {
                let expected = format!("a multiple of {SECTION_ALIGNMENT}");
                return Err(Fault::new(section, "offset", expected, extent.offset));
            }
            if extent.offset < end {
                return Err(Fault::new(
                    section,
                    "offset",
                    format!("at least {end}, the end of what is before it"),
                    extent.offset,
                ));
            }
            end = extent.offset.checked_add(extent.bytes).filter(|end| *end <= self.file_bytes).ok_or_else(|| {
                let expected = format!("at most {} from offset {}", self.file_bytes, extent.offset);
                Fault::new(section, "length", expected, extent.bytes)
            })?;
        }
        if end != self.file_bytes {
            return Err(Fault::new(None, "end of the last section", self.file_bytes, end));
        }
        Ok(())
    }
}
