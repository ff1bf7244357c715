//! Which predictor each layer gets, in the memory that all of them share with cached neurons.
//!
//! Layers differ widely: some are served by a handful of directions, others want many. A short trial of a few ranks on
//! each layer, and the quantised projection, say what a token's reads would take with caches of several sizes; of all ways to
//! spend the memory the one is taken with which a token takes least.

use flashlm::disk_cost::DRAM_BYTE_NS;
use flashlm_formats::bundle::PredictorDType;
use flashlm_formats::predictors::{PredictorForm, RankCurve};

use super::params::TrainError;

/// The highest price of a predictor's byte, in nanoseconds a token, and how finely the right one is sought.
const PRICE_MAX: f64 = 1e9;
const PRICE_STEPS: u32 = 20;
/// Steps that the bytes beyond the smallest predictors are counted in.
const STEPS: u64 = 4096;

/// A layer's shape, and how many of its neurons have rows.
#[derive(Clone, Copy, Debug)]
pub struct RowsOf {
    /// Width of the inputs.
    pub hidden: usize,
    /// Neurons.
    pub neurons: usize,
    /// Neurons that have a row.
    pub rows: usize,
}

/// Stored bytes of a predictor: matrices, scales, a bias for each row, and which neurons have rows where not all have. `dtype` is
/// that of two thin matrices.
pub fn form_bytes(form: PredictorForm, of: RowsOf, dtype: PredictorDType) -> u64 {
    match form {
        PredictorForm::LowRank(rank) => predictor_bytes(rank, of, dtype),
        PredictorForm::Projection(_) => predictor_bytes(of.hidden, of, PredictorDType::Int4),
    }
}

/// Stored bytes of a predictor of this rank, or of the quantised projection, whose rank is `hidden`.
pub fn predictor_bytes(rank: usize, of: RowsOf, dtype: PredictorDType) -> u64 {
    let (rank, hidden, rows) = (rank as u64, of.hidden as u64, of.rows as u64);
    let numbers = if of.rows < of.neurons { 4 * rows } else { 0 };
    let matrices = match dtype {
        PredictorDType::F16 => 2 * rank * (hidden + rows),
        PredictorDType::Int8 => rank * (hidden + rows) + 4 * (rank + rows),
        PredictorDType::Int4 => {
            rows * (hidden.div_ceil(32) * 16 + hidden.div_ceil(PredictorDType::INT4_GROUP as u64) * 2)
        }
    };
    matrices + 4 * rows + numbers
}

/// The ranks to try on a layer of this shape.
pub(crate) fn ladder(hidden: usize, ffn: usize) -> Vec<usize> {
    let most = hidden.min(ffn);
    let mut ranks: Vec<usize> = [1.0 / 32.0, 1.0 / 16.0, 1.0 / 8.0, 1.0 / 4.0, 3.0 / 8.0, 1.0 / 2.0]
        .iter()
        .map(|share| ((hidden as f64 * share / 8.0).round() as usize * 8).clamp(8.min(most), most))
        .collect();
    ranks.dedup();
    ranks
}

/// Whether `growth` more bytes of a predictor could pay where false alarms take a token `alarms_ns`: no predictor saves more, and each of
/// its bytes is read from memory for every token.
pub(crate) fn can_pay(alarms_ns: f64, growth: u64) -> bool {
    alarms_ns >= DRAM_BYTE_NS * growth as f64
}

/// What predictors share with the neurons that are cached.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// Bytes for both.
    pub bytes: u64,
    /// Of these, predictors have this many at most.
    pub predictors_max: u64,
    /// Bytes of a slot of the cache.
    pub slot_bytes: u64,
}

