//! Element-wise steps of a transformer over slices of f32: norms, softmax, activations, rotary positions.
//!
//! Plain Rust: the same bits on every instruction set.

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
fn sum(x: &[f32], f: impl Fn(f64) -> f64) -> f64 {
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

/// `x = exp(x - max(x)) / sum(exp(x - max(x)))`. An empty slice stays empty; negative infinity becomes zero.
pub fn softmax(x: &mut [f32]) {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for v in x.iter_mut() {
        *v = (*v - max).exp();
    }
    let scale = (1.0 / sum(x, |v| v)) as f32;
    x.iter_mut().for_each(|v| *v *= scale);
}

/// `x = max(x, 0)`; NaN stays.
pub fn relu(x: &mut [f32]) {
    x.iter_mut().for_each(|v| *v = if *v < 0.0 { 0.0 } else { *v });
}

/// `x = x / 2 * (1 + erf(x / sqrt 2))`, with an absolute error below 1e-6.
pub fn gelu(x: &mut [f32]) {
    x.iter_mut().for_each(|v| *v = 0.5 * *v * (1.0 + erf(*v * std::f32::consts::FRAC_1_SQRT_2)));
}

/// `x = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`.
pub fn gelu_tanh(x: &mut [f32]) {
    const SCALE: f32 = 0.797_884_6;
    x.iter_mut().for_each(|v| *v = 0.5 * *v * (1.0 + (SCALE * (*v + 0.044715 * *v * *v * *v)).tanh()));
}

/// `x = x / (1 + exp(-x))`.
pub fn silu(x: &mut [f32]) {
    x.iter_mut().for_each(|v| *v /= 1.0 + (-*v).exp());
}

/// The error function, by a rational minimax approximation over [-4, 4] (as in Eigen's `erf`), beyond which f32 has 1.
#[inline(always)]
fn erf(x: f32) -> f32 {
    const P: [f32; 7] = [
        -2.726_142_3e-10,
        2.770_681_4e-8,
        -2.101_024e-6,
        -5.692_506_2e-5,
        -7.349_906_3e-4,
        -2.954_6e-3,
        -1.609_603_3e-2,
    ];
    const Q: [f32; 5] = [-1.456_607_2e-5, -2.133_740_6e-4, -1.682_827e-3, -7.373_329_2e-3, -1.426_473_9e-2];
    let square = x * x;
    let p = P.into_iter().fold(0.0, |sum, c| sum * square + c);
    let q = Q.into_iter().fold(0.0, |sum, c| sum * square + c);
    if x.abs() < 4.0 { x * p / q } else { x.clamp(-1.0, 1.0) }
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
