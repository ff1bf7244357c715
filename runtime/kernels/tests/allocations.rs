//! The kernels of the decode loop allocate nothing.
#![expect(unsafe_code, reason = "a global allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};

use flashlm_kernels::*;

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call is handed to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: as the caller vouches.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        // SAFETY: as the caller vouches.
        unsafe { System.dealloc(p, layout) }
    }
    unsafe fn realloc(&self, p: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: as the caller vouches.
        unsafe { System.realloc(p, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Without the test harness, whose own thread may allocate at any time.
fn main() {
    let threads = Threads::new(NonZeroUsize::new(3).unwrap()).unwrap();
    let (rows, cols) = (512, 1000);
    let data = vec![0u8; rows * cols * 2];
    let w = Matrix::new(Element::F16, &data, rows, cols).unwrap();
    let group = ScaleGroup::new(64).unwrap();
    let scales = vec![0u8; rows * group.scale_bytes(cols)];
    let quantised = Matrix::new(Element::Q8, &data[..rows * cols], rows, cols).unwrap();
    let quantised = quantised.with_scales(&scales, group.scale_bytes(cols), group).unwrap();
    let bytes = Matrix::new(Element::I8, &data[..10 * 64], 10, 64).unwrap();
    let mut heads = vec![0.0f32; 16 * 40];
    let (mut x, mut y, mut halves) = (vec![1.0f32; cols], vec![0.0f32; rows], vec![0u16; cols]);
    let (ones, mut beside) = (vec![1.0f32; cols], vec![0.0f32; rows]);
    let mut out = vec![0.0f32; cols];
    let active: Vec<(u32, f32)> = (0..rows as u32).step_by(3).map(|r| (r, 0.5)).collect();
    let coefficients = vec![0.5f32; active.len()];
    let mut dots = vec![0.0f32; active.len()];
    let tokens = 9;
    let (xs, mut ys) = (vec![1.0f32; tokens * cols], vec![0.0f32; tokens * rows]);
    let mut outs = vec![0.0f32; tokens * cols];
    let mut scratch = MatmulScratch::default();
    let mut step = || {
        threads.run(100, &|i| {
            std::hint::black_box(i);
        });
        threads.chunks_mut(&mut y, 7, &|i, part| part.fill(i as f32));
        matvec(&threads, w, &x, &mut y);
        matvec(&threads, quantised, &x, &mut y);
        // The vector of the outer product is in use while the inner one needs room for another.
        matvec_beside(&threads, quantised, &x, &mut y, &mut || matvec_serial(quantised, &ones, &mut beside));
        // Whichever threads take part.
        threads.chunks_mut(&mut heads, 40, &|_, y| {
            matvec_each_serial(bytes, (&ones, Vectors { count: 4, stride: 64 }), y, 10);
        });
        add_scaled_rows(&threads, w, &active, &mut out);
        gathered_dots(&threads, Element::F16, &|i| w.row(active[i].0 as usize), &x, &mut dots);
        gathered_add(&threads, Element::F16, &|i| w.row(active[i].0 as usize), &coefficients, &mut out);
        layer_norm(&x, None, None, 1e-5, &mut out);
        softmax(&mut x);
        gelu(&mut x);
        silu(&mut x);
        store_f16(&x, &mut halves);
        matmul(&threads, w, &xs, tokens, &mut ys, rows, &mut scratch);
        matmul_rows_add(&threads, w, &ys, rows, tokens, &mut outs, &mut scratch);
        matmul(&threads, w, &xs[..3 * cols], 3, &mut ys, rows, &mut scratch);
    };
    // A round that grows the scratch.
    step();
    let before = ALLOCATIONS.load(Ordering::SeqCst);
    for _ in 0..20 {
        step();
        // Workers fall asleep in between, now and then.
        std::thread::sleep(std::time::Duration::from_micros(300));
    }
    assert_eq!(ALLOCATIONS.load(Ordering::SeqCst), before, "allocations while decoding");
}
