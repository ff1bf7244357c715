//! The products against their plain twins, and the bitwise promises, on every instruction set present.

use std::num::NonZeroUsize;

use flashlm_kernels::{
    Element, Kernels, MATMUL_TOKENS_MIN, MatmulScratch, Matrix, RowLayout, Threads, Vectors, gathered_add,
    gathered_add_each, gathered_dots_each, matvec, matvec_each, reference,
};
use half::{bf16, f16};

/// A small repeatable generator (splitmix64).
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.bits() % n.max(1) as u64) as usize
    }

    fn float(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }

    fn weights(&mut self, element: Element, n: usize) -> Vec<u8> {
        encode(element, &self.floats(n))
    }
}

fn encode(element: Element, values: &[f32]) -> Vec<u8> {
    match element {
        Element::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Element::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        Element::Bf16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        Element::I8 => values.iter().map(|&v| (v * 100.0) as i8 as u8).collect(),
        Element::Q8 | Element::Q4 => unreachable!("see quantised.rs"),
    }
}

fn pool(threads: usize) -> Threads {
    Threads::new(NonZeroUsize::new(threads).unwrap()).unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Every f32 sum of `terms` products is within `terms` roundings of the size of its terms; ours are far closer.
fn assert_close(got: &[f32], want: &[(f64, f64)], terms: usize, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let unit = f64::from(f32::EPSILON) * (2.0 + (terms as f64).sqrt());
    let wrong: Vec<String> = got
        .iter()
        .zip(want)
        .enumerate()
        .filter(|(_, (got, (sum, size)))| (f64::from(**got) - sum).abs() > unit * size + 1e-40)
        .map(|(i, (got, (sum, size)))| format!("[{i}]: {got} for {sum}, terms of size {size}"))
        .collect();
    assert!(wrong.is_empty(), "{what}: {} of {} wrong: {:?}", wrong.len(), got.len(), &wrong[..wrong.len().min(8)]);
}

/// A matrix with gaps and groups, at addresses that fit the element and nothing wider.
fn strided(element: Element, data: &[u8], rows: usize, cols: usize) -> Matrix<'_> {
    let row_stride = (cols + 3) * element.bytes();
    let layout = RowLayout {
        offset: element.bytes(),
        row_stride,
        rows_per_group: 3,
        group_stride: 3 * row_stride + 5 * element.bytes(),
    };
    Matrix::strided(element, data, rows, cols, layout).unwrap()
}

fn strided_bytes(element: Element, rows: usize, cols: usize) -> usize {
    element.bytes() + rows.div_ceil(3) * (3 * (cols + 3) + 5) * element.bytes()
}

fn filled(element: Element, random: &mut Random, bytes: usize) -> Vec<u8> {
    random.weights(element, bytes.div_ceil(element.bytes()))
}

#[test]
fn matvec_and_dot_agree_with_their_twin_and_with_each_other() {
    let mut random = Random(1);
    let pools = [pool(1), pool(2), pool(5)];
    for element in Element::ALL {
        for cols in (0..=70).chain([127, 1000, 4096, 4099]) {
            let rows = 1 + random.below(23);
            let data = filled(element, &mut random, strided_bytes(element, rows, cols));
            let x = random.floats(cols);
            for w in [strided(element, &data, rows, cols), {
                Matrix::new(element, &data[..rows * cols * element.bytes()], rows, cols).unwrap()
            }] {
                let want = reference::matvec(w, &x);
                for kernels in Kernels::all_present() {
                    let what = format!("{:?} {element:?} {rows} x {cols}", kernels.instruction_set());
                    let mut y = vec![f32::NAN; rows];
                    kernels.matvec_serial(w, &x, &mut y);
                    assert_close(&y, &want, cols, &what);
                    for pool in &pools {
                        let mut again = vec![f32::NAN; rows];
                        kernels.matvec(pool, w, &x, &mut again);
                        assert_eq!(bits(&y), bits(&again), "{what}: {} threads", pool.count());
                    }
                    for r in 0..rows {
                        assert_eq!(y[r].to_bits(), kernels.dot(element, w.row(r), &x).to_bits(), "{what}: row {r}");
                    }
                    let cut = random.below(rows + 1);
                    let mut parts = vec![f32::NAN; rows];
                    kernels.matvec_serial(w.rows_range(0..cut), &x, &mut parts[..cut]);
                    kernels.matvec_serial(w.rows_range(cut..rows), &x, &mut parts[cut..]);
                    assert_eq!(bits(&y), bits(&parts), "{what}: cut at {cut}");
                }
            }
        }
    }
}