/// A predictor for every layer, so that a token takes least: its reads, with the cache that predictors leave room for, and the predictors'
/// own bytes, which pass through memory.
///
/// Of all ways to give the layers predictors and slots the best is taken. Where its predictors would be more than `predictors_max`, their
/// bytes are made dearer until they are not.
///
/// # Errors
/// `Budget` where even the smallest predictors take more than `predictors_max`.
pub fn choose_forms(curves: &[RankCurve], memory: &Memory) -> Result<Vec<PredictorForm>, TrainError> {
    let smallest = curves.iter().map(smallest_of).sum();
    if smallest > memory.predictors_max {
        return Err(TrainError::Budget { budget: memory.predictors_max, smallest });
    }
    let at_price = |price: f64| {
        let chosen = allocate(curves, memory, price);
        let taken: u64 = curves.iter().zip(&chosen).map(|(curve, &form)| curve.bytes[form]).sum();
        (chosen, taken <= memory.predictors_max)
    };
    let (mut chosen, mut fits) = at_price(DRAM_BYTE_NS);
    if !fits {
        let (mut low, mut high) = (DRAM_BYTE_NS, DRAM_BYTE_NS);
        while !fits && high < PRICE_MAX {
            (low, high) = (high, 2.0 * high);
            (chosen, fits) = at_price(high);
        }
        for _ in 0..PRICE_STEPS {
            let price = (low + high) / 2.0;
            match at_price(price) {
                (found, true) => (high, chosen) = (price, found),
                (_, false) => low = price,
            }
        }
    }
    Ok(curves.iter().zip(chosen).map(|(curve, form)| curve.ranks[form]).collect())
}

fn smallest_of(curve: &RankCurve) -> u64 {
    curve.bytes.iter().copied().min().unwrap_or(0)
}

/// One way to serve a layer.
#[derive(Clone, Copy)]
struct Served {
    /// What it takes beyond the layer's smallest predictor, in steps of memory.
    steps: usize,
    /// Nanoseconds of a token.
    ns: f64,
    /// Which of the forms tried.
    form: usize,
}

/// The form for every layer with which a token takes least, where each byte of a predictor costs so many nanoseconds.
fn allocate(curves: &[RankCurve], memory: &Memory, predictor_byte_ns: f64) -> Vec<usize> {
    let smallest: u64 = curves.iter().map(smallest_of).sum();
    let left = memory.bytes.saturating_sub(smallest);
    let step = left.div_ceil(STEPS).max(1);
    let most = (left / step) as usize;
    // Least time of the layers so far when so many steps are spent, and how the last of them is served then.
    let mut least = vec![0.0; most + 1];
    let mut taken: Vec<Vec<Served>> = Vec::new();
    for curve in curves {
        let ways = ways(curve, memory, step, predictor_byte_ns);
        let best = |spent: usize| {
            let within = ways.iter().take_while(|way| way.steps <= spent);
            let times = within.map(|way| (*way, least[spent - way.steps] + way.ns));
            times.min_by(|a, b| a.1.total_cmp(&b.1)).expect("the smallest without a slot takes no step")
        };
        let (ways, times): (Vec<Served>, Vec<f64>) = (0..=most).map(best).unzip();
        taken.push(ways);
        least = times;
    }
    let mut spent = most;
    let mut chosen = Vec::new();
    for taken in taken.iter().rev() {
        let Served { steps, form, .. } = taken[spent];
        spent -= steps;
        chosen.push(form);
    }
    chosen.reverse();
    chosen
}

