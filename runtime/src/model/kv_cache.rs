//! Keys and values of the tokens so far.
//!
//! Each layer holds, for every key/value head, a `[context, head_dim]` matrix of keys and one of values, so that attention is
//! the same matrix products as everywhere else. Elements are f16 or f32. What f16 cannot hold is an error: stored as infinity it
//! would be left out of the text without a word.

use flashlm_formats::model::ModelSpec;
use flashlm_io::AlignedMemory;
use flashlm_kernels::{Element, Matrix};

use crate::error::{Result, RuntimeError};

/// From here on a number becomes infinite when it is rounded to f16, whose largest is 65504.
const F16_INFINITE: f32 = 65520.0;

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvDtype {
    /// Half precision: the default, unless the bundle says that it is too narrow.
    F16,
    /// Single precision: twice the memory, exact.
    F32,
}

impl KvDtype {
    fn element(self) -> Element {
        match self {
            KvDtype::F16 => Element::F16,
            KvDtype::F32 => Element::F32,
        }
    }
}

/// The cache of one sequence.
pub struct KvCache {
    memory: AlignedMemory,
    element: Element,
    kv_heads: usize,
    head_dim: usize,
    context: usize,
    len: usize,
}

impl KvCache {
    /// Room for `context` tokens in `layers` layers of `spec`.
    pub fn new(spec: &ModelSpec, layers: usize, context: usize, dtype: KvDtype) -> Result<Self> {
        let (kv_heads, head_dim) = (spec.attention.kv_heads, spec.attention.head_dim);
        let bytes = layers * Self::layer_bytes(spec, context, dtype);
        let memory = AlignedMemory::new(bytes)?;
        Ok(Self { memory, element: dtype.element(), kv_heads, head_dim, context, len: 0 })
    }

    /// Bytes of one layer.
    pub fn layer_bytes(spec: &ModelSpec, context: usize, dtype: KvDtype) -> usize {
        2 * spec.attention.kv_heads * context * spec.attention.head_dim * dtype.element().bytes()
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens there is room for.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Forgets all tokens from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Counts `tokens` more as held, once every layer has stored them.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
        debug_assert!(self.len <= self.context);
    }

    fn plane_bytes(&self) -> usize {
        self.context * self.head_dim * self.element.bytes()
    }

    fn plane(&self, layer: usize, value: bool, head: usize) -> usize {
        ((layer * 2 + usize::from(value)) * self.kv_heads + head) * self.plane_bytes()
    }

    fn store(&mut self, start: usize, row: &[f32]) {
        let bytes = &mut self.memory.as_mut_slice()[start..start + row.len() * self.element.bytes()];
        match self.element {
            Element::F32 => {
                for (to, value) in bytes.chunks_exact_mut(4).zip(row) {
                    to.copy_from_slice(&value.to_le_bytes());
                }
            }
            _ => flashlm_kernels::store_f16(row, bytemuck::cast_slice_mut(bytes)),
        }
    }

    /// Stores the keys and values (`[kv_heads, head_dim]` each) of the token at `position` in `layer`.
    ///
    /// # Errors
    /// `KvRange` where f16 does not hold one of them, `KvNoNumber` where one is no finite number.
    pub(crate) fn put(&mut self, layer: usize, position: usize, keys: &[f32], values: &[f32]) -> Result<()> {
        let (key, value) = (largest(keys), largest(values));
        if !(key.is_finite() && value.is_finite()) {
            let value = if key.is_finite() { value } else { key };
            return Err(RuntimeError::KvNoNumber { layer, position, value });
        }
        let value = key.max(value);
        if self.element == Element::F16 && value >= F16_INFINITE {
            return Err(RuntimeError::KvRange { layer, position, value });
        }
        let row = position * self.head_dim * self.element.bytes();
        for head in 0..self.kv_heads {
            let part = head * self.head_dim..(head + 1) * self.head_dim;
            self.store(self.plane(layer, false, head) + row, &keys[part.clone()]);
            self.store(self.plane(layer, true, head) + row, &values[part]);
        }
        Ok(())
    }

    fn matrix(&self, layer: usize, value: bool, head: usize, tokens: usize) -> Matrix<'_> {
        let start = self.plane(layer, value, head);
        let data = &self.memory.as_slice()[start..start + tokens * self.head_dim * self.element.bytes()];
        Matrix::new(self.element, data, tokens, self.head_dim).expect("planes are sized for the context")
    }

    /// Keys `[tokens, head_dim]` of one head.
    pub(crate) fn keys(&self, layer: usize, head: usize, tokens: usize) -> Matrix<'_> {
        self.matrix(layer, false, head, tokens)
    }

    /// Values `[tokens, head_dim]` of one head.
    pub(crate) fn values(&self, layer: usize, head: usize, tokens: usize) -> Matrix<'_> {
        self.matrix(layer, true, head, tokens)
    }
}

/// The largest magnitude, or what is no number where there is one: as bits, magnitudes are in order and infinity and NaN are above them.
fn largest(values: &[f32]) -> f32 {
    f32::from_bits(values.iter().fold(0, |largest, value| largest.max(value.to_bits() & 0x7fff_ffff)))
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    #[test]
    fn the_largest_is_found_and_no_number_is_none() {
        assert_eq!(largest(&[]), 0.0);
        assert_eq!(largest(&[1.0, -3.0, 2.0]), 3.0);
        assert_eq!(largest(&[1.0, f32::NEG_INFINITY]), f32::INFINITY);
        assert!(largest(&[f32::INFINITY, -f32::NAN, 5.0]).is_nan());
    }

    #[test]
    fn the_bound_of_f16_is_where_it_rounds_to_infinity() {
        assert!(f16::from_f32(F16_INFINITE).is_infinite());
        assert!(f16::from_f32(f32::from_bits(F16_INFINITE.to_bits() - 1)).is_finite());
    }
}
