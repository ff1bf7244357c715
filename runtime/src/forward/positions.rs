//! Rotary tables and ALiBi biases, for the kinds of positions that a model's layers have.

use flashlm_formats::model::{LayerSpec, ModelSpec, Positions, RopeScaling};
use half::bf16;

use crate::buffers::Buffers;

/// The tables of all layers: one for each kind of positions, shared by the layers that have it.
pub struct PositionTables(Vec<(Positions, PositionTable)>);

impl PositionTables {
    /// Tables for `context` positions.
    pub fn new(buffers: &mut Buffers, spec: &ModelSpec, context: usize) -> Self {
        let heads = spec.attention().heads;
        let table = |kind| (kind, PositionTable::new(buffers, kind, heads, context));
        Self(kinds(spec).into_iter().map(table).collect())
    }

    /// That of a layer.
    pub fn of(&self, layer: &LayerSpec) -> &PositionTable {
        let found = self.0.iter().find(|(kind, _)| *kind == layer.positions);
        &found.expect("every layer of the model has a table").1
    }
}

/// The kinds of positions that the layers have; hardly ever more than two.
fn kinds(spec: &ModelSpec) -> Vec<Positions> {
    let mut kinds = Vec::new();
    for layer in &spec.layers {
        if !kinds.contains(&layer.positions) {
            kinds.push(layer.positions);
        }
    }
    kinds
}

/// Cosines and sines of every position up to a context, or ALiBi's biases.
pub enum PositionTable {
    /// The layer's attention does not see positions.
    None,
    /// `cos` and `sin` are `[context, dims / 2]`.
    Rotary {
        /// Rotated dimensions of a head.
        dims: usize,
        /// Cosines.
        cos: Vec<f32>,
        /// Sines.
        sin: Vec<f32>,
    },
    /// `bias[head * context + position]`, before the division by `sqrt(head_dim)`.
    Alibi {
        /// The biases.
        bias: Vec<f32>,
        /// Positions of one head.
        context: usize,
    },
}

impl PositionTable {
    fn new(buffers: &mut Buffers, positions: Positions, heads: usize, context: usize) -> Self {
        match positions {
            Positions::None => Self::None,
            Positions::Rotary { dims, theta, scaling } => {
                let frequencies = rotary_frequencies(dims, theta, scaling);
                let angles = || (0..context).flat_map(|p| frequencies.iter().map(move |f| p as f32 * f));
                let len = context * frequencies.len();
                let cos = buffers.listed(len, angles().map(f32::cos));
                Self::Rotary { dims, cos, sin: buffers.listed(len, angles().map(f32::sin)) }
            }
            Positions::Alibi => {
                // The published model code builds the whole bias in bfloat16: slope, position and product are rounded.
                let biases = alibi_slopes(heads).into_iter().flat_map(|slope| {
                    (0..context).map(move |p| {
                        let (slope, p) = (bf16::from_f32(slope).to_f32(), bf16::from_f32(p as f32).to_f32());
                        bf16::from_f32(slope * p).to_f32()
                    })
                });
                Self::Alibi { bias: buffers.listed(heads * context, biases), context }
            }
        }
    }
}

fn rotary_frequencies(dims: usize, theta: f32, scaling: Option<RopeScaling>) -> Vec<f32> {
    (0..dims / 2)
        .map(|i| {
            let frequency = 1.0 / theta.powf((2 * i) as f32 / dims as f32);
            match scaling {
                None => frequency,
                Some(RopeScaling::Linear { factor }) => frequency / factor,
                Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions }) => {
                    let original = original_positions as f32;
                    let wavelength = 2.0 * std::f32::consts::PI / frequency;
                    if wavelength > original / low_freq_factor {
                        frequency / factor
                    } else if wavelength < original / high_freq_factor {
                        frequency
                    } else {
                        let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * frequency / factor + smooth * frequency
                    }
                }
            }
        })
        .collect()
}

/// Slopes of the ALiBi paper: a geometric series for a power of two heads, the remaining heads from the next finer one.
fn alibi_slopes(heads: usize) -> Vec<f32> {
    let lower = if heads.is_power_of_two() { heads } else { heads.next_power_of_two() / 2 };
    let base = |n: usize| 2f64.powf(-(2f64.powf(-((n as f64).log2() - 3.0)))) as f32;
    let (first, extra) = (base(lower), base(2 * lower));
    let series = (1..=lower).map(|p| first.powi(p as i32));
    series.chain((0..heads - lower).map(|i| extra.powi(2 * i as i32 + 1))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_of_eight_heads_halve() {
        let slopes = alibi_slopes(8);
        assert_eq!(slopes.len(), 8);
        for (i, s) in slopes.iter().enumerate() {
            assert!((s - 0.5f32.powi(i as i32 + 1)).abs() < 1e-6);
        }
    }

    #[test]
    fn six_heads_take_four_and_two_finer_ones() {
        let slopes = alibi_slopes(6);
        assert!((slopes[0] - 0.25).abs() < 1e-6 && (slopes[3] - 1.0 / 256.0).abs() < 1e-6);
        assert!((slopes[4] - 0.5).abs() < 1e-6 && (slopes[5] - 0.125).abs() < 1e-6);
    }

    #[test]
    fn llama3_scaling_keeps_high_and_divides_low_frequencies() {
        let scaling =
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_positions: 8192 };
        let plain = rotary_frequencies(128, 500_000.0, None);
        let scaled = rotary_frequencies(128, 500_000.0, Some(scaling));
        assert_eq!(plain[0], scaled[0]);
        assert!((plain[63] / scaled[63] - 8.0).abs() < 1e-4);
    }
}
