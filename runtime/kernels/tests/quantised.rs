//! Products of quantised rows against their plain twins, and the bitwise promises, on every instruction set present.

use std::num::NonZeroUsize;

use flashlm_kernels::{Element, Kernels, MatmulScratch, Matrix, RowLayout, RowTokens, ScaleGroup, Threads, reference};

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

    fn float(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.bits() as u8).collect()
    }

    fn scales(&mut self, n: usize) -> Vec<u8> {
        (0..n).flat_map(|_| half::bf16::from_f32(self.float() / 8.0).to_le_bytes()).collect()
    }
}

/// Rows of random numbers with gaps between them, in groups of three, as records have them.
struct Quantised {
    element: Element,
    group: ScaleGroup,
    rows: usize,
    cols: usize,
    layout: RowLayout,
    values: Vec<u8>,
    scales: Vec<u8>,
    scale_stride: usize,
}

impl Quantised {
    fn new(random: &mut Random, element: Element, group: usize, rows: usize, cols: usize) -> Self {
        let group = ScaleGroup::new(group).unwrap();
        let row_stride = element.row_bytes(cols) + 7;
        let layout = RowLayout { offset: 3, row_stride, rows_per_group: 3, group_stride: 3 * row_stride + 5 };
        let scale_stride = group.scale_bytes(cols) + 2;
        Self {
            element,
            group,
            rows,
            cols,
            layout,
            values: random.bytes(3 + rows.div_ceil(3) * layout.group_stride),
            scales: random.scales(rows * scale_stride / 2),
            scale_stride,
        }
    }

    fn matrix(&self) -> Matrix<'_> {
        let matrix = Matrix::strided(self.element, &self.values, self.rows, self.cols, self.layout).unwrap();
        matrix.with_scales(&self.scales, self.scale_stride, self.group).unwrap()
    }
}

/// Matrices of both formats and several groups; their last groups and blocks are not full.
fn matrices(seed: u64, shapes: &[(usize, usize)]) -> Vec<Quantised> {
    let mut random = Random(seed);
    let mut list = Vec::new();
    for &(rows, cols) in shapes {
        for element in [Element::Q8, Element::Q4] {
            for group in [32, 64, 1 << 20] {
                list.push(Quantised::new(&mut random, element, group, rows, cols));
            }
        }
    }
    list
}

