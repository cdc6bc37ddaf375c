//! A matrix product whose result stays in registers: `C = A·B` or `C += A·B`, f32.
//!
//! ```text
//!                     B: panels, two vectors wide, each row of a panel after the other
//!                     ┌────┬────┬────┐
//!                   k │ ▓▓ │    │    │
//!                     └────┴────┴────┘
//!       A: any strides  ▲ two loads a step
//!      ┌─────┐        ┌────┬────┬────┐
//!   6  │▒▒▒▒▒│ ─────► │ ██ │    │    │   6 × 2 vectors of sums, which fill the 16 registers with
//!      ├─────┤ each   ├────┼────┼────┤   what they are multiplied from (12 × 2 where there are 32)
//!   m  │     │ number │    │    │    │
//!      └─────┘ to all └────┴────┴────┘ n
//!              lanes
//! ```
//!
//! For the small matrices of a tile of attention, which are packed once and used often, this leaves out what a
//! general product must do at each call: packing, and choosing blocks for caches. The order of sums is that of `k`,
//! whatever the sizes: a row's bits do not depend on the rows beside it.
//!
//! Source: Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", ACM TOMS 34(3), 2008.

#![expect(
    unsafe_code,
    reason = "a matrix product that stays in registers reads and writes by address"
)]

use pulp::{Simd, WithSimd};

use super::Ahead;

/// Vectors in a row of a panel.
const VECTORS: usize = 2;

/// Columns of a panel of [`Right`].
#[inline(always)]
pub(crate) fn panel_width<S: Simd>() -> usize {
    VECTORS * S::F32_LANES
}

/// A: the element of row `i` and step `k` is `data[i·row + k·step]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Left<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) row: usize,
    pub(crate) step: usize,
}

impl<'a> Left<'a> {
    /// A matrix whose rows lie `stride` apart.
    #[inline(always)]
    pub(crate) fn rows(data: &'a [f32], stride: usize) -> Self {
        let (row, step) = (stride, 1);
        Self { data, row, step }
    }

    /// A matrix whose columns lie `stride` apart.
    #[inline(always)]
    pub(crate) fn columns(data: &'a [f32], stride: usize) -> Self {
        let (row, step) = (1, stride);
        Self { data, row, step }
    }
}

/// B: the element of step `k` and column `j` is `data[j/w·panel + k·w + j mod w]`, with `w` the [`panel_width`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Right<'a> {
    pub(crate) data: &'a [f32],
    /// From one panel to the next.
    pub(crate) panel: usize,
}

/// What happens to the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Store {
    /// It replaces what was there.
    Set,
    /// It is added to what was there.
    Add,
}

/// The product of `[m, k]` and `[k, n]`. The element of row `i` and column `j` is `out[i·out_row + j]`.
///
/// Columns are written in whole vectors: after the last come such of the last panel's columns as fill one.
///
/// # Panics
/// If a matrix does not hold its elements.
#[derive(Debug)]
pub(crate) struct Product<'a> {
    /// `[m, n, k]`.
    pub(crate) sizes: [usize; 3],
    pub(crate) left: Left<'a>,
    pub(crate) right: Right<'a>,
    pub(crate) out: &'a mut [f32],
    pub(crate) out_row: usize,
    pub(crate) store: Store,
    /// What is asked for meanwhile.
    pub(crate) ahead: &'a mut Ahead,
}

/// A [`Product`], inside a kernel: `right` are panels of so many steps, `out` has rows that lie so far apart.
///
/// # Panics
/// As [`Product`].
#[inline(always)]
pub(crate) fn multiply<S: Simd>(
    simd: S,
    sizes: [usize; 3],
    left: Left<'_>,
    (right, steps): (&[f32], usize),
    (out, out_row): (&mut [f32], usize),
    store: Store,
    ahead: &mut Ahead,
) {
    let right = Right {
        data: right,
        panel: steps * panel_width::<S>(),
    };
    simd.vectorize(Product {
        sizes,
        left,
        right,
        out,
        out_row,
        store,
        ahead,
    });
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if S::REGISTER_COUNT >= 32 {
            self.tiles::<S, 12>(simd);
        } else {
            self.tiles::<S, 6>(simd);
        }
    }
}