#[test]
fn a_large_matvec_does_not_depend_on_the_threads() {
    let mut random = Random(2);
    let (rows, cols) = (1237, 1024);
    for element in Element::ALL {
        let data = random.weights(element, rows * cols);
        let w = Matrix::new(element, &data, rows, cols).unwrap();
        let x = random.floats(cols);
        for kernels in Kernels::all_present() {
            let mut y = vec![0.0; rows];
            kernels.matvec_serial(w, &x, &mut y);
            assert_close(&y, &reference::matvec(w, &x), cols, "large matvec");
            for threads in [2, 3, 4] {
                let mut again = vec![0.0; rows];
                kernels.matvec(&pool(threads), w, &x, &mut again);
                assert_eq!(bits(&y), bits(&again));
            }
        }
    }
}

#[test]
fn scaled_rows_agree_with_their_twin_and_keep_list_order() {
    let mut random = Random(3);
    let pools = [pool(1), pool(2), pool(5)];
    for element in Element::ALL {
        for cols in (0..=70).chain([127, 1000, 4096, 5003]) {
            let rows = 40;
            let data = filled(element, &mut random, strided_bytes(element, rows, cols));
            let w = strided(element, &data, rows, cols);
            let count = random.below(37);
            let active: Vec<(u32, f32)> = (0..count).map(|_| (random.below(rows) as u32, random.float())).collect();
            let start = random.floats(cols);
            let want = reference::add_scaled_rows(w, &active, &start);
            let coefficients: Vec<f32> = active.iter().map(|&(_, a)| a).collect();
            for kernels in Kernels::all_present() {
                let what = format!("{:?} {element:?} {count} rows of {cols}", kernels.instruction_set());
                let mut y = start.clone();
                kernels.add_scaled_rows_serial(w, &active, &mut y);
                assert_close(&y, &want, count + 1, &what);
                let mut one_by_one = start.clone();
                for &(r, a) in &active {
                    kernels.add_scaled(element, w.row(r as usize), a, &mut one_by_one);
                }
                assert_eq!(bits(&y), bits(&one_by_one), "{what}: one by one");
                for pool in &pools {
                    let mut again = start.clone();
                    kernels.add_scaled_rows(pool, w, &active, &mut again);
                    assert_eq!(bits(&y), bits(&again), "{what}: {} threads", pool.count());
                    let mut gathered = start.clone();
                    kernels.gathered_add(pool, element, &|i| w.row(active[i].0 as usize), &coefficients, &mut gathered);
                    assert_eq!(bits(&y), bits(&gathered), "{what}: gathered, {} threads", pool.count());
                    let cut = random.below(count + 1);
                    let mut parts = start.clone();
                    kernels.add_scaled_rows(pool, w, &active[..cut], &mut parts);
                    kernels.add_scaled_rows(pool, w, &active[cut..], &mut parts);
                    assert_eq!(bits(&y), bits(&parts), "{what}: cut at {cut}");
                }
            }
        }
    }
}

#[test]
fn a_column_does_not_depend_on_its_place() {
    // The same column in a vector body, and in tails of every length.
    let mut random = Random(4);
    for element in Element::ALL {
        let row = random.weights(element, 1);
        let (a, y) = (random.floats(19), random.float());
        for kernels in Kernels::all_present() {
            let mut alone = [y];
            a.iter().for_each(|&a| kernels.add_scaled(element, &row, a, &mut alone));
            for cols in 1..100 {
                let data = row.repeat(cols);
                let w = Matrix::new(element, &data, 1, cols).unwrap();
                let active: Vec<(u32, f32)> = a.iter().map(|&a| (0, a)).collect();
                let mut many = vec![y; cols];
                kernels.add_scaled_rows_serial(w, &active, &mut many);
                assert!(many.iter().all(|v| v.to_bits() == alone[0].to_bits()), "{kernels:?} {element:?} {cols}");
            }
        }
    }
}

