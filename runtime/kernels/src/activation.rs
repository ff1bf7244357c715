//! Softmax and activations over slices of f32.
//!
//! An element's result depends on its value alone (softmax: on the whole slice), never on its place.
#![expect(unsafe_code, reason = "vector loads and stores through pointers")]

use crate::dispatch::Kernels;
use crate::elementwise::sum;
use crate::simd::{Op, Simd};

/// `x = exp(x - max(x)) / sum(exp(x - max(x)))`. Negative infinity becomes zero; if every element is, or one is NaN,
/// the result is NaN.
pub fn softmax(x: &mut [f32]) {
    Kernels::get().softmax(x);
}

/// `x = max(x, 0)`; NaN stays.
pub fn relu(x: &mut [f32]) {
    x.iter_mut().for_each(|v| *v = if *v < 0.0 { 0.0 } else { *v });
}

/// `x = x / 2 * (1 + erf(x / sqrt 2))`, with an absolute error below 5e-7, or one part in 2^22 of a large result.
pub fn gelu(x: &mut [f32]) {
    Kernels::get().gelu(x);
}

/// `x = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`, as accurate as [`gelu`].
pub fn gelu_tanh(x: &mut [f32]) {
    Kernels::get().gelu_tanh(x);
}

/// `x = x / (1 + exp(-x))`, as accurate as [`gelu`].
pub fn silu(x: &mut [f32]) {
    Kernels::get().silu(x);
}

impl Kernels {
    /// [`softmax`] on this instruction set.
    pub fn softmax(self, x: &mut [f32]) {
        let largest = self.largest(x);
        self.exp_less(x, largest);
        let scale = (1.0 / sum(x, |v| v)) as f32;
        x.iter_mut().for_each(|v| *v *= scale);
    }

    /// The largest element, numbers alone; negative infinity if there is none.
    pub(crate) fn largest(self, x: &[f32]) -> f32 {
        self.run(Max { x })
    }

    /// `x = exp(x - less)`.
    pub(crate) fn exp_less(self, x: &mut [f32], less: f32) {
        self.run(Map { x, map: ExpOf { less } });
    }

    /// [`gelu`] on this instruction set.
    pub fn gelu(self, x: &mut [f32]) {
        self.run(Map { x, map: Gelu });
    }

    /// [`gelu_tanh`] on this instruction set.
    pub fn gelu_tanh(self, x: &mut [f32]) {
        self.run(Map { x, map: GeluTanh });
    }

    /// [`silu`] on this instruction set.
    pub fn silu(self, x: &mut [f32]) {
        self.run(Map { x, map: Silu });
    }
}

/// A function of one element, on vectors.
trait Function {
    fn of<S: Simd>(&self, s: S, x: S::V) -> S::V;
}

struct Map<'a, F> {
    x: &'a mut [f32],
    map: F,
}

impl<F: Function> Op for Map<'_, F> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, map } = self;
        let mut chunks = x.chunks_exact_mut(S::LANES);
        for chunk in &mut chunks {
            let p = chunk.as_mut_ptr();
            // SAFETY: the chunk has LANES elements.
            unsafe { s.store(p, map.of(s, s.load(p))) };
        }
        let rest = chunks.into_remainder();
        if !rest.is_empty() {
            let p = rest.as_mut_ptr();
            // SAFETY: `rest` has as many elements as are loaded and stored.
            unsafe { s.store_part(p, map.of(s, s.load_part(p, rest.len())), rest.len()) };
        }
    }
}

/// The largest element; negative infinity if there is none.
struct Max<'a> {
    x: &'a [f32],
}

impl Op for Max<'_> {
    type Out = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; crate::simd::LANES_MAX];
        let chunks = self.x.chunks_exact(S::LANES);
        let rest = chunks.remainder();
        let mut max = s.splat(f32::NEG_INFINITY);
        for chunk in chunks {
            // SAFETY: the chunk has LANES elements.
            max = s.max(unsafe { s.load(chunk.as_ptr()) }, max);
        }
        // SAFETY: `lanes` takes the widest vector.
        unsafe { s.store(lanes.as_mut_ptr(), max) };
        lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
    }
}

