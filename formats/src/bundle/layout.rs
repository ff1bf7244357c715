//! Where a neuron's weights lie in a layer of the flash section: arithmetic only, no file.
//!
//! A *record* is `[gate row,] up row, down column` of one neuron. A *group* is the unit of reading: one or more records next
//! to each other, then zeros up to a multiple of the alignment. All groups of a bundle have the same length; the last one of a
//! layer may hold fewer records. Every layer begins at a multiple of 4 KiB, with zeros after the groups of the one before it.
//! Positions count in storage order.

use std::ops::Range;

use super::section::SECTION_ALIGNMENT;
use crate::model::ModelSpec;
use crate::weight_format::WeightFormat;

/// Groups are padded to a multiple of this unless told otherwise: the smallest step that direct reads of most disks accept.
pub const DEFAULT_ALIGNMENT: usize = 512;
/// As many records make a group as fit this, and at least one, unless told otherwise.
pub const DEFAULT_GROUP_BYTES: usize = 4096;

/// Smallest and largest alignment that a bundle may have.
const ALIGNMENTS: Range<usize> = 512..(1 << 20) + 1;
/// Longest group: beyond it, reading a neuron means reading a crowd.
const GROUP_BYTES_MAX: usize = 64 << 20;

/// What may be chosen about groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayoutOptions {
    /// Groups are padded to a multiple of it; a power of two.
    pub alignment: usize,
    /// As many records make a group as fit into it, and at least one.
    pub group_bytes: usize,
}

impl Default for LayoutOptions {
    fn default() -> Self {
        Self { alignment: DEFAULT_ALIGNMENT, group_bytes: DEFAULT_GROUP_BYTES }
    }
}

/// Why records cannot be laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// An alignment that is no power of two, or outside the range.
    #[error("alignment {found}: it must be a power of two from {} to {}", ALIGNMENTS.start, ALIGNMENTS.end - 1)]
    Alignment {
        /// The alignment.
        found: usize,
    },
    /// A group longer than the limit.
    #[error("groups of {records} records of {record_bytes} bytes: a group may have {max} bytes at most")]
    GroupTooLong {
        /// Records per group.
        records: usize,
        /// Bytes of a record.
        record_bytes: usize,
        /// The limit.
        max: usize,
    },
    /// No neurons, no weights or no records in a group.
    #[error("{neurons} neurons of {row_bytes} bytes a row in groups of {records}: each must be at least 1")]
    Empty {
        /// Neurons of a layer.
        neurons: usize,
        /// Bytes of a row.
        row_bytes: usize,
        /// Records per group.
        records: usize,
    },
    /// Sizes that cannot be added up.
    #[error("{neurons} neurons of {row_bytes} bytes a row: a layer of that size has no length in 64 bits")]
    TooLarge {
        /// Neurons of a layer.
        neurons: usize,
        /// Bytes of a row.
        row_bytes: usize,
    },
}

/// Records and groups of one layer; the same for every layer of a bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlashLayout {
    neurons: usize,
    vectors: usize,
    row_bytes: usize,
    record_bytes: usize,
    records_per_group: usize,
    group_bytes: usize,
    groups: usize,
    layer_bytes: usize,
    layer_stride: usize,
    alignment: usize,
}

impl FlashLayout {
    /// The layout of `model`'s FFN with rows of `format`.
    ///
    /// # Errors
    /// See [`LayoutError`].
    pub fn new(
        model: &ModelSpec,
        format: impl Into<WeightFormat>,
        options: LayoutOptions,
    ) -> Result<Self, LayoutError> {
        let (neurons, vectors) = (model.ffn().size, model.ffn().vectors());
        let row_bytes = format.into().row_bytes(model.hidden_size);
        let record_bytes = row_bytes.saturating_mul(vectors);
        let records = (options.group_bytes / record_bytes.max(1)).clamp(1, neurons.max(1));
        Self::with_records(neurons, vectors, row_bytes, records, options.alignment)
    }

