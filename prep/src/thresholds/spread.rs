//! How strongly a layer's neurons fire: a histogram of magnitudes, from which thresholds are read off.

/// Bits of a float's pattern that a bin leaves out: sixteen bins to a factor of two.
const SHIFT: u32 = 19;
const BINS: usize = (f32::INFINITY.to_bits() >> SHIFT) as usize + 1;

/// Magnitudes of one layer's neurons, pooled over tokens.
#[derive(Clone)]
pub struct Spread {
    counts: Vec<u64>,
    /// Sums of shares of a token's squared energy.
    energies: Vec<f64>,
}

impl Default for Spread {
    fn default() -> Self {
        Self { counts: vec![0; BINS], energies: vec![0.0; BINS] }
    }
}

impl Spread {
    /// Adds a token: the activations of all neurons, and the lengths of their down vectors.
    ///
    /// A neuron counts by its share of this token's squared energy (magnitude times length, squared), so that all tokens count alike. In many
    /// models the first token of a text has a thousand times the energy of any other; against its sum all others were nothing.
    pub fn add(&mut self, activations: &[f32], down_norms: &[f32]) {
        let energy = |(activation, norm): (&f32, &f32)| f64::from(activation * norm).powi(2);
        let total: f64 = activations.iter().zip(down_norms).map(energy).sum();
        for pair in activations.iter().zip(down_norms) {
            // Not a number falls on the last bin.
            let bin = ((pair.0.abs().to_bits() >> SHIFT) as usize).min(BINS - 1);
            self.counts[bin] += 1;
            if total > 0.0 {
                self.energies[bin] += energy(pair) / total;
            }
        }
    }

    /// Adds what another text showed.
    pub fn merge(&mut self, other: &Self) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(count, more)| *count += more);
        self.energies.iter_mut().zip(&other.energies).for_each(|(energy, more)| *energy += more);
    }

    /// The largest threshold that cuts off at most this share of a token's squared energy, in the mean over tokens; 0 where none does.
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

    const TOKEN: [f32; 4] = [0.0, -0.01, 0.1, 1.0];

    #[test]
    fn a_threshold_cuts_what_it_may_and_no_more() {
        let mut spread = Spread::default();
        (0..100).for_each(|_| spread.add(&TOKEN, &[1.0; 4]));
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
    fn one_token_of_enormous_energy_hides_none_of_the_others() {
        let mut spread = Spread::default();
        (0..100).for_each(|_| spread.add(&TOKEN, &[1.0; 4]));
        let before = [0.001, 0.02].map(|cut| spread.threshold(cut));
        spread.add(&[0.0, 0.0, 0.0, 1e4], &[1.0; 4]);
        assert_eq!([0.001, 0.02].map(|cut| spread.threshold(cut)), before);
    }

    #[test]
    fn nothing_and_nonsense_are_survived() {
        assert_eq!((Spread::default().threshold(0.1), Spread::default().active(0.0)), (0.0, 0.0));
        let mut spread = Spread::default();
        spread.add(&[f32::NAN, f32::INFINITY, 1.0], &[1.0; 3]);
        spread.add(&[0.0; 3], &[1.0; 3]);
        assert!(spread.threshold(0.5).is_finite());
    }
}