struct ExpOf {
    less: f32,
}
impl Function for ExpOf {
    #[inline(always)]
    fn of<S: Simd>(&self, s: S, x: S::V) -> S::V {
        exp(s, s.sub(x, s.splat(self.less)))
    }
}

struct Gelu;
impl Function for Gelu {
    /// `max(x, 0) - |x| / 2 * erfc(|x| / sqrt 2)`: accurate in the far tail too, where `1 + erf` would cancel.
    #[inline(always)]
    fn of<S: Simd>(&self, s: S, x: S::V) -> S::V {
        // Beyond 30 erfc is zero, and infinity times zero would be NaN.
        let size = s.min(s.splat(30.0), s.max(s.sub(s.splat(0.0), x), x));
        let tail = s.mul(s.mul(s.splat(0.5), size), erfc(s, s.mul(size, s.splat(std::f32::consts::FRAC_1_SQRT_2))));
        s.sub(s.max(s.splat(0.0), x), tail)
    }
}

struct GeluTanh;
impl Function for GeluTanh {
    /// `(1 + tanh u) / 2` is the logistic function of `2 u`.
    #[inline(always)]
    fn of<S: Simd>(&self, s: S, x: S::V) -> S::V {
        const TWICE_SQRT_2_BY_PI: f32 = 1.595_769;
        let cubic = s.fma(s.mul(s.splat(0.044715), s.mul(x, x)), x, x);
        s.mul(x, logistic(s, s.mul(s.splat(TWICE_SQRT_2_BY_PI), cubic)))
    }
}

struct Silu;
impl Function for Silu {
    #[inline(always)]
    fn of<S: Simd>(&self, s: S, x: S::V) -> S::V {
        s.mul(x, logistic(s, x))
    }
}

/// `1 / (1 + exp(-x))`.
#[inline(always)]
fn logistic<S: Simd>(s: S, x: S::V) -> S::V {
    s.div(s.splat(1.0), s.add(s.splat(1.0), exp(s, s.sub(s.splat(0.0), x))))
}

/// The exponential function within two units in the last place; zero below -87.7, infinite above 88.
///
/// Cody and Waite's reduction to `n ln 2 + r`, and the polynomial of Cephes' `expf` for `exp(r)`.
#[inline(always)]
fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    /// Adding and subtracting this rounds to an integer.
    const ROUNDER: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    const TERMS: [f32; 5] = [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    // NaN passes: `min` and `max` return their second argument.
    let x = s.min(s.splat(88.5), s.max(s.splat(-88.0), x));
    let n = s.sub(s.fma(x, s.splat(std::f32::consts::LOG2_E), s.splat(ROUNDER)), s.splat(ROUNDER));
    let r = s.fma(n, s.splat(-LN_2_LOW), s.fma(n, s.splat(-LN_2_HIGH), x));
    let mut sum = s.splat(1.987_569_1e-4);
    for term in TERMS {
        sum = s.fma(sum, r, s.splat(term));
    }
    let power = s.add(s.fma(sum, s.mul(r, r), r), s.splat(1.0));
    s.mul(power, s.exp2_whole(n))
}

