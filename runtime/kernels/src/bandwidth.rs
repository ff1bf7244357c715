//! How fast this machine reads memory: the limit that decoding is measured against.
#![expect(unsafe_code, reason = "vector loads through pointers")]

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::dispatch::Kernels;
use crate::simd::{Op, Simd};
use crate::threads::Threads;

/// Floats that one task reads: 1 MiB.
const TASK: usize = 1 << 18;
/// How far ahead of the sums memory is asked for, in bytes.
const AHEAD: usize = 2048;
const PASSES: usize = 3;

/// Bytes per second that all threads reach together in a plain read of `bytes` of memory: the best of three passes.
///
/// Allocates `bytes` and writes them once. Choose them far beyond the caches: 2 GB or more.
pub fn read_bandwidth(threads: &Threads, bytes: usize) -> f64 {
    let mut data = vec![0f32; bytes.max(4) / 4];
    threads.chunks_mut(&mut data, TASK, &|index, part| part.fill((index % 7) as f32 + 1.0));
    read_bandwidth_of(threads, &data)
}

/// Bytes per second of a plain read of `data` on all threads, the best of three passes: for memory whose pages are as those of
/// what it is compared with. Pages that were never written are all the same one; write them first.
pub fn read_bandwidth_of(threads: &Threads, data: &[f32]) -> f64 {
    let kernels = Kernels::get();
    let total = AtomicU64::new(0);
    let mut best = 0f64;
    for _ in 0..PASSES {
        let start = Instant::now();
        threads.run(data.len().div_ceil(TASK), &|index| {
            let part = &data[index * TASK..data.len().min((index + 1) * TASK)];
            total.fetch_add(kernels.run(Sum { part }) as u64, Ordering::Relaxed);
        });
        best = best.max(size_of_val(data) as f64 / start.elapsed().as_secs_f64());
    }
    black_box(total.into_inner());
    best
}

/// The sum of all elements, in eight vectors, so that no addition waits for another.
struct Sum<'a> {
    part: &'a [f32],
}

impl Op for Sum<'_> {
    type Out = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sums = [s.splat(0.0); 8];
        let steps = self.part.chunks_exact(8 * S::LANES);
        let mut total: f32 = steps.remainder().iter().sum();
        for step in steps {
            for line in (0..8 * S::LANES * 4).step_by(64) {
                s.prefetch(step.as_ptr().cast::<u8>().wrapping_add(AHEAD + line));
            }
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: a step has eight vectors.
                *sum = s.add(*sum, unsafe { s.load(step.as_ptr().add(i * S::LANES)) });
            }
        }
        for sum in sums {
            total += s.sum(sum);
        }
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_everything() {
        for kernels in Kernels::all_present() {
            for n in [0usize, 1, 127, 128, 129, 1003] {
                let part: Vec<f32> = (0..n).map(|v| v as f32).collect();
                assert_eq!(kernels.run(Sum { part: &part }), (n * n.saturating_sub(1) / 2) as f32);
            }
        }
    }

    #[test]
    fn takes_time() {
        let threads = Threads::new(2.try_into().unwrap()).unwrap();
        let rate = read_bandwidth(&threads, 32 << 20);
        assert!(rate > 1e6 && rate.is_finite(), "{rate}");
    }
}