impl Product<'_> {
    #[inline(always)]
    fn tiles<S: Simd, const ROWS: usize>(self, simd: S) {
        let Self {
            sizes: [m, n, k],
            left,
            right,
            out,
            out_row,
            store,
            ahead,
        } = self;
        if m == 0 || n == 0 {
            return;
        }
        let (lanes, width) = (S::F32_LANES, panel_width::<S>());
        let columns = n.next_multiple_of(lanes);
        if k > 0 {
            assert!((m - 1) * left.row + (k - 1) * left.step < left.data.len());
            // Of panels that overlapped, the last vector of one before could lie further than the last panel's.
            assert!(columns <= width || right.panel >= width);
            let last = (columns - 1) / width * right.panel + (k - 1) * width;
            assert!(last + (columns - 1) % width < right.data.len());
        }
        assert!((m - 1) * out_row + columns <= out.len());
        for column in (0..columns).step_by(width) {
            for row in (0..m).step_by(ROWS) {
                let tile = Tile {
                    steps: k,
                    left: left.data[..].as_ptr().wrapping_add(row * left.row),
                    left_row: left.row,
                    left_step: left.step,
                    right: (right.data.as_ptr()).wrapping_add(column / width * right.panel),
                    right_step: width,
                    out: out.as_mut_ptr().wrapping_add(row * out_row + column),
                    out_row,
                    store,
                };
                // SAFETY: the largest element that a tile reads of either matrix, or writes, is one of those that
                // the assertions above found inside; a tile has as many rows as are left, up to `ROWS`, and the
                // last panel as many vectors as columns are left.
                unsafe {
                    if columns - column >= width {
                        tile.rows::<S, ROWS, VECTORS>(simd, m - row);
                    } else {
                        tile.rows::<S, ROWS, 1>(simd, m - row);
                    }
                }
                ahead.worked(ROWS * width * k);
            }
        }
    }
}

/// Up to `ROWS` rows and `VECTORS` vectors of the result.
#[derive(Clone, Copy)]
struct Tile {
    steps: usize,
    left: *const f32,
    left_row: usize,
    left_step: usize,
    right: *const f32,
    right_step: usize,
    out: *mut f32,
    out_row: usize,
    store: Store,
}

impl Tile {
    /// As many rows as are left, up to `ROWS`, each number of them compiled for itself.
    #[inline(always)]
    unsafe fn rows<S: Simd, const ROWS: usize, const V: usize>(self, simd: S, left: usize) {
        // SAFETY: the caller's.
        unsafe {
            match left {
                1 => self.sums::<S, 1, V>(simd),
                2 => self.sums::<S, 2, V>(simd),
                3 => self.sums::<S, 3, V>(simd),
                4 => self.sums::<S, 4, V>(simd),
                5 => self.sums::<S, 5, V>(simd),
                _ if ROWS == 6 => self.sums::<S, 6, V>(simd),
                6 => self.sums::<S, 6, V>(simd),
                7 => self.sums::<S, 7, V>(simd),
                8 => self.sums::<S, 8, V>(simd),
                9 => self.sums::<S, 9, V>(simd),
                10 => self.sums::<S, 10, V>(simd),
                11 => self.sums::<S, 11, V>(simd),
                _ => self.sums::<S, 12, V>(simd),
            }
        }
    }