fn pools() -> [Threads; 3] {
    [1, 2, 5].map(|threads| Threads::new(NonZeroUsize::new(threads).unwrap()).unwrap())
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// As in `products.rs`.
fn assert_close(got: &[f32], want: &[(f64, f64)], terms: usize, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let unit = f64::from(f32::EPSILON) * (2.0 + (terms as f64).sqrt());
    for (i, (got, (sum, size))) in got.iter().zip(want).enumerate() {
        assert!((f64::from(*got) - sum).abs() <= unit * size + 1e-40, "{what} [{i}]: {got} for {sum} of size {size}");
    }
}

fn name(kernels: Kernels, q: &Quantised) -> String {
    let (set, group) = (kernels.instruction_set(), q.group.elements());
    format!("{set} {:?} by {group}, {} x {}", q.element, q.rows, q.cols)
}

#[test]
fn rows_widen_exactly() {
    for q in matrices(1, &[(2, 1), (2, 15), (2, 16), (3, 33), (2, 64), (1, 100), (2, 300)]) {
        for kernels in Kernels::all_present() {
            for r in 0..q.rows {
                let mut row = vec![f32::NAN; q.cols];
                kernels.to_f32(q.element, q.matrix().row(r), &mut row);
                let want = reference::to_f32(q.element, q.matrix().row(r), q.cols);
                assert_eq!(bits(&row), bits(&want), "{} row {r}", name(kernels, &q));
            }
        }
    }
}

#[test]
fn dots_agree_with_their_twin_and_with_each_other() {
    let pools = pools();
    for q in matrices(2, &[(1, 1), (7, 31), (5, 32), (6, 47), (9, 64), (4, 96), (11, 1000), (130, 4544)]) {
        let (w, x) = (q.matrix(), Random(3).floats(q.cols));
        let want = reference::matvec(w, &x);
        for kernels in Kernels::all_present() {
            let what = name(kernels, &q);
            let mut y = vec![f32::NAN; q.rows];
            kernels.matvec_serial(w, &x, &mut y);
            assert_close(&y, &want, q.cols, &what);
            for pool in &pools {
                let mut again = vec![f32::NAN; q.rows];
                kernels.matvec(pool, w, &x, &mut again);
                assert_eq!(bits(&y), bits(&again), "{what}: {} threads", pool.count());
                kernels.gathered_dots(pool, q.element, &|i| w.row(q.rows - 1 - i), &x, &mut again);
                again.reverse();
                assert_eq!(bits(&y), bits(&again), "{what}: gathered by {} threads", pool.count());
            }
            let cut = q.rows / 3;
            kernels.matvec_serial(w.rows_range(cut..q.rows), &x, &mut y[cut..]);
            assert_eq!(y[q.rows - 1].to_bits(), kernels.dot(q.element, w.row(q.rows - 1), &x).to_bits(), "{what}");
            assert_close(&y, &want, q.cols, &what);
        }
    }
}

#[test]
fn scaled_rows_agree_with_their_twin_and_keep_list_order() {
    let pools = pools();
    for q in matrices(4, &[(1, 1), (7, 33), (20, 64), (19, 1000), (60, 4544)]) {
        let mut random = Random(5);
        let (w, start) = (q.matrix(), random.floats(q.cols));
        let active: Vec<(u32, f32)> = (0..q.rows as u32).rev().map(|r| (r, random.float())).collect();
        let coefficients: Vec<f32> = active.iter().map(|a| a.1).collect();
        let want = reference::add_scaled_rows(w, &active, &start);
        for kernels in Kernels::all_present() {
            let what = name(kernels, &q);
            let mut y = start.clone();
            kernels.add_scaled_rows_serial(w, &active, &mut y);
            assert_close(&y, &want, q.rows, &what);
            let mut one_by_one = start.clone();
            active.iter().for_each(|&(r, a)| kernels.add_scaled(q.element, w.row(r as usize), a, &mut one_by_one));
            assert_eq!(bits(&y), bits(&one_by_one), "{what}: one by one");
            for pool in &pools {
                let mut again = start.clone();
                kernels.add_scaled_rows(pool, w, &active, &mut again);
                assert_eq!(bits(&y), bits(&again), "{what}: {} threads", pool.count());
                let mut gathered = start.clone();
                let row = |i: usize| w.row(active[i].0 as usize);
                kernels.gathered_add(pool, q.element, &row, &coefficients, &mut gathered);
                assert_eq!(bits(&y), bits(&gathered), "{what}: gathered by {} threads", pool.count());
            }
        }
    }
}

#[test]
fn products_of_many_tokens_agree_with_their_twins() {
    let pools = pools();
    for q in matrices(6, &[(5, 33), (40, 100), (101, 320)]) {
        let w = q.matrix();
        for tokens in [1, 3, 8, 17, 50] {
            let mut random = Random(tokens as u64);
            let (x, a) = (random.floats(tokens * q.cols), random.floats(tokens * q.rows));
            let start = random.floats(tokens * q.cols);
            let want = reference::matmul(w, &x, tokens);
            let want_sums = reference::matmul_rows_add(w, &a, q.rows, tokens, &start);
            for kernels in Kernels::all_present() {
                let what = format!("{}, {tokens} tokens", name(kernels, &q));
                let mut first: Option<(Vec<u32>, Vec<u32>)> = None;
                for pool in &pools {
                    let (mut y, mut sums) = (vec![f32::NAN; tokens * q.rows], start.clone());
                    let mut scratch = MatmulScratch::default();
                    kernels.matmul(pool, w, &x, tokens, &mut y, q.rows, &mut scratch);
                    kernels.matmul_rows_add(pool, w, &a, q.rows, tokens, &mut sums, &mut scratch);
                    assert_close(&y, &want, q.cols, &what);
                    assert_close(&sums, &want_sums, q.rows, &what);
                    let found = (bits(&y), bits(&sums));
                    assert_eq!(first.get_or_insert_with(|| found.clone()), &found, "{what}: {} threads", pool.count());
                }
                let mut listed = start[..q.cols].to_vec();
                let active: Vec<(u32, f32)> = (0..q.rows).map(|r| (r as u32, a[r])).collect();
                kernels.add_scaled_rows_serial(w, &active, &mut listed);
                assert_eq!(bits(&listed), first.unwrap().1[..q.cols], "{what}: rows listed");
            }
        }
    }
}

#[test]
fn selected_pairs_agree_with_their_twin_and_do_not_depend_on_each_other() {
    let pools = pools();
    for q in matrices(8, &[(3, 31), (40, 100), (101, 320), (7, 576)]) {
        let w = q.matrix();
        for (tokens, of) in [(1, 1), (17, 3), (50, 2)] {
            let x = Random(tokens as u64).floats(tokens * q.cols);
            let want = reference::matmul(w, &x, tokens);
            let pairs = |of: usize| {
                let (mut starts, mut list) = (vec![0], Vec::new());
                for row in 0..q.rows {
                    list.extend((0..tokens as u16).filter(|t| (row + usize::from(*t)).is_multiple_of(of)));
                    starts.push(list.len() as u32);
                }
                (starts, list)
            };
            let ((starts, list), (all_starts, all)) = (pairs(of), pairs(1));
            for kernels in Kernels::all_present() {
                let what = format!("{}, {tokens} tokens", name(kernels, &q));
                for pool in &pools {
                    let (mut y, mut of_all) = (vec![f32::NAN; list.len()], vec![f32::NAN; all.len()]);
                    let mut scratch = MatmulScratch::default();
                    let selected = RowTokens { starts: &starts, tokens: &list };
                    kernels.selected_dots(pool, w, selected, &x, &mut y, &mut scratch);
                    let selected = RowTokens { starts: &all_starts, tokens: &all };
                    kernels.selected_dots(pool, w, selected, &x, &mut of_all, &mut scratch);
                    let place = |row: usize, token: u16| usize::from(token) * q.rows + row;
                    let each = |starts: &[u32], list: &[u16]| -> Vec<usize> {
                        let rows = starts.windows(2).enumerate();
                        rows.flat_map(|(row, span)| {
                            list[span[0] as usize..span[1] as usize].iter().map(|t| place(row, *t)).collect::<Vec<_>>()
                        })
                        .collect()
                    };
                    let twins: Vec<(f64, f64)> = each(&starts, &list).into_iter().map(|at| want[at]).collect();
                    assert_close(&y, &twins, q.cols, &what);
                    let mut by_place = vec![0.0; all.len()];
                    each(&all_starts, &all).into_iter().zip(&of_all).for_each(|(at, y)| by_place[at] = *y);
                    let same: Vec<f32> = each(&starts, &list).into_iter().map(|at| by_place[at]).collect();
                    assert_eq!(bits(&y), bits(&same), "{what}: {} threads", pool.count());
                }
            }
        }
    }
}
