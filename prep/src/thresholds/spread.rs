//! How strongly a layer's neurons fire: a histogram of magnitudes, from which thresholds are read off.

/// Bits of a float's pattern that a bin leaves out: sixteen bins to a factor of two.
const SHIFT: u32 = 19;
const BINS: usize = (f32::INFINITY.to_bits() >> SHIFT) as usize + 1;

/// Magnitudes of one layer's neurons, pooled over tokens.
#[derive(Clone)]
pub struct Spread {
    counts: Vec<u64>,
    /// Sums of squared energies: of magnitude times length of the down vector.
    energies: Vec<f64>,
}

impl Default for Spread {
    fn default() -> Self {
        Self { counts: vec![0; BINS], energies: vec![0.0; BINS] }
    }
}

impl Spread {
    /// Adds a neuron at a token.
    pub fn add(&mut self, activation: f32, down_norm: f32) {
        let magnitude = activation.abs();
        let bin = (magnitude.to_bits() >> SHIFT) as usize;
        // Not a number falls on the last bin.
        let bin = bin.min(BINS - 1);
        self.counts[bin] += 1;
        self.energies[bin] += f64::from(magnitude * down_norm).powi(2);
    }

    /// The largest threshold that cuts off at most this share of the squared energy; 0 where none does.
    ///
    /// If the neurons' outputs were independent, the square root of the share would be the relative error of the layer's output.
    pub fn threshold(&self, cut: f64) -> f32 {
        let limit = cut * self.energies.iter().sum::<f64>();
        let mut sum = 0.0;
        let mut threshold = 0.0;
        for (bin, energy) in self.energies.iter().enumerate().take(BINS - 1) {
            sum += energy;
            if sum > limit {
                break;
            }
            if self.counts[bin] > 0 {
                // The largest number of the bin.
                threshold = f32::from_bits(((bin as u32 + 1) << SHIFT) - 1);
            }
        }
        // Below all that fires there is nothing to cut; zeros are no neurons that fire.
        if threshold < f32::from_bits(1 << SHIFT) { 0.0 } else { threshold }
    }

    /// Share of the neurons above a threshold that [`Spread::threshold`] gave, or above zero.
    pub fn active(&self, threshold: f32) -> f64 {
        let total: u64 = self.counts.iter().sum();
        let first = if threshold > 0.0 { (threshold.to_bits() >> SHIFT) as usize + 1 } else { 1 };
        self.counts[first..].iter().sum::<u64>() as f64 / total.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_threshold_cuts_what_it_may_and_no_more() {
        let mut spread = Spread::default();
        for _ in 0..100 {
            spread.add(0.0, 1.0);
            spread.add(-0.01, 1.0);
            spread.add(0.1, 1.0);
            spread.add(1.0, 1.0);
        }
        // The weakest hold one part in about 10 000.
        assert_eq!(spread.threshold(0.0), 0.0);
        let threshold = spread.threshold(0.001);
        assert!((0.01..0.0105).contains(&threshold), "{threshold}");
        assert_eq!(spread.active(threshold), 0.5);
        let threshold = spread.threshold(0.02);
        assert!((0.1..0.105).contains(&threshold), "{threshold}");
        assert_eq!(spread.active(threshold), 0.25);
        assert_eq!(spread.active(0.0), 0.75);
        assert_eq!(spread.active(spread.threshold(1.0)), 0.0);
    }

    #[test]
    fn nothing_and_nonsense_are_survived() {
        assert_eq!((Spread::default().threshold(0.1), Spread::default().active(0.0)), (0.0, 0.0));
        let mut spread = Spread::default();
        spread.add(f32::NAN, 1.0);
        spread.add(f32::INFINITY, 1.0);
        assert!(spread.threshold(0.5).is_finite());
    }
}