    /// # Safety
    /// `ROWS` rows of `steps` elements can be read from `left` by its strides, `steps` rows of `V` vectors from
    /// `right`, and `ROWS` rows of `V` vectors can be read and written at `out`.
    #[inline(always)]
    unsafe fn sums<S: Simd, const ROWS: usize, const V: usize>(self, simd: S) {
        let lanes = S::F32_LANES;
        let mut sums = [[simd.splat_f32s(0.0); V]; ROWS];
        let (mut left, mut right) = (self.left, self.right);
        for _ in 0..self.steps {
            let mut b = [simd.splat_f32s(0.0); V];
            for (v, b) in b.iter_mut().enumerate() {
                // SAFETY: the caller's; vectors of pulp are arrays of numbers without an alignment of their own.
                *b = unsafe {
                    right
                        .wrapping_add(v * lanes)
                        .cast::<S::f32s>()
                        .read_unaligned()
                };
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                // SAFETY: the caller's.
                let a = simd.splat_f32s(unsafe { *left.wrapping_add(i * self.left_row) });
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = simd.mul_add_e_f32s(a, b, *sum);
                }
            }
            left = left.wrapping_add(self.left_step);
            right = right.wrapping_add(self.right_step);
        }
        for (i, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                let out = (self.out)
                    .wrapping_add(i * self.out_row + v * lanes)
                    .cast::<S::f32s>();
                // SAFETY: the caller's.
                unsafe {
                    let sum = match self.store {
                        Store::Set => sum,
                        Store::Add => simd.add_f32s(out.read_unaligned(), sum),
                    };
                    out.write_unaligned(sum);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::simd::Level;

    fn number(i: usize) -> f32 {
        // Small whole numbers: every order of sums gives the same bits.
        (i * 7 % 11) as f32 - 5.0
    }

    struct Width;

    impl WithSimd for Width {
        type Output = [usize; 2];

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> [usize; 2] {
            [S::F32_LANES, panel_width::<S>()]
        }
    }

    proptest! {
        #[test]
        fn a_product_is_the_sum_over_steps_for_any_sizes_and_strides(
            [m, n, k] in [0..30usize, 0..70usize, 0..9usize],
            across in any::<bool>(),
            more in 0..3usize,
            add in any::<bool>(),
        ) {
            for level in Level::all() {
                let [lanes, width] = level.run(Width);
                let columns = n.next_multiple_of(lanes);
                let stride = if across { m } else { k } + more;
                let (row, step) = if across { (1, stride) } else { (stride, 1) };
                let left: Vec<f32> = (0..stride * m.max(k)).map(number).collect();
                let panel = k * width + more;
                let right: Vec<f32> = (0..panel * n.div_ceil(width)).map(|i| number(i + 3)).collect();
                let out_row = columns + more;
                let before: Vec<f32> = (0..m * out_row).map(|i| number(i + 5)).collect();
                let mut out = before.clone();
                level.run(Product {
                    sizes: [m, n, k],
                    left: Left { data: &left, row, step },
                    right: Right { data: &right, panel },
                    out: &mut out,
                    out_row,
                    store: if add { Store::Add } else { Store::Set },
                    ahead: &mut Ahead::default(),
                });
                for i in 0..m {
                    for j in 0..out_row {
                        let (found, old) = (out[i * out_row + j], before[i * out_row + j]);
                        if j >= columns {
                            prop_assert_eq!(found, old, "beyond the columns");
                        } else if j < n {
                            let product = |s: usize| {
                                left[i * row + s * step] * right[j / width * panel + s * width + j % width]
                            };
                            let sum: f32 = (0..k).map(product).sum();
                            prop_assert_eq!(found, if add { old + sum } else { sum });
                        }
                    }
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "left.data.len()")]
    fn a_matrix_that_does_not_hold_its_elements_is_refused() {
        let Some(level) = Level::detect() else {
            panic!("left.data.len()");
        };
        level.run(Product {
            sizes: [2, 8, 3],
            left: Left {
                data: &[0.0; 5],
                row: 3,
                step: 1,
            },
            right: Right {
                data: &[0.0; 96],
                panel: 96,
            },
            out: &mut [0.0; 32],
            out_row: 16,
            store: Store::Set,
            ahead: &mut Ahead::default(),
        });
    }

    #[test]
    #[should_panic(expected = "right.panel >= width")]
    fn panels_that_overlap_are_refused_as_the_last_would_not_be_the_furthest() {
        let Some(level) = Level::detect() else {
            panic!("right.panel >= width");
        };
        let [lanes, width] = level.run(Width);
        // As far as the last panel's one vector reaches, which the first panel's second one passes.
        let right = vec![0.0; width + lanes];
        level.run(Product {
            sizes: [1, width + lanes, 2],
            left: Left::rows(&[0.0; 2], 2),
            right: Right {
                data: &right,
                panel: 0,
            },
            out: &mut vec![0.0; width + lanes],
            out_row: width + lanes,
            store: Store::Set,
            ahead: &mut Ahead::default(),
        });
    }
}
