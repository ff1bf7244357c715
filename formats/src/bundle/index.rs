//! The index section: each layer's place in the flash section, its storage order, and a checksum for every group.

use super::error::Fault;
use super::layout::FlashLayout;
use super::section::{Extent, Section};
use crate::ids::NeuronId;

pub(super) const LAYERS_OFFSET: usize = 0;
pub(super) const NEURONS_OFFSET: usize = LAYERS_OFFSET + 4;
pub(super) const GROUPS_OFFSET: usize = NEURONS_OFFSET + 4;
pub(super) const INDEX_RESERVED_OFFSET: usize = GROUPS_OFFSET + 4;
pub(super) const TABLES_OFFSET: usize = INDEX_RESERVED_OFFSET + 4;

/// Within the table of a layer.
pub(super) const BASE_OFFSET: usize = 0;
pub(super) const ORDER_OFFSET: usize = BASE_OFFSET + 8;

/// One layer's part of the index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct LayerTable {
    /// Neuron at each storage position.
    pub(super) order: Vec<NeuronId>,
    /// Checksum of each group.
    pub(super) checksums: Vec<u64>,
}

/// Where a layer's checksums begin in its table: after the order, at a multiple of 8.
fn checksums_offset(neurons: usize) -> usize {
    (ORDER_OFFSET + 4 * neurons).next_multiple_of(8)
}

fn table_bytes(layout: &FlashLayout) -> usize {
    checksums_offset(layout.neurons()) + 8 * layout.groups()
}

/// Length of the index of `layers` layers.
pub(super) fn index_bytes(layout: &FlashLayout, layers: usize) -> u64 {
    (TABLES_OFFSET + layers * table_bytes(layout)) as u64
}

/// The index of a flash section that begins at `flash_offset`.
pub(super) fn encode(layout: &FlashLayout, flash_offset: u64, layers: &[LayerTable]) -> Vec<u8> {
    let mut out = Vec::with_capacity(index_bytes(layout, layers.len()) as usize);
    for number in [layers.len(), layout.neurons(), layout.groups(), 0] {
        out.extend(u32::try_from(number).expect("the limits of a model fit 32 bits").to_le_bytes());
    }
    for (layer, table) in layers.iter().enumerate() {
        out.extend(base(layout, flash_offset, layer).to_le_bytes());
        table.order.iter().for_each(|id| out.extend(id.0.to_le_bytes()));
        out.resize(out.len().next_multiple_of(8), 0);
        table.checksums.iter().for_each(|sum| out.extend(sum.to_le_bytes()));
    }
    out
}

fn base(layout: &FlashLayout, flash_offset: u64, layer: usize) -> u64 {
    flash_offset + layer as u64 * layout.layer_stride() as u64
}

/// Reads the index of `layers` layers and holds every number in it against the layout and the flash section's extent.
pub(super) fn decode(
    bytes: &[u8],
    layout: &FlashLayout,
    layers: usize,
    flash: Extent,
) -> Result<Vec<LayerTable>, Fault> {
    let fault = |what: String, expected: u64, found: u64| Fault::new(Section::Index, what, expected, found);
    let expected_bytes = index_bytes(layout, layers);
    if bytes.len() as u64 != expected_bytes {
        return Err(fault("length".into(), expected_bytes, bytes.len() as u64));
    }
    let numbers = [
        ("number of layers", LAYERS_OFFSET, layers),
        ("number of neurons", NEURONS_OFFSET, layout.neurons()),
        ("number of groups", GROUPS_OFFSET, layout.groups()),
        ("reserved number", INDEX_RESERVED_OFFSET, 0),
    ];
    for (what, offset, expected) in numbers {
        let found = u32::from_le_bytes(bytes[offset..offset + 4].try_into().expect("four bytes"));
        if found as usize != expected {
            return Err(fault(what.into(), expected as u64, found.into()));
        }
    }
    let mut seen = vec![usize::MAX; layout.neurons()];
    let mut tables = Vec::with_capacity(layers);
    for (layer, table) in bytes[TABLES_OFFSET..].chunks_exact(table_bytes(layout)).enumerate() {
        let found = u64::from_le_bytes(table[BASE_OFFSET..ORDER_OFFSET].try_into().expect("eight bytes"));
        let expected = base(layout, flash.offset, layer);
        if found != expected {
            return Err(fault(format!("place of layer {layer}"), expected, found));
        }
        let order_end = ORDER_OFFSET + 4 * layout.neurons();
        let sums = checksums_offset(layout.neurons());
        if let Some(byte) = table[order_end..sums].iter().find(|byte| **byte != 0) {
            return Err(fault(format!("padding of layer {layer}"), 0, (*byte).into()));
        }
        let ids = words(&table[ORDER_OFFSET..order_end]).map(u32::from_le_bytes);
        let order: Vec<NeuronId> = ids.map(NeuronId).collect();
        check_order(&order, layer, &mut seen)?;
        tables.push(LayerTable { order, checksums: words(&table[sums..]).map(u64::from_le_bytes).collect() });
    }
    Ok(tables)
}

fn words<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
    bytes.chunks_exact(N).map(|word| word.try_into().expect("chunks of N bytes"))
}

/// Checks that `order` names every neuron once. `seen` has one entry for each neuron: the last layer that named it.
pub(super) fn check_order(order: &[NeuronId], layer: usize, seen: &mut [usize]) -> Result<(), Fault> {
    for (position, id) in order.iter().enumerate() {
        let what = |problem: &str| format!("storage order of layer {layer}, position {position}: {problem}");
        let neurons = seen.len();
        let Some(last) = seen.get_mut(id.index()) else {
            return Err(Fault::new(Section::Index, what("neuron id"), format_args!("below {neurons}"), id));
        };
        if std::mem::replace(last, layer) == layer {
            return Err(Fault::new(Section::Index, what("neuron id"), "one not named before", id));
        }
    }
    Ok(())
}

/// What the header keeps for the flash section: the checksum of its groups' checksums, layer by layer.
pub(super) fn flash_checksum(layers: &[LayerTable]) -> u64 {
    let mut hash = xxhash_rust::xxh3::Xxh3::new();
    for sum in layers.iter().flat_map(|layer| &layer.checksums) {
        hash.update(&sum.to_le_bytes());
    }
    hash.digest()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shuffled(neurons: usize, seed: u64) -> Vec<NeuronId> {
        let mut ids: Vec<NeuronId> = (0..neurons as u32).map(NeuronId).collect();
        ids.sort_by_key(|id| super::super::checksum(&(seed ^ u64::from(id.0)).to_le_bytes()));
        ids
    }

    proptest! {
        #[test]
        fn reads_what_was_written(neurons in 1usize..40, records in 1usize..5, layers in 1usize..5, seed: u64) {
            let layout = FlashLayout::with_records(neurons, 2, 10, records, 512).unwrap();
            let tables: Vec<_> = (0..layers).map(|layer| LayerTable {
                order: shuffled(neurons, seed + layer as u64),
                checksums: (0..layout.groups() as u64).map(|g| g ^ seed).collect(),
            }).collect();
            let flash = Extent { offset: 8192, bytes: (layers * layout.layer_stride()) as u64 };
            let bytes = encode(&layout, flash.offset, &tables);
            prop_assert_eq!(bytes.len() as u64, index_bytes(&layout, layers));
            prop_assert_eq!(decode(&bytes, &layout, layers, flash).unwrap(), tables);
        }
    }
}
