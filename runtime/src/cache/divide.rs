//! Which layer gets how many slots.

/// What a layer gains from slots: points of (slots, benefit), benefit being bytes or time saved per token, say.
///
/// Between its points a curve is taken as straight, and where it is not concave its concave hull counts: slots that gain
/// nothing by themselves may be what it takes to gain much.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BenefitCurve {
    hull: Vec<(u32, f64)>,
}

impl BenefitCurve {
    /// The curve through these points, in any order. No slots gain nothing; a curve never falls.
    pub fn new(points: impl IntoIterator<Item = (u32, f64)>) -> Self {
        let mut points: Vec<_> = points.into_iter().filter(|p| p.0 > 0 && p.1 > 0.0 && p.1.is_finite()).collect();
        points.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1)));
        let mut hull = vec![(0, 0.0)];
        for point in points {
            if point.1 <= hull[hull.len() - 1].1 {
                continue;
            }
            while hull.len() > 1
                && slope(hull[hull.len() - 2], hull[hull.len() - 1]) <= slope(hull[hull.len() - 1], point)
            {
                hull.pop();
            }
            hull.push(point);
        }
        BenefitCurve { hull }
    }

    /// The benefit of this many slots.
    pub fn at(&self, slots: u32) -> f64 {
        match self.hull.iter().position(|p| p.0 >= slots) {
            Some(0) => 0.0,
            Some(i) => self.hull[i - 1].1 + slope(self.hull[i - 1], self.hull[i]) * (slots - self.hull[i - 1].0) as f64,
            None => self.hull.last().map_or(0.0, |p| p.1),
        }
    }
}

fn slope(a: (u32, f64), b: (u32, f64)) -> f64 {
    (b.1 - a.1) / (b.0 - a.0) as f64
}

/// Divides `slots` over the layers so that the sum of the benefits is greatest: always to the steepest curve next.
///
/// Slots that no layer gains from are left over. Equal slopes go to the lower layer first.
pub fn divide_slots(curves: &[BenefitCurve], slots: u64) -> Vec<u32> {
    let mut pieces: Vec<(f64, usize, u32)> = Vec::new();
    for (layer, curve) in curves.iter().enumerate() {
        pieces.extend(curve.hull.windows(2).map(|w| (slope(w[0], w[1]), layer, w[1].0 - w[0].0)));
    }
    // Stable, so that the pieces of one layer stay in order.
    pieces.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let mut shares = vec![0u32; curves.len()];
    let mut left = slots;
    for (_, layer, length) in pieces {
        let take = left.min(length as u64);
        shares[layer] += take as u32;
        left -= take;
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn steep_layers_come_first_and_plateaus_are_bridged() {
        let steep = BenefitCurve::new([(10, 100.0), (20, 110.0)]);
        let flat = BenefitCurve::new([(10, 20.0), (20, 40.0)]);
        // Nothing at 10, much at 20: the hull says 5 a slot.
        let late = BenefitCurve::new([(10, 0.0), (20, 100.0)]);
        assert_eq!(divide_slots(&[flat.clone(), steep, late], 35), [5, 10, 20]);
        assert_eq!(divide_slots(&[flat], 1000), [20], "no more than helps");
        assert_eq!(divide_slots(&[], 5), [] as [u32; 0]);
    }

    proptest! {
        #[test]
        fn no_exchange_of_a_slot_helps(
            raw in proptest::collection::vec(proptest::collection::vec((1u32..30, 0.0f64..100.0), 0..5), 1..5), slots in 0u64..80,
        ) {
            let curves: Vec<_> = raw.into_iter().map(BenefitCurve::new).collect();
            let shares = divide_slots(&curves, slots);
            prop_assert!(shares.iter().map(|&s| s as u64).sum::<u64>() <= slots);
            for (from, to) in (0..curves.len()).flat_map(|a| (0..curves.len()).map(move |b| (a, b))) {
                if from == to || shares[from] == 0 {
                    continue;
                }
                let lost = curves[from].at(shares[from]) - curves[from].at(shares[from] - 1);
                let won = curves[to].at(shares[to] + 1) - curves[to].at(shares[to]);
                prop_assert!(won <= lost + 1e-6, "a slot from {from} to {to} wins {won}, loses {lost}");
            }
        }
    }
}
