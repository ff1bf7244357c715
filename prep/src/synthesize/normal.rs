//! The standard normal distribution, in closed form or nearly so.

use std::f64::consts::TAU;

/// The density at `z`.
pub(super) fn density(z: f64) -> f64 {
    (-z * z / 2.0).exp() / TAU.sqrt()
}

/// The probability above `z`: a series near the middle, a continued fraction in the tails.
pub(super) fn above(z: f64) -> f64 {
    if z.abs() < 2.5 {
        // Marsaglia's series: the integral from 0 over the density at z is z + z^3/3 + z^5/15 + ..
        let (mut term, mut sum, mut odd) = (z, z, 1.0);
        while term.abs() > 1e-17 {
            odd += 2.0;
            term *= z * z / odd;
            sum += term;
        }
        return 0.5 - density(z) * sum;
    }
    if z < 0.0 {
        return 1.0 - above(-z);
    }
    let fraction = (1..=80).rev().fold(z, |rest, n| z + n as f64 / rest);
    density(z) / fraction
}

/// The `z` that a share `rate` lies above, for rates from 1e-12 to one less that.
pub(super) fn threshold(rate: f64) -> f64 {
    let rate = rate.clamp(1e-12, 1.0 - 1e-12);
    let (mut low, mut high) = (-7.5, 7.5);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if above(middle) > rate { low = middle } else { high = middle }
    }
    (low + high) / 2.0
}

/// The mean of the square of what lies above `z`: a neuron's mean squared activation, inactive tokens counted.
pub(super) fn square_above(z: f64) -> f64 {
    ((1.0 + z * z) * above(z) - z * density(z)).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_are_the_tabled_ones() {
        for (z, probability) in [
            (0.0, 0.5),
            (1.0, 0.158_655_253_931_457),
            (2.4999, 0.006_211_417_700_6),
            (2.5001, 0.006_207_912_6),
            (-3.0, 0.998_650_101_968_37),
            (4.0, 3.167_124_183_311_9e-5),
            (6.0, 9.865_876_450_377e-10),
        ] {
            let off: f64 = above(z) / probability - 1.0;
            assert!(off.abs() < 1e-6, "{z}: {} and {probability}", above(z));
        }
        for rate in [1e-9, 0.01, 0.1, 0.5, 0.99] {
            assert!((above(threshold(rate)) / rate - 1.0).abs() < 1e-9, "{rate}");
        }
    }

    #[test]
    fn squares_above_are_what_summing_says() {
        for z in [-1.0, 0.0, 1.5, 3.0] {
            let step = 1e-4;
            let sum: f64 = (0..80_000).map(|n| (n as f64 * step).powi(2) * density(z + n as f64 * step) * step).sum();
            assert!((square_above(z) - sum).abs() < 1e-4 * sum + 1e-9, "{z}: {} and {sum}", square_above(z));
        }
    }
}