/// All ways to serve a layer by what they take, without those that take more than another one and no less time.
fn ways(curve: &RankCurve, memory: &Memory, step: u64, predictor_byte_ns: f64) -> Vec<Served> {
    let (smallest, mut ways) = (smallest_of(curve), Vec::new());
    for (form, (&bytes, times)) in curve.bytes.iter().zip(&curve.token_ns).enumerate() {
        let of_predictor = predictor_byte_ns * bytes as f64;
        ways.extend(curve.slots.iter().zip(times).map(|(&slots, ns)| Served {
            steps: (bytes - smallest + u64::from(slots) * memory.slot_bytes).div_ceil(step) as usize,
            ns: ns + of_predictor,
            form,
        }));
    }
    ways.sort_by(|a, b| a.steps.cmp(&b.steps).then(a.ns.total_cmp(&b.ns)));
    let mut least = f64::INFINITY;
    ways.retain(|way| {
        way.ns < least && {
            least = way.ns;
            true
        }
    });
    ways
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Predictors of 16, 32 and 64 bytes, whose false alarms take so long; with ten slots half of all that is read is saved.
    fn curve(alarms_ns: [f64; 3]) -> RankCurve {
        RankCurve {
            ranks: LOW.to_vec(),
            bytes: vec![16, 32, 64],
            costs: vec![0.3, 0.2, 0.1],
            admitted: vec![0.3, 0.2, 0.1],
            slots: vec![0, 10],
            token_ns: alarms_ns.map(|ns| vec![100.0 + ns, 50.0 + ns / 2.0]).to_vec(),
        }
    }

    const LOW: [PredictorForm; 3] =
        [PredictorForm::LowRank(16), PredictorForm::LowRank(32), PredictorForm::LowRank(64)];

    /// Slots of ten bytes.
    fn memory(bytes: u64, predictors_max: u64) -> Memory {
        Memory { bytes, predictors_max, slot_bytes: 10 }
    }

    #[test]
    fn bytes_go_where_they_save_most() {
        // No room for slots.
        let curves = [curve([100.0, 50.0, 20.0]), curve([1.0, 1.0, 1.0]), curve([50.0, 49.0, 20.0])];
        let curves = curves.map(|curve| RankCurve { slots: vec![0], ..curve });
        let choose = |bytes| choose_forms(&curves, &memory(bytes, u64::MAX)).unwrap();
        assert_eq!(choose(1000), [LOW[2], LOW[0], LOW[2]]);
        // Not enough for both: the first layer gains more.
        assert_eq!(choose(48 + 48), [LOW[2], LOW[0], LOW[0]]);
        assert_eq!(choose(48 + 16), [LOW[1], LOW[0], LOW[0]]);
        assert_eq!(choose(0), [LOW[0]; 3], "what cannot be smaller is taken all the same");
        // A small step first would leave too little for the one that gains more.
        let mut curves = curves.clone();
        (curves[0].ranks[2], curves[0].bytes[2]) = (PredictorForm::PROJECTION, 40);
        (curves[1].bytes[1], curves[1].token_ns) = (17, curve([10.0, 5.0, 5.0]).token_ns);
        let chosen = choose_forms(&curves, &memory(72, u64::MAX)).unwrap();
        assert_eq!(chosen, [PredictorForm::PROJECTION, LOW[0], LOW[0]]);
    }

    #[test]
    fn predictors_stay_within_their_own_bound() {
        let curves = [curve([100.0, 50.0, 20.0]), curve([1.0, 1.0, 1.0]), curve([50.0, 49.0, 20.0])];
        let choose = |most| choose_forms(&curves, &memory(10_000, most));
        assert_eq!(choose(144).unwrap(), [LOW[2], LOW[0], LOW[2]]);
        assert_eq!(choose(143).unwrap(), [LOW[2], LOW[0], LOW[0]]);
        assert_eq!(choose(48).unwrap(), [LOW[0]; 3]);
        assert!(matches!(choose(47), Err(TrainError::Budget { budget: 47, smallest: 48 })));
    }

    #[test]
    fn what_slots_save_more_with_is_not_spent_on_predictors() {
        // Ten slots of ten bytes save 65 ns; 48 more bytes of a predictor 20 without slots, 10 with them.
        let curves = [curve([30.0, 30.0, 10.0])];
        let choose = |bytes| choose_forms(&curves, &memory(bytes, 1000)).unwrap()[0];
        assert_eq!(choose(164), LOW[2], "room for both");
        assert_eq!(choose(163), LOW[0], "slots save more");
        assert_eq!(choose(115), LOW[2], "no room for the slots");
        // A byte that passes through memory for every token must save its 0.05 ns, however much room there is.
        let roomy = memory(u64::MAX, 1000);
        assert_eq!(choose_forms(&[curve([5.0, 5.0, 0.3])], &roomy).unwrap(), [LOW[0]]);
        assert_eq!(choose_forms(&[curve([5.0, 5.0, 0.1])], &roomy).unwrap(), [LOW[2]]);
    }

    #[test]
    fn what_was_tried_is_known() {
        let admitted = |rank| curve([0.1; 3]).admitted_at(PredictorForm::LowRank(rank));
        assert_eq!((admitted(32), admitted(33)), (Some(0.2), None));
    }

    #[test]
    fn ladders_fit_the_shape() {
        assert_eq!(ladder(256, 1024), [8, 16, 32, 64, 96, 128]);
        assert_eq!(ladder(4096, 16384), [128, 256, 512, 1024, 1536, 2048]);
        assert_eq!(ladder(4, 13), [4]);
    }
}