#[test]
fn gathered_dots_equal_matvec() {
    let mut random = Random(5);
    for element in Element::ALL {
        for (cols, count) in [(1, 1), (17, 9), (64, 33), (1000, 500), (4096, 130)] {
            let rows = 64;
            let data = random.weights(element, rows * cols);
            let w = Matrix::new(element, &data, rows, cols).unwrap();
            let picked: Vec<usize> = (0..count).map(|_| random.below(rows)).collect();
            let x = random.floats(cols);
            for kernels in Kernels::all_present() {
                let mut all = vec![0.0; rows];
                kernels.matvec_serial(w, &x, &mut all);
                for threads in [1, 2, 3] {
                    let mut y = vec![0.0; count];
                    kernels.gathered_dots(&pool(threads), element, &|i| w.row(picked[i]), &x, &mut y);
                    let want: Vec<u32> = picked.iter().map(|&r| all[r].to_bits()).collect();
                    assert_eq!(bits(&y), want, "{kernels:?} {element:?} {count} of {cols}");
                }
            }
        }
    }
}

#[test]
fn each_of_a_few_tokens_has_the_bits_that_it_has_alone() {
    let mut random = Random(11);
    for element in Element::ALL {
        for (cols, rows, tokens) in [(1, 3, 2), (64, 40, 2), (200, 33, 7), (1024, 200, 16), (257, 90, 31)] {
            let data = random.weights(element, rows * cols);
            let w = Matrix::new(element, &data, rows, cols).unwrap();
            let x = random.floats(tokens * cols);
            // Which row is for which token, in no order.
            let list: Vec<(usize, usize)> = (0..3 * rows).map(|_| (random.below(rows), random.below(tokens))).collect();
            let factors = random.floats(list.len());
            for threads in [1, 2, 3] {
                let threads = pool(threads);
                let mut all = vec![0.0; tokens * rows];
                matvec_each(&threads, w, &x, tokens, &mut all, &mut || {});
                let (row, token) = (|i: usize| w.row(list[i].0), |i: usize| list[i].1);
                let mut dots = vec![0.0; list.len()];
                gathered_dots_each(&threads, element, &row, &token, (&x, cols), &mut dots);
                let start = random.floats(tokens * cols);
                let mut sums = start.clone();
                gathered_add_each(&threads, element, &row, &token, &factors, (&mut sums, cols));
                for t in 0..tokens {
                    let mut alone = vec![0.0; rows];
                    matvec(&threads, w, &x[t * cols..][..cols], &mut alone);
                    assert_eq!(bits(&all[t * rows..][..rows]), bits(&alone), "{element:?} {cols} token {t}");
                    let own: Vec<usize> = (0..list.len()).filter(|i| list[*i].1 == t).collect();
                    for &i in &own {
                        assert_eq!(dots[i].to_bits(), alone[list[i].0].to_bits(), "{element:?} {cols} entry {i}");
                    }
                    let mut sum = start[t * cols..][..cols].to_vec();
                    let coefficients: Vec<f32> = own.iter().map(|i| factors[*i]).collect();
                    gathered_add(&threads, element, &|i| w.row(list[own[i]].0), &coefficients, &mut sum);
                    assert_eq!(bits(&sums[t * cols..][..cols]), bits(&sum), "{element:?} {cols} sum of token {t}");
                }
            }
        }
    }
}

/// Scores of queries and sums of values, with gaps between vectors and rows.
#[test]
fn each_of_some_vectors_has_the_bits_that_it_has_alone() {
    let mut random = Random(12);
    for element in Element::ALL {
        for (rows, cols, count) in
            [(1, 1, 1), (5, 70, 0), (0, 9, 3), (40, 64, 3), (64, 80, 4), (33, 131, 7), (130, 128, 9)]
        {
            let data = filled(element, &mut random, strided_bytes(element, rows, cols));
            let w = strided(element, &data, rows, cols);
            let stride = cols.max(rows) + random.below(9);
            let of = Vectors { count, stride };
            let (x, start) = (random.floats(count * stride), random.floats(count * stride));
            for kernels in Kernels::all_present() {
                let what = format!("{:?} {element:?} {rows} x {cols}, {count} vectors", kernels.instruction_set());
                let (mut scores, mut sums) = (start.clone(), start.clone());
                kernels.matvec_each_serial(w, (&x, of), &mut scores, stride);
                kernels.add_weighted_rows_each_serial(w, (&x, of), &mut sums, stride);
                for t in 0..count {
                    let own = t * stride..(t + 1) * stride;
                    let (x, start) = (&x[own.clone()], &start[own.clone()]);
                    let (mut alone, mut sum) = (start.to_vec(), start.to_vec());
                    kernels.matvec_serial(w, &x[..cols], &mut alone[..rows]);
                    kernels.add_weighted_rows_serial(w, &x[..rows], &mut sum[..cols]);
                    assert_eq!(bits(&scores[own.clone()]), bits(&alone), "{what}: scores of {t}");
                    assert_eq!(bits(&sums[own]), bits(&sum), "{what}: sum of {t}");
                    assert_close(&alone[..rows], &reference::matvec(w, &x[..cols]), cols, &what);
                    let want = reference::matmul_rows_add(w, &x[..rows], rows, 1, &start[..cols]);
                    assert_close(&sum[..cols], &want, rows + 1, &what);
                }
            }
        }
    }
}