/// The complementary error function of `x >= 0`, within 1.2e-7 of its value and a few roundings: `erfcc` of Numerical Recipes.
#[inline(always)]
fn erfc<S: Simd>(s: S, x: S::V) -> S::V {
    #[expect(clippy::excessive_precision, reason = "the digits as published")]
    const TERMS: [f32; 9] = [
        -0.822_152_23,
        1.488_515_87,
        -1.135_203_98,
        0.278_868_07,
        -0.186_288_06,
        0.096_784_18,
        0.374_091_96,
        1.000_023_68,
        -1.265_512_23,
    ];
    let t = s.div(s.splat(1.0), s.fma(x, s.splat(0.5), s.splat(1.0)));
    let mut sum = s.splat(0.170_872_77);
    for term in TERMS {
        sum = s.fma(sum, t, s.splat(term));
    }
    s.mul(t, exp(s, s.sub(sum, s.mul(x, x))))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By a series of positive terms: 2/sqrt(pi) exp(-x^2) sum of 2^n x^(2n+1) / (2n+1)!!.
    fn erf_f64(x: f64) -> f64 {
        if x.abs() > 6.0 {
            return x.signum();
        }
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= 2.0 * x * x / f64::from(2 * n + 1);
            sum += term;
        }
        std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
    }

    fn grid() -> Vec<f32> {
        let fine = (-12_000..=12_000).map(|i| i as f32 / 1000.0);
        let far = [-1e30, -1e4, -100.0, -50.0, -20.0, -0.0, 1e-20, 20.0, 100.0, 1e4, 1e30, f32::INFINITY];
        fine.chain(far).collect()
    }

    #[test]
    fn activations_agree_with_their_definition() {
        type Case = (&'static str, fn(Kernels, &mut [f32]), fn(f64) -> f64);
        let cases: [Case; 3] = [
            ("gelu", Kernels::gelu, |x| 0.5 * x * (1.0 + erf_f64(x * std::f64::consts::FRAC_1_SQRT_2))),
            ("gelu_tanh", Kernels::gelu_tanh, |x| {
                let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
                x / (1.0 + (-2.0 * u).exp())
            }),
            ("silu", Kernels::silu, |x| x / (1.0 + (-x).exp())),
        ];
        let grid = grid();
        for kernels in Kernels::all_present() {
            for (name, ours, want) in cases {
                let mut out = grid.clone();
                ours(kernels, &mut out);
                let mut worst = (0.0, 0.0);
                for (&x, &got) in grid.iter().zip(&out) {
                    let want = want(f64::from(x));
                    let error =
                        if f64::from(got) == want { 0.0 } else { (f64::from(got) - want).abs() / want.abs().max(2.0) };
                    if error.is_nan() || error > worst.0 {
                        worst = (error, x);
                    }
                }
                assert!(worst.0 < 2.5e-7, "{kernels:?} {name}: {worst:?}");
                let mut nan = [f32::NAN; 3];
                ours(kernels, &mut nan);
                assert!(nan.iter().all(|v| v.is_nan()), "{kernels:?} {name} of NaN");
            }
        }
    }

    #[test]
    fn softmax_agrees_with_its_definition() {
        for kernels in Kernels::all_present() {
            for n in (1..70).chain([1000, 4097]) {
                for spread in [1.0, 30.0, 200.0] {
                    let x: Vec<f32> = (0..n).map(|i| ((i * 7919 % 1013) as f32 / 506.0 - 1.0) * spread).collect();
                    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let exps: Vec<f64> = x.iter().map(|&v| f64::from(v - max).exp()).collect();
                    let total: f64 = exps.iter().sum();
                    let mut out = x.clone();
                    kernels.softmax(&mut out);
                    for (i, (&got, e)) in out.iter().zip(&exps).enumerate() {
                        let (got, want) = (f64::from(got), e / total);
                        assert!((got - want).abs() <= 4e-7 * want + 2e-38, "{kernels:?} {n} [{i}]: {got} for {want}");
                    }
                }
            }
            kernels.softmax(&mut []);
            let mut masked = [1.0, f32::NEG_INFINITY, 1.0];
            kernels.softmax(&mut masked);
            assert_eq!(masked, [0.5, 0.0, 0.5]);
            let mut nan = [1.0, f32::NAN];
            kernels.softmax(&mut nan);
            assert!(nan.iter().all(|v| v.is_nan()));
        }
    }

    #[test]
    fn an_element_does_not_depend_on_its_place() {
        for kernels in Kernels::all_present() {
            for f in [Kernels::gelu, Kernels::gelu_tanh, Kernels::silu] {
                let mut alone = [0.7f32];
                f(kernels, &mut alone);
                for n in 1..40 {
                    let mut many = vec![0.7f32; n];
                    f(kernels, &mut many);
                    assert!(many.iter().all(|v| v.to_bits() == alone[0].to_bits()));
                }
            }
        }
    }

    #[test]
    fn relu_keeps_nan() {
        let mut x = [-1.0, 0.0, 2.0, f32::NAN, f32::NEG_INFINITY];
        relu(&mut x);
        assert_eq!(x[..3], [0.0, 0.0, 2.0]);
        assert!(x[3].is_nan() && x[4] == 0.0);
    }
}
