//! What share of the machine's limits the kernels reach: DRAM bandwidth for products with one token, `gemm` for many; and
//! how fast one token's products are when weights come from the cache, which must be well above a core's share of DRAM.
//!
//! `cargo bench --bench limits -- [memory|cache|compute] [--threads N] [--gigabytes N] [--instructions avx2]`. Limits and kernels take turns and
//! each counts its best pass, as other work on the machine disturbs both alike.

use std::num::NonZeroUsize;
use std::time::Instant;

use flashlm_kernels::{
    Element, MatmulScratch, Matrix, ScaleGroup, Threads, add_scaled_rows, force_instruction_set, gathered_add,
    gathered_dots, instruction_set, matmul, matmul_rows_add, matvec, read_bandwidth,
};

const COLS: usize = 4096;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |name: &str, or: usize| {
        let at = arguments.iter().position(|a| a == name);
        at.and_then(|at| arguments.get(at + 1)).map_or(or, |n| n.parse().expect("a number"))
    };
    if let Some(at) = arguments.iter().position(|a| a == "--instructions") {
        let set = arguments[at + 1].parse().expect("an instruction set");
        force_instruction_set(set).expect("an instruction set of this processor");
    }
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let threads = Threads::new(NonZeroUsize::new(number("--threads", cores)).expect("at least one")).expect("threads");
    let wanted = |name: &str| {
        let named = |a: &String| ["memory", "cache", "compute"].contains(&a.as_str());
        !arguments.iter().any(named) || arguments.iter().any(|a| a == name)
    };
    println!("{} with {} threads", instruction_set(), threads.count());
    if wanted("memory") {
        memory(&threads, number("--gigabytes", 1) << 30);
    }
    if wanted("cache") {
        cache();
    }
    if wanted("compute") {
        compute(&threads);
    }
}