    /// The layout of `neurons` records of `vectors` rows, with a given number of records in a group.
    ///
    /// # Errors
    /// See [`LayoutError`].
    pub fn with_records(
        neurons: usize,
        vectors: usize,
        row_bytes: usize,
        records_per_group: usize,
        alignment: usize,
    ) -> Result<Self, LayoutError> {
        if !alignment.is_power_of_two() || !ALIGNMENTS.contains(&alignment) {
            return Err(LayoutError::Alignment { found: alignment });
        }
        if neurons == 0 || vectors == 0 || row_bytes == 0 || records_per_group == 0 {
            return Err(LayoutError::Empty { neurons, row_bytes, records: records_per_group });
        }
        let too_large = LayoutError::TooLarge { neurons, row_bytes };
        let record_bytes = row_bytes.checked_mul(vectors).ok_or(too_large)?;
        let filled = record_bytes.checked_mul(records_per_group).filter(|bytes| *bytes <= GROUP_BYTES_MAX);
        let filled = filled.ok_or(LayoutError::GroupTooLong {
            records: records_per_group,
            record_bytes,
            max: GROUP_BYTES_MAX,
        })?;
        let group_bytes = filled.next_multiple_of(alignment);
        let groups = neurons.div_ceil(records_per_group);
        let layer_bytes = groups.checked_mul(group_bytes).ok_or(too_large)?;
        let layer_stride = layer_bytes.checked_next_multiple_of(SECTION_ALIGNMENT as usize).ok_or(too_large)?;
        Ok(Self {
            neurons,
            vectors,
            row_bytes,
            record_bytes,
            records_per_group,
            group_bytes,
            groups,
            layer_bytes,
            layer_stride,
            alignment,
        })
    }

    /// Neurons of a layer.
    pub const fn neurons(&self) -> usize {
        self.neurons
    }

    /// Rows of a record: `[gate,] up, down`.
    pub const fn vectors(&self) -> usize {
        self.vectors
    }

    /// Bytes of one row of a record.
    pub const fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// Bytes of a record.
    pub const fn record_bytes(&self) -> usize {
        self.record_bytes
    }

    /// Records of a full group.
    pub const fn records_per_group(&self) -> usize {
        self.records_per_group
    }

    /// Bytes of a group, padding included; a multiple of the alignment.
    pub const fn group_bytes(&self) -> usize {
        self.group_bytes
    }

    /// Groups of a layer.
    pub const fn groups(&self) -> usize {
        self.groups
    }

    /// Bytes of a layer's groups, their padding included.
    pub const fn layer_bytes(&self) -> usize {
        self.layer_bytes
    }

    /// Bytes from the start of a layer to that of the next one in a bundle: its groups, and zeros up to a multiple of 4 KiB.
    pub const fn layer_stride(&self) -> usize {
        self.layer_stride
    }

    /// Alignment of a group.
    pub const fn alignment(&self) -> usize {
        self.alignment
    }

    /// Bytes of a layer's stride that hold no weights.
    pub const fn layer_padding_bytes(&self) -> usize {
        self.layer_stride - self.neurons * self.record_bytes
    }

    /// The group that holds the neuron at `position`.
    pub const fn group_of(&self, position: usize) -> usize {
        position / self.records_per_group
    }

    /// The positions that `group` holds.
    pub fn positions_of(&self, group: usize) -> Range<usize> {
        let first = group * self.records_per_group;
        first.min(self.neurons)..(first + self.records_per_group).min(self.neurons)
    }

    /// Where `group` begins in its layer.
    pub const fn group_offset(&self, group: usize) -> usize {
        group * self.group_bytes
    }

    /// Where the record of the neuron at `position` begins in its layer.
    pub const fn record_offset(&self, position: usize) -> usize {
        self.group_of(position) * self.group_bytes + position % self.records_per_group * self.record_bytes
    }

    /// Where row `vector` of that record begins in its layer.
    pub const fn vector_offset(&self, position: usize, vector: usize) -> usize {
        self.record_offset(position) + vector * self.row_bytes
    }