#[test]
fn matmul_agrees_with_its_twin_and_not_with_the_threads() {
    let mut random = Random(6);
    let pools = [pool(1), pool(2), pool(3)];
    let shapes = [(1, 1, 1), (1, 0, 3), (0, 5, 9), (5, 7, 0), (3, 70, 2), (37, 65, 7), (50, 300, 8), (129, 259, 13)];
    let more = [(33, 517, 31), (200, 64, 33), (97, 1030, 64), (300, 100, 259), (12, 31, 300), (1, 2000, 17)];
    for element in Element::ALL {
        for (rows, cols, tokens) in shapes.into_iter().chain(more) {
            let data = filled(element, &mut random, strided_bytes(element, rows, cols));
            let w = strided(element, &data, rows, cols);
            let x = random.floats(tokens * cols);
            let stride = rows + random.below(5);
            let want = reference::matmul(w, &x, tokens);
            for kernels in Kernels::all_present() {
                let what = format!("{:?} {element:?} {rows} x {cols}, {tokens} tokens", kernels.instruction_set());
                let mut first: Option<Vec<f32>> = None;
                let mut scratch = MatmulScratch::default();
                for pool in &pools {
                    let mut y = vec![7.5; tokens * stride];
                    kernels.matmul(pool, w, &x, tokens, &mut y, stride, &mut scratch);
                    let packed: Vec<f32> = (0..tokens).flat_map(|t| y[t * stride..][..rows].to_vec()).collect();
                    assert_close(&packed, &want, cols, &what);
                    let gaps = (0..tokens).all(|t| y[t * stride + rows..(t + 1) * stride].iter().all(|&v| v == 7.5));
                    assert!(gaps, "{what}: wrote between tokens");
                    if tokens < MATMUL_TOKENS_MIN {
                        for t in 0..tokens {
                            let mut alone = vec![0.0; rows];
                            kernels.matvec_serial(w, &x[t * cols..][..cols], &mut alone);
                            assert_eq!(bits(&alone), bits(&packed[t * rows..][..rows]), "{what}: as matvec");
                        }
                    }
                    match &first {
                        None => first = Some(packed),
                        Some(first) => assert_eq!(bits(first), bits(&packed), "{what}: {} threads", pool.count()),
                    }
                }
            }
        }
    }
}

/// Many tokens in parts that are still many: the same bits, in no more scratch than is announced.
#[test]
fn parts_of_many_tokens_give_the_bits_of_all() {
    let mut random = Random(16);
    for element in Element::ALL {
        for (rows, cols, tokens) in [(70, 96, 256), (33, 517, 100), (129, 64, 33), (40, 300, 241)] {
            let data = filled(element, &mut random, strided_bytes(element, rows, cols));
            let (w, x) = (strided(element, &data, rows, cols), random.floats(tokens * cols));
            let a = random.floats(tokens * rows);
            for kernels in Kernels::all_present() {
                let threads = pool(2);
                let all = |part: usize| {
                    let mut scratch = MatmulScratch::default();
                    let (mut y, mut z) = (vec![0.0; tokens * rows], vec![0.5; tokens * cols]);
                    for first in (0..tokens).step_by(part) {
                        let count = part.min(tokens - first);
                        let x = &x[first * cols..(first + count) * cols];
                        kernels.matmul(&threads, w, x, count, &mut y[first * rows..], rows, &mut scratch);
                        let a = &a[first * rows..(first + count) * rows];
                        let z = &mut z[first * cols..(first + count) * cols];
                        kernels.matmul_rows_add(&threads, w, a, rows, count, z, &mut scratch);
                    }
                    let most = MatmulScratch::bytes_needed(2, part.min(tokens), cols.max(rows));
                    assert!(scratch.bytes() <= most, "{} bytes, {most} announced", scratch.bytes());
                    (bits(&y), bits(&z))
                };
                let whole = all(tokens);
                for part in [MATMUL_TOKENS_MIN, 17, 50, 84] {
                    if tokens % part == 0 || tokens % part >= MATMUL_TOKENS_MIN {
                        assert!(all(part) == whole, "{element:?} {rows} x {cols}, {tokens} tokens in parts of {part}");
                    }
                }
            }
        }
    }
}

