//! Norms and rotary positions over slices of f32, in plain Rust: the same bits on every instruction set.

/// `out = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias`; the statistics are summed in f64.
///
/// # Panics
/// If the lengths differ.
pub fn layer_norm(x: &[f32], weight: Option<&[f32]>, bias: Option<&[f32]>, eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "layer_norm: input against output");
    let n = x.len() as f64;
    let mean = sum(x, |v| v) / n;
    let variance = sum(x, |v| (v - mean) * (v - mean)) / n;
    let scale = 1.0 / (variance + f64::from(eps)).sqrt();
    let (mean, scale) = (mean as f32, scale as f32);
    for (o, &v) in out.iter_mut().zip(x) {
        *o = (v - mean) * scale;
    }
    scale_and_shift(weight, bias, out);
}

/// `out = x / sqrt(mean(x^2) + eps) * weight`; the mean is summed in f64.
///
/// # Panics
/// If the lengths differ.
pub fn rms_norm(x: &[f32], weight: Option<&[f32]>, eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "rms_norm: input against output");
    let mean_square = sum(x, |v| v * v) / x.len() as f64;
    let scale = (1.0 / (mean_square + f64::from(eps)).sqrt()) as f32;
    for (o, &v) in out.iter_mut().zip(x) {
        *o = v * scale;
    }
    scale_and_shift(weight, None, out);
}

fn scale_and_shift(weight: Option<&[f32]>, bias: Option<&[f32]>, out: &mut [f32]) {
    if let Some(weight) = weight {
        assert_eq!(weight.len(), out.len(), "norm: weights against output");
        out.iter_mut().zip(weight).for_each(|(o, w)| *o *= w);
    }
    if let Some(bias) = bias {
        assert_eq!(bias.len(), out.len(), "norm: biases against output");
        out.iter_mut().zip(bias).for_each(|(o, b)| *o += b);
    }
}

/// The sum of `f(x)` in f64, in eight interleaved parts that the compiler can keep in vectors.
pub(crate) fn sum(x: &[f32], f: impl Fn(f64) -> f64) -> f64 {
    let mut parts = [0f64; 8];
    let (blocks, rest) = x.as_chunks::<8>();
    for block in blocks {
        for (part, &v) in parts.iter_mut().zip(block) {
            *part += f(f64::from(v));
        }
    }
    for (part, &v) in parts.iter_mut().zip(rest) {
        *part += f(f64::from(v));
    }
    parts.iter().sum()
}

/// Rotates the first `dims` elements of a head by its position's angles: element `i` with element `i + dims / 2`, by
/// `cos[i]` and `sin[i]` of `dims / 2` angles.
///
/// # Panics
/// If `dims` is odd or more than the head has, or there are fewer than `dims / 2` angles.
pub fn rope_rotate_half(head: &mut [f32], dims: usize, cos: &[f32], sin: &[f32]) {
    assert!(dims.is_multiple_of(2), "rope: {dims} dimensions do not make pairs");
    let (low, high) = head[..dims].split_at_mut(dims / 2);
    let (cos, sin) = (&cos[..dims / 2], &sin[..dims / 2]);
    for i in 0..dims / 2 {
        let (a, b) = (low[i], high[i]);
        low[i] = a * cos[i] - b * sin[i];
        high[i] = b * cos[i] + a * sin[i];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 % 1013) as f32 - 500.0) / 97.0 + 3.0).collect()
    }

    #[test]
    fn norms_agree_with_their_definition() {
        for n in (1..70).chain([1000, 4096]) {
            let (x, w, b) = (values(n), values(n + 1)[1..].to_vec(), values(n + 2)[2..].to_vec());
            let wide: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
            let mean = wide.iter().sum::<f64>() / n as f64;
            let variance = wide.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n as f64;
            let square = wide.iter().map(|v| v * v).sum::<f64>() / n as f64;
            let (mut layer, mut rms, mut bare) = (vec![0.0; n], vec![0.0; n], vec![0.0; n]);
            layer_norm(&x, Some(&w), Some(&b), 1e-5, &mut layer);
            rms_norm(&x, Some(&w), 1e-6, &mut rms);
            layer_norm(&x, None, None, 1e-5, &mut bare);
            for i in 0..n {
                let normal = (wide[i] - mean) / (variance + 1e-5).sqrt();
                let want = normal * f64::from(w[i]) + f64::from(b[i]);
                assert!((f64::from(bare[i]) - normal).abs() < 2e-6, "{n} [{i}]: {} for {normal}", bare[i]);
                assert!((f64::from(layer[i]) - want).abs() < 2e-5, "{n} [{i}]: {} for {want}", layer[i]);
                let want = wide[i] / (square + 1e-6).sqrt() * f64::from(w[i]);
                assert!((f64::from(rms[i]) - want).abs() < 1e-5, "{n} [{i}]: {} for {want}", rms[i]);
            }
        }
    }

    #[test]
    fn a_large_offset_does_not_drown_the_variance() {
        let x: Vec<f32> = (0..4096).map(|i| 1000.0 + (i % 2) as f32).collect();
        let mut out = vec![0.0; x.len()];
        layer_norm(&x, None, None, 1e-5, &mut out);
        assert!(out.iter().zip(&x).all(|(o, v)| (o - (v - 1000.5) * 2.0).abs() < 1e-3), "{:?}", &out[..2]);
    }

    #[test]
    fn rope_rotates_pairs_and_leaves_the_rest() {
        let angles: Vec<f32> = (0..4).map(|i| 0.3 * i as f32 + 0.1).collect();
        let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
        let before = values(12);
        let mut head = before.clone();
        rope_rotate_half(&mut head, 8, &cos, &sin);
        for i in 0..4 {
            let (a, b) = (before[i], before[i + 4]);
            assert_eq!(head[i], a * cos[i] - b * sin[i]);
            assert_eq!(head[i + 4], b * cos[i] + a * sin[i]);
        }
        assert_eq!(head[8..], before[8..]);
    }
}