/// The best of several passes, in seconds.
fn best(passes: usize, mut pass: impl FnMut()) -> f64 {
    (0..passes)
        .map(|_| {
            let start = Instant::now();
            pass();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

fn memory(threads: &Threads, bytes: usize) {
    let limit = || read_bandwidth(threads, 2 << 30);
    let data: Vec<u8> = {
        // Small finite values in every format.
        let pattern: Vec<u8> = (0..4096u32).flat_map(|i| [(i * 37 % 251) as u8, 0x2c + (i % 8) as u8]).collect();
        pattern.iter().copied().cycle().take(bytes).collect()
    };
    let show = |what: &str, bytes: usize, pass: &mut dyn FnMut()| {
        let before = limit();
        let seconds = best(5, pass);
        let limit = before.max(limit());
        let rate = bytes as f64 / seconds;
        println!("{what:34} {:6.2} GB/s of {:6.2} read: {:5.1} %", rate / 1e9, limit / 1e9, 100.0 * rate / limit);
    };
    let x: Vec<f32> = (0..COLS).map(|i| (i % 17) as f32 - 8.0).collect();
    let group = ScaleGroup::new(64).expect("a power of two");
    for element in [Element::F16, Element::Bf16, Element::F32, Element::Q8, Element::Q4] {
        let row_bytes = element.row_bytes(COLS);
        let rows = bytes / row_bytes;
        let mut w = Matrix::new(element, &data[..rows * row_bytes], rows, COLS).expect("whole rows");
        let mut scale_bytes = 0;
        let scales: Vec<u8>;
        if element.is_quantised() {
            scale_bytes = group.scale_bytes(COLS);
            scales = (0..rows * scale_bytes).map(|i| [i as u8, 0x3c][i % 2]).collect();
            w = w.with_scales(&scales, scale_bytes, group).expect("a scale for each group");
        }
        let row_bytes = row_bytes + scale_bytes;
        let mut y = vec![0.0; rows];
        show(&format!("matvec {element:?}"), rows * row_bytes, &mut || matvec(threads, w, &x, &mut y));
        for percent in [10, 50] {
            let mut state = 1u64;
            let mut random = move || {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 33) as usize
            };
            let active: Vec<(u32, f32)> =
                (0..rows).filter(|_| random() % 100 < percent).map(|r| (r as u32, 0.5)).collect();
            let coefficients = vec![0.5; active.len()];
            let picked = active.len() * row_bytes;
            let mut out = vec![0.0; COLS];
            show(&format!("add_scaled_rows {element:?} {percent} %"), picked, &mut || {
                add_scaled_rows(threads, w, &active, &mut out);
            });
            let mut shuffled: Vec<usize> = active.iter().map(|&(r, _)| r as usize).collect();
            for i in (1..shuffled.len()).rev() {
                shuffled.swap(i, random() % (i + 1));
            }
            show(&format!("gathered_add {element:?} {percent} % shuffled"), picked, &mut || {
                gathered_add(threads, element, &|i| w.row(shuffled[i]), &coefficients, &mut out);
            });
            let y = &mut y[..shuffled.len()];
            show(&format!("gathered_dots {element:?} {percent} % shuffled"), picked, &mut || {
                gathered_dots(threads, element, &|i| w.row(shuffled[i]), &x, y);
            });
        }
    }
}

/// One thread, weights that fit the second-level cache.
fn cache() {
    let threads = Threads::new(NonZeroUsize::MIN).expect("the calling thread");
    let data: Vec<u8> = (0..1u32 << 20).map(|i| if i % 2 == 0 { (i * 37 % 251) as u8 } else { 0x2c }).collect();
    let x: Vec<f32> = (0..COLS).map(|i| (i % 17) as f32 - 8.0).collect();
    for (element, group) in [
        (Element::F16, 0),
        (Element::Bf16, 0),
        (Element::I8, 0),
        (Element::Q8, 128),
        (Element::Q8, 32),
        (Element::Q4, 128),
        (Element::Q4, 64),
        (Element::Q4, 32),
    ] {
        let rows = (512 << 10) / element.row_bytes(COLS);
        let mut w = Matrix::new(element, &data[..rows * element.row_bytes(COLS)], rows, COLS).expect("whole rows");
        let scales: Vec<u8>;
        if let Some(group) = ScaleGroup::new(group) {
            scales = (0..rows * group.scale_bytes(COLS)).map(|i| [i as u8, 0x3c][i % 2]).collect();
            w = w.with_scales(&scales, group.scale_bytes(COLS), group).expect("a scale for each group");
        }
        let bytes = (rows * element.row_bytes(COLS)) as f64;
        let (mut y, mut out) = (vec![0.0; rows], vec![0.0; COLS]);
        let active: Vec<(u32, f32)> = (0..rows as u32).map(|r| (r, 0.5)).collect();
        let dots = best(2000, || matvec(&threads, w, &x, &mut y));
        let sums = best(2000, || add_scaled_rows(&threads, w, &active, &mut out));
        println!(
            "{element:?} by {group:3}, from cache, one thread: matvec {:6.2} GB/s, add_scaled_rows {:6.2} GB/s",
            bytes / dots / 1e9,
            bytes / sums / 1e9
        );
    }
}

fn compute(threads: &Threads) {
    let rows = 16384;
    for tokens in [1, 2, 4, 7, 8, 16, 32, 128, 500, 1000] {
        let x: Vec<f32> = (0..tokens * COLS).map(|i| (i % 17) as f32 / 8.0 - 1.0).collect();
        let a: Vec<f32> = (0..tokens * rows).map(|i| (i % 13) as f32 / 8.0 - 0.7).collect();
        let mut y = vec![0f32; tokens * rows];
        let mut out = vec![0f32; tokens * COLS];
        let w32: Vec<f32> = (0..rows * COLS).map(|i| (i % 29) as f32 / 16.0 - 0.9).collect();
        let w16: Vec<u8> = w32.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect();
        let w32_bytes: Vec<u8> = w32.iter().flat_map(|v| v.to_le_bytes()).collect();
        let mut scratch = MatmulScratch::default();
        let work = 2e-9 * (tokens * rows * COLS) as f64;
        let passes = if tokens > 100 { 3 } else { 6 };
        let gemm = best(passes, || multiply(&w32, rows, &x, tokens, &mut y, threads.count()));
        let mut line = format!("{tokens:5} x {COLS} by {rows}: gemm {:6.1}", work / gemm);
        for (element, data) in [(Element::F16, &w16), (Element::F32, &w32_bytes)] {
            let w = Matrix::new(element, data, rows, COLS).expect("whole rows");
            let seconds = best(passes, || matmul(threads, w, &x, tokens, &mut y, rows, &mut scratch));
            line += &format!("  matmul {element:?} {:6.1} ({:4.2})", work / seconds, gemm / seconds);
            let seconds = best(passes, || matmul_rows_add(threads, w, &a, rows, tokens, &mut out, &mut scratch));
            line += &format!("  rows_add {:6.1} ({:4.2})", work / seconds, gemm / seconds);
        }
        println!("{line} GFLOP/s, scratch {:.1} MB", scratch.bytes() as f64 / 1e6);
    }
}

/// `y = x w^T` by the gemm crate, on its own threads.
#[expect(unsafe_code, reason = "gemm's interface is pointers and strides")]
fn multiply(w: &[f32], rows: usize, x: &[f32], tokens: usize, y: &mut [f32], threads: usize) {
    assert_eq!((w.len(), x.len(), y.len()), (rows * COLS, tokens * COLS, tokens * rows));
    let parallelism = if threads == 1 { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(threads) };
    let (k, n) = (COLS as isize, rows as isize);
    // SAFETY: the three lengths were just checked against the shapes and strides given here.
    unsafe {
        gemm::gemm(
            tokens,
            rows,
            COLS,
            y.as_mut_ptr(),
            1,
            n,
            false,
            x.as_ptr(),
            1,
            k,
            w.as_ptr(),
            k,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}