#[test]
fn matmul_rows_add_agrees_with_its_twin_and_equals_scaled_rows() {
    let mut random = Random(7);
    let pools = [pool(1), pool(2), pool(3)];
    let shapes = [(1, 1, 1), (0, 5, 9), (5, 0, 3), (5, 7, 0), (70, 3, 2), (65, 37, 7), (300, 50, 8), (259, 129, 13)];
    let more = [(517, 33, 31), (64, 600, 33), (1030, 97, 64), (100, 300, 259), (31, 12, 300), (700, 1, 17)];
    for element in Element::ALL {
        for (rows, cols, tokens) in shapes.into_iter().chain(more) {
            let data = filled(element, &mut random, strided_bytes(element, rows, cols));
            let w = strided(element, &data, rows, cols);
            let stride = rows + random.below(5);
            let a = random.floats(tokens * stride);
            let start = random.floats(tokens * cols);
            let want = reference::matmul_rows_add(w, &a, stride, tokens, &start);
            for kernels in Kernels::all_present() {
                let what = format!("{:?} {element:?} {rows} x {cols}, {tokens} tokens", kernels.instruction_set());
                let mut listed = start.clone();
                for t in 0..tokens {
                    let active: Vec<(u32, f32)> = (0..rows).map(|r| (r as u32, a[t * stride + r])).collect();
                    kernels.add_scaled_rows_serial(w, &active, &mut listed[t * cols..][..cols]);
                }
                let mut weighted = start.clone();
                for t in 0..tokens {
                    kernels.add_weighted_rows_serial(w, &a[t * stride..][..rows], &mut weighted[t * cols..][..cols]);
                }
                assert_eq!(bits(&listed), bits(&weighted), "{what}: weighted rows");
                let mut scratch = MatmulScratch::default();
                for pool in &pools {
                    let mut y = start.clone();
                    kernels.matmul_rows_add(pool, w, &a, stride, tokens, &mut y, &mut scratch);
                    assert_close(&y, &want, rows + 1, &what);
                    assert_eq!(bits(&listed), bits(&y), "{what}: {} threads against scaled rows", pool.count());
                    let cut = random.below(rows + 1);
                    let mut parts = start.clone();
                    kernels.matmul_rows_add(pool, w.rows_range(0..cut), &a, stride, tokens, &mut parts, &mut scratch);
                    let rest = if tokens == 0 { &a[..] } else { &a[cut..] };
                    kernels.matmul_rows_add(
                        pool,
                        w.rows_range(cut..rows),
                        rest,
                        stride,
                        tokens,
                        &mut parts,
                        &mut scratch,
                    );
                    assert_eq!(bits(&y), bits(&parts), "{what}: cut at row {cut}");
                }
            }
        }
    }
}

#[test]
fn special_values_pass_through() {
    for kernels in Kernels::all_present() {
        // Bytes have no special values.
        for element in Element::ALL.into_iter().filter(|e| *e != Element::I8) {
            for cols in [1, 7, 16, 33, 64, 100] {
                let place = cols - 1;
                let with = |value: f32| {
                    let mut row = vec![0.5f32; cols];
                    row[place] = value;
                    encode(element, &row)
                };
                let x = vec![1.0; cols];
                assert_eq!(kernels.dot(element, &with(f32::INFINITY), &x), f32::INFINITY);
                assert_eq!(kernels.dot(element, &with(f32::NEG_INFINITY), &x), f32::NEG_INFINITY);
                assert!(kernels.dot(element, &with(f32::NAN), &x).is_nan());
                let tiny = 2f32.powi(-24); // The smallest f16 above zero.
                let mut y = vec![0.0; cols];
                kernels.add_scaled(element, &with(tiny), 1.0, &mut y);
                assert_eq!(y[place], tiny, "{element:?}: subnormals are kept");
                let mut y = vec![-0.0f32; cols];
                kernels.add_scaled(element, &with(-0.0), 1.0, &mut y);
                assert_eq!(y[place].to_bits(), (-0.0f32).to_bits());
                let mut y = vec![1.0f32; cols];
                kernels.add_scaled(element, &with(f32::INFINITY), -1.0, &mut y);
                assert_eq!(y[place], f32::NEG_INFINITY);
                assert!(y[..place].iter().all(|&v| v == 0.5), "neighbours are untouched");
            }
        }
    }
}
