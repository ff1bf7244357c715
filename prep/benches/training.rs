//! How near training comes to the matrix products that it cannot do without, at the shape of a layer of OPT-6.7B.
//!
//! `cargo bench -p flashlm-prep --bench training [-- RANK..]`: a fit on made-up data against the same products alone, as the
//! gemm crate does them whole (one thread) or in two halves (two threads).

use std::time::Instant;

use flashlm_kernels::{View, product};
use flashlm_prep::train::{Activity, Inputs, LowRankPredictor, TrainingSet};
use half::f16;
use linfa::ParamGuard;
use linfa::dataset::DatasetBase;
use linfa::traits::Fit;
use rayon::prelude::*;

const HIDDEN: usize = 4096;
const FFN: usize = 16_384;
const BATCH: usize = 256;
const TOKENS: usize = 2304;
/// Every i-th neuron is active at a token: 5 %.
const ACTIVE_STEP: usize = 20;

fn random(state: &mut u64) -> f32 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

fn dataset() -> TrainingSet {
    let mut state = 1;
    let inputs = (0..TOKENS * HIDDEN).map(|_| f16::from_f32(random(&mut state))).collect();
    let mut activity = Activity::empty(FFN);
    for token in 0..TOKENS {
        let first = token * 7 % ACTIVE_STEP;
        activity.push((first..FFN).step_by(ACTIVE_STEP).map(|n| (n as u32, 1.0)), token % 10 == 9);
    }
    DatasetBase::new(Inputs::new(inputs, HIDDEN), activity)
}

/// Seconds of an epoch, and of what comes before the first one.
fn epoch_seconds(set: &TrainingSet, rank: usize) -> (f64, f64) {
    let time = |epochs: usize| {
        let params = LowRankPredictor::params(rank).epochs(epochs).patience(9).batch(BATCH).check().unwrap();
        let begin = Instant::now();
        params.fit(set).unwrap();
        begin.elapsed().as_secs_f64()
    };
    let (one, four) = (time(1), time(4));
    let epoch = (four - one) / 3.0;
    (epoch, one - epoch)
}

/// Seconds of the products of one step, each in `parts` parts side by side.
fn products_seconds(rank: usize, parts: usize) -> f64 {
    // Rows, columns and inner sizes; whether the first factor is read by columns.
    let shapes = [
        (BATCH, rank, HIDDEN, false),
        (BATCH, FFN, rank, false),
        (BATCH, rank, FFN, false),
        (FFN, rank, BATCH, true),
        (HIDDEN, rank, BATCH, true),
    ];
    let mut total = 0.0;
    for (m, n, k, transposed) in shapes {
        let (a, b) = (vec![0.5f32; m * k], vec![0.25f32; k * n]);
        let mut y = vec![0.0f32; m * n];
        let rows = m.div_ceil(parts);
        let mut best = f64::INFINITY;
        for _ in 0..5 {
            let begin = Instant::now();
            y.par_chunks_mut(rows * n).enumerate().for_each(|(part, y)| {
                let (first, count) = (part * rows, y.len() / n);
                let a = match transposed {
                    true => View::rows(&a[first..], k, count, m).t(),
                    false => View::rows(&a[first * k..], count, k, k),
                };
                product(y, n, false, a, View::rows(&b, k, n, n));
            });
            best = best.min(begin.elapsed().as_secs_f64());
        }
        total += best;
    }
    total
}

fn main() {
    let asked: Vec<usize> = std::env::args().filter_map(|a| a.parse().ok()).collect();
    let ranks = if asked.is_empty() { vec![128, 1024] } else { asked };
    let set = dataset();
    println!("hidden {HIDDEN}, neurons {FFN}, batch {BATCH}");
    println!("threads  rank  start s  step ms  its products alone ms  share  GFLOP/s");
    for threads in [1, 2] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        for &rank in &ranks {
            pool.install(|| {
                let (epoch, start) = epoch_seconds(&set, rank);
                let steps = (TOKENS - TOKENS / 10) as f64 / BATCH as f64;
                let (step, alone) = (epoch / steps, products_seconds(rank, threads));
                let operations = (2 * BATCH * rank * (2 * HIDDEN + 3 * FFN)) as f64;
                println!(
                    "{threads:>7}  {rank:>4}  {start:>7.2}  {:>7.1}  {:>21.1}  {:>4.0} %  {:>7.1}",
                    1e3 * step,
                    1e3 * alone,
                    100.0 * alone / step,
                    operations / step / 1e9
                );
            });
        }
    }
}
