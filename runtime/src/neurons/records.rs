//! Neuron records as a bundle stores them: where the rows of a neuron are.

use std::ops::Range;

use flashlm_formats::bundle::{Bundle, FlashLayout};
use flashlm_formats::ids::Position;
use flashlm_formats::weight_format::WeightFormat;
use flashlm_kernels::{Matrix, Row, RowLayout, SCALE_BYTES};

use crate::tensors::{element, scale_group};

/// How neuron records lie in a layer, and how their rows are stored.
#[derive(Clone, Copy, Debug)]
pub struct Records {
    /// Where rows are.
    pub layout: FlashLayout,
    /// How they are stored.
    pub format: WeightFormat,
    /// Elements of a row.
    pub cols: usize,
}

impl Records {
    /// Those of a bundle.
    pub fn of(bundle: &Bundle) -> Self {
        Self { layout: *bundle.layout(), format: bundle.manifest().ffn.dtype, cols: bundle.spec().hidden_size }
    }

    /// Bytes of a row's scales.
    pub fn scale_bytes(&self) -> usize {
        self.format.scales(self.cols) * SCALE_BYTES
    }

    /// Row `vector` of a neuron, whose group is `group`; `scales` are those of the layer.
    pub fn row<'a>(&self, group: &'a [u8], scales: &'a [u8], neuron: Position, vector: usize) -> Row<'a> {
        let (layout, row_bytes, neuron) = (&self.layout, self.layout.row_bytes(), neuron.index());
        let start = neuron % layout.records_per_group() * layout.record_bytes() + vector * row_bytes;
        let values = &group[start..start + row_bytes];
        match scale_group(self.format) {
            None => values.into(),
            Some(of) => {
                let bytes = self.scale_bytes();
                Row::quantised(values, &scales[(neuron * layout.vectors() + vector) * bytes..][..bytes], of)
            }
        }
    }
}

/// Consecutive neurons of a block, as the bundle stores them.
#[derive(Clone, Copy)]
pub struct NeuronBlock<'a> {
    pub(super) first: usize,
    pub(super) count: usize,
    pub(super) gate: Option<Matrix<'a>>,
    pub(super) up: Matrix<'a>,
    pub(super) down: Matrix<'a>,
}

impl<'a> NeuronBlock<'a> {
    /// The `count` neurons from `first` on that lie in `data`, which begins with the group that holds `first`. `scales` are those of
    /// the whole layer.
    pub fn new(records: &Records, data: &'a [u8], scales: &'a [u8], Range { start: first, end }: Range<usize>) -> Self {
        let Records { layout, format, cols } = records;
        let (count, row_bytes) = (end - first, layout.row_bytes());
        let scale_bytes = records.scale_bytes();
        let matrix = |vector: usize| {
            let rows = RowLayout {
                offset: vector * row_bytes,
                row_stride: layout.record_bytes(),
                rows_per_group: layout.records_per_group(),
                group_stride: layout.group_bytes(),
            };
            let matrix = Matrix::strided(element(*format), data, count, *cols, rows);
            let matrix = matrix.expect("a block of records holds whole groups");
            let Some(group) = scale_group(*format) else { return matrix };
            let scales = &scales[(first * layout.vectors() + vector) * scale_bytes..];
            matrix
                .with_scales(scales, layout.vectors() * scale_bytes, group)
                .expect("every row of a layer has its scales")
        };
        let up = layout.vectors() - 2;
        Self { first, count, gate: (up > 0).then(|| matrix(0)), up: matrix(up), down: matrix(up + 1) }
    }
}
