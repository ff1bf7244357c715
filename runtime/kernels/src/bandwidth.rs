//! How fast this machine reads memory: the limit that decoding is measured against.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::threads::Threads;

/// Bytes that one task reads.
const TASK_BYTES: usize = 4 << 20;

/// Bytes per second that all threads reach together in a plain read of `bytes` of memory: the best of three passes.
///
/// Allocates `bytes` and writes them once. Choose them far beyond the caches: 2 GB or more.
pub fn read_bandwidth(threads: &Threads, bytes: usize) -> f64 {
    let mut data = vec![0u64; bytes.max(8) / 8];
    let chunk = TASK_BYTES / 8;
    threads.chunks_mut(&mut data, chunk, &|index, part| part.fill(index as u64 + 1));
    let total = AtomicU64::new(0);
    let mut best = 0f64;
    for _ in 0..3 {
        let start = Instant::now();
        threads.run(data.len().div_ceil(chunk), &|index| {
            let part = &data[index * chunk..data.len().min((index + 1) * chunk)];
            total.fetch_add(sum(part), Ordering::Relaxed);
        });
        best = best.max((data.len() * 8) as f64 / start.elapsed().as_secs_f64());
    }
    black_box(total.into_inner());
    best
}

/// Eight sums side by side, so that additions never wait for one another.
fn sum(part: &[u64]) -> u64 {
    let mut sums = [0u64; 8];
    let (blocks, rest) = part.as_chunks::<8>();
    for block in blocks {
        for (sum, value) in sums.iter_mut().zip(block) {
            *sum = sum.wrapping_add(*value);
        }
    }
    sums.iter().chain(rest).fold(0, |a, &b| a.wrapping_add(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_everything_and_takes_time() {
        let values: Vec<u64> = (0..1003).collect();
        assert_eq!(sum(&values), 1002 * 1003 / 2);
        let threads = Threads::new(2.try_into().unwrap()).unwrap();
        let rate = read_bandwidth(&threads, 32 << 20);
        assert!(rate > 1e6 && rate.is_finite(), "{rate}");
    }
}