    /// The part of `group`, counted from its start, that is padding.
    pub fn group_padding(&self, group: usize) -> Range<usize> {
        self.positions_of(group).len() * self.record_bytes..self.group_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_layouts() {
        // neurons, vectors, row bytes, group bytes wanted, alignment -> records, group bytes, groups
        let table = [
            ("opt-125m", 3072, 2, 1536, 4096, 512, (1, 3072, 3072)),
            ("opt-125m at 4 KiB", 3072, 2, 1536, 4096, 4096, (1, 4096, 3072)),
            ("opt-6.7b", 16384, 2, 8192, 4096, 512, (1, 16384, 16384)),
            ("tiny, 256 wide", 1000, 2, 512, 4096, 512, (4, 4096, 250)),
            ("tiny, 48 wide, gated", 100, 3, 96, 4096, 512, (14, 4096, 8)),
            ("falcon-7b", 18176, 2, 9088, 4096, 512, (1, 18432, 18176)),
            ("opt-6.7b, int8", 16384, 2, 4096, 4096, 512, (1, 8192, 16384)),
            ("opt-6.7b, int4", 16384, 2, 2048, 4096, 512, (1, 4096, 16384)),
            ("opt-1.3b, int4", 8192, 2, 1024, 4096, 512, (2, 4096, 4096)),
        ];
        for (name, neurons, vectors, row, wanted, alignment, expected) in table {
            let records = (wanted / (row * vectors)).max(1);
            let l = FlashLayout::with_records(neurons, vectors, row, records, alignment).unwrap();
            assert_eq!((l.records_per_group(), l.group_bytes(), l.groups()), expected, "{name}");
        }
    }

    #[test]
    fn refuses_what_cannot_be() {
        let layout = FlashLayout::with_records;
        assert!(matches!(layout(1, 2, 8, 1, 0), Err(LayoutError::Alignment { found: 0 })));
        assert!(matches!(layout(1, 2, 8, 1, 256), Err(LayoutError::Alignment { found: 256 })));
        assert!(matches!(layout(1, 2, 8, 1, 1000), Err(LayoutError::Alignment { .. })));
        assert!(matches!(layout(1, 2, 8, 1, 2 << 20), Err(LayoutError::Alignment { .. })));
        assert!(matches!(layout(0, 2, 8, 1, 512), Err(LayoutError::Empty { .. })));
        assert!(matches!(layout(1, 2, 0, 1, 512), Err(LayoutError::Empty { .. })));
        assert!(matches!(layout(1, 2, 8, 0, 512), Err(LayoutError::Empty { .. })));
        assert!(matches!(layout(1, 2, usize::MAX, 1, 512), Err(LayoutError::TooLarge { .. })));
        assert!(matches!(layout(1, 2, 1024, usize::MAX, 512), Err(LayoutError::GroupTooLong { .. })));
        assert!(matches!(layout(usize::MAX, 2, 1024, 1, 512), Err(LayoutError::TooLarge { .. })));
    }

    proptest! {
        #[test]
        fn rows_fill_a_layer_without_overlap(
            neurons in 1usize..300, vectors in 2usize..4, row in 1usize..700, records in 1usize..9, shift in 9u32..13,
        ) {
            let l = FlashLayout::with_records(neurons, vectors, row, records, 1 << shift).unwrap();
            let mut used = vec![false; l.layer_stride()];
            for position in 0..neurons {
                prop_assert!(l.positions_of(l.group_of(position)).contains(&position));
                for vector in 0..vectors {
                    let at = l.vector_offset(position, vector);
                    prop_assert!(at >= l.group_offset(l.group_of(position)));
                    for byte in &mut used[at..at + row] {
                        prop_assert!(!*byte);
                        *byte = true;
                    }
                }
            }
            for group in 0..l.groups() {
                prop_assert_eq!(l.group_offset(group) % l.alignment(), 0);
                let padding = l.group_padding(group);
                let start = l.group_offset(group);
                prop_assert!(used[start..start + padding.start].iter().all(|u| *u));
                prop_assert!(used[start + padding.start..start + padding.end].iter().all(|u| !*u));
            }
            prop_assert_eq!(l.layer_stride() % 4096, 0);
            prop_assert!(l.layer_stride() - l.layer_bytes() < 4096);
            prop_assert!(used[l.layer_bytes()..].iter().all(|u| !*u));
            prop_assert_eq!(used.iter().filter(|u| !**u).count(), l.layer_padding_bytes());
        }
    }
}
