//! The parts of a bundle, and where they lie.

/// Sections begin at multiples of this.
pub(super) const SECTION_ALIGNMENT: u64 = 4096;

/// A part of a bundle. The discriminant is the entry's number in the header's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Section {
    /// What the bundle holds and where it came from, as JSON.
    Manifest = 0,
    /// The tokenizer, as the JSON of the `tokenizers` library.
    Tokenizer = 1,
    /// The tensors that stay in memory, as safetensors.
    Resident = 2,
    /// The predictors, as safetensors; absent in a bundle without them.
    Predictors = 3,
    /// Storage orders and the checksums of the groups.
    Index = 4,
    /// The neuron records. The checksum of this one covers the checksums of its groups.
    Flash = 5,
}

impl Section {
    /// All sections, in the order of the header's table.
    pub const ALL: [Section; 6] =
        [Section::Manifest, Section::Tokenizer, Section::Resident, Section::Predictors, Section::Index, Section::Flash];

    /// The name used in messages and in the format's description.
    pub const fn name(self) -> &'static str {
        match self {
            Section::Manifest => "manifest",
            Section::Tokenizer => "tokenizer",
            Section::Resident => "resident",
            Section::Predictors => "predictors",
            Section::Index => "index",
            Section::Flash => "flash",
        }
    }
}

/// A range of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Length.
    pub bytes: u64,
}

impl Extent {
    /// The byte after the last. Never wraps in an extent that a reader gives out.
    pub const fn end(&self) -> u64 {
        self.offset + self.bytes
    }
}

/// Where a section is, and what it hashes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SectionInfo {
    /// Its range.
    pub extent: Extent,
    /// XXH3-64 of that range; of the flash section, of its groups' checksums.
    pub checksum: u64,
}
