//! The products under criterion, to compare one version of the code with the next. `limits` measures shares of the
//! machine's limits.

use std::hint::black_box;
use std::num::NonZeroUsize;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use flashlm_kernels::{
    Element, MatmulScratch, Matrix, ScaleGroup, Threads, add_scaled_rows, gathered_dots, matmul, matmul_rows_add,
    matvec, softmax,
};

const COLS: usize = 4096;

fn threads() -> Threads {
    Threads::new(std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)).expect("threads")
}

/// Small finite weights in either 16-bit format.
fn weights(rows: usize) -> Vec<u8> {
    (0..rows * COLS).flat_map(|i| [(i * 37 % 251) as u8, 0x2c + (i % 8) as u8]).collect()
}

/// One token: 256 MiB of weights, beyond most caches.
fn decode(c: &mut Criterion) {
    let threads = threads();
    let rows = 32 << 10;
    let data = weights(rows);
    let x: Vec<f32> = (0..COLS).map(|i| (i % 17) as f32 - 8.0).collect();
    let active: Vec<(u32, f32)> = (0..rows as u32).filter(|r| r * 7919 % 100 < 20).map(|r| (r, 0.5)).collect();
    let (mut y, mut out) = (vec![0.0; rows], vec![0.0; COLS]);
    let mut group = c.benchmark_group("decode");
    group.sample_size(20);
    let scale_group = ScaleGroup::new(64).expect("a power of two");
    let scale_bytes = scale_group.scale_bytes(COLS);
    let scales: Vec<u8> = (0..rows * scale_bytes).map(|i| [i as u8, 0x3c][i % 2]).collect();
    for element in [Element::F16, Element::Bf16, Element::Q8, Element::Q4] {
        let row_bytes = element.row_bytes(COLS);
        let mut w = Matrix::new(element, &data[..rows * row_bytes], rows, COLS).expect("whole rows");
        if element.is_quantised() {
            w = w.with_scales(&scales, scale_bytes, scale_group).expect("a scale for each group");
        }
        group.throughput(Throughput::Bytes((rows * row_bytes) as u64));
        group.bench_function(BenchmarkId::new("matvec", format!("{element:?}")), |b| {
            b.iter(|| matvec(&threads, w, black_box(&x), &mut y));
        });
        group.throughput(Throughput::Bytes((active.len() * row_bytes) as u64));
        group.bench_function(BenchmarkId::new("add_scaled_rows", format!("{element:?}")), |b| {
            b.iter(|| add_scaled_rows(&threads, w, black_box(&active), &mut out));
        });
        group.bench_function(BenchmarkId::new("gathered_dots", format!("{element:?}")), |b| {
            b.iter(|| {
                let row = |i: usize| w.row(active[i].0 as usize);
                gathered_dots(&threads, element, &row, black_box(&x), &mut y[..active.len()]);
            });
        });
    }
    group.finish();
}

/// Many tokens. Elements are multiply-adds.
fn prefill(c: &mut Criterion) {
    let threads = threads();
    let rows = 4096;
    let data = weights(rows);
    let w = Matrix::new(Element::F16, &data, rows, COLS).expect("whole rows");
    let mut scratch = MatmulScratch::default();
    let mut group = c.benchmark_group("prefill");
    group.sample_size(10);
    for tokens in [4, 8, 32, 128, 512] {
        let x = vec![0.5; tokens * COLS];
        let mut y = vec![0.0; tokens * rows];
        group.throughput(Throughput::Elements((tokens * rows * COLS) as u64));
        group.bench_function(BenchmarkId::new("matmul", tokens), |b| {
            b.iter(|| matmul(&threads, w, black_box(&x), tokens, &mut y, rows, &mut scratch));
        });
        group.bench_function(BenchmarkId::new("matmul_rows_add", tokens), |b| {
            b.iter(|| matmul_rows_add(&threads, w, black_box(&x), COLS, tokens, &mut y, &mut scratch));
        });
    }
    group.finish();
}

fn small(c: &mut Criterion) {
    let threads = threads();
    c.bench_function("run of one empty task per thread", |b| {
        b.iter(|| {
            threads.run(threads.count(), &|i| {
                black_box(i);
            })
        });
    });
    let mut scores: Vec<f32> = (0..2048).map(|i| (i % 31) as f32).collect();
    c.bench_function("softmax of 2048", |b| b.iter(|| softmax(black_box(&mut scores))));
}

criterion_group!(benches, decode, prefill, small);
criterion_main!(benches);
