//! A product of f32 matrices on the processor's matrix unit.
//!
//! ```text
//!                                       right: its panels, packed by all threads   ┐
//!                                  ┌──┬──┬──┬──┬──┐                                │ for each `DEPTH` steps of k,
//!     left: rows of a part,        └──┴──┴──┴──┴──┘                                │ in this order
//!     packed by its thread   ┌──┐  ┌──┬──┬──┬──┬──┐  a part of the result: each    │
//!                            ├──┤  ├──┼──┼──┼──┼──┤  right panel against all left  │
//!                            └──┘  └──┴──┴──┴──┴──┘  ones, which the second        │
//!                                                    cache keeps                   ┘
//! ```
//!
//! An element is summed in the order of `k`, in blocks that depend on `k` alone: of products that are the unit's, its
//! bits depend on neither the number of threads nor the rows and columns beside it.

#![expect(
    unsafe_code,
    reason = "threads write the blocks of a matrix that they share out among themselves"
)]

use std::ops::Range;

use rayon::prelude::*;

use super::flex::Matrix;
use crate::amx::{Amx, LINES, Lines, Order, Panels, Side, Start, Tile, Unfit, Unit};

/// Steps whose panels are packed at once.
const DEPTH: usize = 512;

/// Rows of a part, at most: so many of `DEPTH` steps, packed, leave half of a second cache of 2 MB to the right panels.
const ROWS: usize = 256;

/// Multiply-adds, and rows and columns, from which on a product is worth packing for the unit. About there it takes a
/// quarter less time than multiply-adds on a free core, and a fifth more on a slowed one; below, more on both.
const WORTH: usize = 1 << 22;
const LEAST: usize = 128;

/// `left · right`, plus `row` in every row where there is one; nothing where the unit cannot, or is not worth it.
pub(super) fn product(
    left: &Matrix<'_, f32>,
    right: &Matrix<'_, f32>,
    row: Option<&[f32]>,
) -> Option<Vec<f32>> {
    let amx = Amx::detect()?;
    let ([m, k], n) = (left.shape, right.shape[1]);
    if m.min(n) < LEAST || m * n * k < WORTH {
        return None;
    }
    multiply(amx, left, right, row)
}

fn multiply(
    amx: Amx,
    left: &Matrix<'_, f32>,
    right: &Matrix<'_, f32>,
    row: Option<&[f32]>,
) -> Option<Vec<f32>> {
    let ([m, k], n) = (left.shape, right.shape[1]);
    let (left, right) = (
        Slices::of(left, Side::Left)?,
        Slices::of(right, Side::Right)?,
    );
    let mut start = row.map_or_else(|| vec![0.0; n], <[f32]>::to_vec);
    start.resize(n.next_multiple_of(LINES), 0.0);
    let mut out = Vec::with_capacity(m * n);
    let product = Product {
        amx,
        sizes: [m, n, k],
        left,
        right,
        start: &start,
        out: Shared(out.as_mut_ptr()),
    };
    product.run().ok()?;
    // SAFETY: the parts of a product are its whole, each was written, and the vector has room for them.
    unsafe { out.set_len(m * n) };
    Some(out)
}

struct Product<'a> {
    amx: Amx,
    sizes: [usize; 3],
    left: Slices<'a>,
    right: Slices<'a>,
    /// The row with which every row's sums begin, of whole panels.
    start: &'a [f32],
    out: Shared,
}

/// The first element of the result, whose blocks threads share out among themselves.
#[derive(Clone, Copy)]
struct Shared(*mut f32);

// SAFETY: it is an address; who writes there says why nobody else does.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Product<'_> {
    fn run(&self) -> Result<(), Unfit> {
        let [m, n, k] = self.sizes;
        // Parts of equal height, as many as threads at least, if need be by dividing columns too.
        let threads = rayon::current_num_threads();
        let rows = m.div_ceil(threads).next_multiple_of(LINES).min(ROWS);
        let panels = n.div_ceil(LINES);
        let columns = panels.div_ceil(threads.div_ceil(m.div_ceil(rows)));
        let parts: Vec<_> = (0..m.div_ceil(rows))
            .flat_map(|i| (0..panels.div_ceil(columns)).map(move |j| [i, j]))
            .map(|[i, j]| Part {
                rows: i * rows..m.min((i + 1) * rows),
                panels: j * columns..panels.min((j + 1) * columns),
            })
            .collect();
        let mut right = Panels::default();
        for first in (0..k).step_by(DEPTH) {
            let steps = DEPTH.min(k - first);
            // Later sums begin with what is there.
            let start = (first == 0).then_some(self.start);
            right.pack_on_threads(self.amx, Side::Right, [n, steps], self.right.from(0, first))?;
            parts
                .par_iter()
                .try_for_each_init(Panels::default, |left, part| {
                    left.pack(
                        self.amx,
                        Side::Left,
                        [part.rows.len(), steps],
                        self.left.from(part.rows.start, first),
                    )?;
                    self.multiply(part, left, &right, start);
                    Ok(())
                })?;
        }
        Ok(())
    }

    /// The panels of a part: each of the right ones against all of the left.
    fn multiply(&self, part: &Part, left: &Panels, right: &Panels, start: Option<&[f32]>) {
        let n = self.sizes[1];
        let unit = self.amx.open();
        let first = |row: usize, column: usize| {
            let [i, j] = [part.rows.start + row * LINES, column * LINES];
            ([i, j], self.out.0.wrapping_add(i * n + j))
        };
        for column in part.panels.clone() {
            for row in 0..left.len() {
                let ([i, j], out) = first(row, column);
                let next = match row + 1 < left.len() {
                    true => first(row + 1, column),
                    false => first(0, column + 1),
                };
                let block = Block {
                    panels: [left.panel(row), right.panel(column)],
                    rows: LINES.min(part.rows.end - i),
                    columns: LINES.min(n - j),
                    start: start.map(|row| &row[j..j + LINES]),
                    out,
                    out_row: n,
                    next: next.1,
                };
                // SAFETY: nothing here opens another unit. These rows and columns are inside the result, and this
                // part's alone; they have been written where there is no start.
                unsafe { block.multiply(&unit) };
            }
        }
    }
}

/// A left and a right panel, and where their product is.
struct Block<'a> {
    panels: [&'a [Tile]; 2],
    /// What there is of the panels' lines.
    rows: usize,
    columns: usize,
    /// What every row's sums begin with; without, with what is there.
    start: Option<&'a [f32]>,
    out: *mut f32,
    out_row: usize,
    /// What is written next.
    next: *const f32,
}

impl Block<'_> {
    /// # Safety
    /// `unit` is the last one that this thread has opened. These rows and columns can be written at `out`, which nobody
    /// else does, and read if there is no start.
    unsafe fn multiply(&self, unit: &Unit) {
        let out = (self.out, self.out_row);
        // SAFETY: the caller's, and a panel has as many lines as `start`, and as `edge` has rows and columns.
        unsafe {
            if self.rows == LINES && self.columns == LINES {
                unit.multiply(self.panels, self.begin(out), out, self.next);
                return;
            }
            let mut edge = [0.0; LINES * LINES];
            let at = (edge.as_mut_ptr(), LINES);
            if self.start.is_none() {
                self.copy(out, at);
            }
            unit.multiply(self.panels, self.begin(at), at, self.next);
            self.copy(at, out);
        }
    }

    /// What the sums begin with, if they are to be at `out`.
    fn begin(&self, (out, out_row): (*mut f32, usize)) -> Start {
        match self.start {
            Some(row) => Start {
                first: row.as_ptr(),
                row: 0,
            },
            None => Start {
                first: out,
                row: out_row,
            },
        }
    }

    /// Copies these rows and columns.
    ///
    /// # Safety
    /// They can be read at the one and written at the other, with rows so far apart.
    unsafe fn copy(&self, (from, from_row): (*mut f32, usize), (to, to_row): (*mut f32, usize)) {
        for row in 0..self.rows {
            let (from, to) = (
                from.wrapping_add(row * from_row),
                to.wrapping_add(row * to_row),
            );
            // SAFETY: the caller's.
            unsafe { to.copy_from_nonoverlapping(from, self.columns) };
        }
    }
}

/// A block of the result, which one thread writes: rows, and panels of columns.
struct Part {
    rows: Range<usize>,
    panels: Range<usize>,
}

/// A matrix of which the numbers along one dim lie side by side: its slices.
#[derive(Debug, Clone, Copy)]
struct Slices<'a> {
    storage: &'a [f32],
    start: usize,
    order: Order,
    count: usize,
    /// From slice to slice.
    stride: isize,
    length: usize,
}

impl<'a> Slices<'a> {
    /// Nothing where no dim's numbers lie side by side.
    fn of(matrix: &Matrix<'a, f32>, side: Side) -> Option<Self> {
        // The dims of lines and of steps.
        let (line, step) = match side {
            Side::Left => (0, 1),
            Side::Right => (1, 0),
        };
        let (order, along, across) = match matrix.strides {
            strides if strides[step] == 1 => (Order::ByLine, step, line),
            strides if strides[line] == 1 => (Order::ByStep, line, step),
            _ => return None,
        };
        Some(Self {
            storage: matrix.storage,
            start: matrix.start,
            order,
            count: matrix.shape[across],
            stride: matrix.strides[across],
            length: matrix.shape[along],
        })
    }

    /// The lines and steps from these on.
    fn from(
        &self,
        line: usize,
        step: usize,
    ) -> Lines<impl Fn(usize) -> &'a [f32] + Sync + use<'a>> {
        let (across, along) = match self.order {
            Order::ByLine => (line, step),
            Order::ByStep => (step, line),
        };
        let slices = *self;
        Lines {
            order: self.order,
            slice: move |index| slices.slice(across + index, along),
        }
    }

    /// What of a slice comes from `first` on.
    fn slice(&self, index: usize, first: usize) -> &'a [f32] {
        if index >= self.count || first >= self.length {
            return &[];
        }
        // `Matrix` has found that all of its elements are in the storage.
        let start = (self.start as isize + index as isize * self.stride) as usize;
        &self.storage[start + first..start + self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count)
            .map(|i| (1.7 * (i + seed) as f32).sin())
            .collect()
    }

    fn matrix(storage: &[f32], shape: [usize; 2]) -> Matrix<'_, f32> {
        Matrix {
            storage,
            start: 0,
            shape,
            strides: [shape[1] as isize, 1],
        }
    }

    #[test]
    fn a_product_is_the_sum_over_steps_and_its_row_however_matrices_lie() {
        let Some(amx) = Amx::detect() else { return };
        // Small whole numbers, of which every order of sums gives the same bits.
        let whole = |i: usize| (i * i % 13) as f32 - 6.0;
        let lying = |side: Side, [rows, columns]: [usize; 2], order: Order| match (side, order) {
            (Side::Left, Order::ByLine) | (Side::Right, Order::ByStep) => [columns as isize, 1],
            _ => [1, rows as isize],
        };
        for [m, k, n] in [[33, 40, 65], [70, 600, 31], [1, 1, 1], [300, 33, 300]] {
            for (left_order, right_order) in [
                (Order::ByLine, Order::ByLine),
                (Order::ByLine, Order::ByStep),
                (Order::ByStep, Order::ByLine),
                (Order::ByStep, Order::ByStep),
            ] {
                let left: Vec<f32> = (0..m * k).map(whole).collect();
                let right: Vec<f32> = (0..k * n).map(|i| whole(i / 3 + i)).collect();
                let row: Vec<f32> = (0..n).map(|i| i as f32).collect();
                let (of_left, of_right) = (
                    lying(Side::Left, [m, k], left_order),
                    lying(Side::Right, [k, n], right_order),
                );
                let at = |[row, column]: [isize; 2], i: usize, j: usize| {
                    (row * i as isize + column * j as isize) as usize
                };
                let found = multiply(
                    amx,
                    &Matrix {
                        strides: of_left,
                        ..matrix(&left, [m, k])
                    },
                    &Matrix {
                        strides: of_right,
                        ..matrix(&right, [k, n])
                    },
                    Some(&row),
                );
                for (index, found) in found.unwrap().into_iter().enumerate() {
                    let (i, j) = (index / n, index % n);
                    let steps = (0..k).map(|step| {
                        f64::from(left[at(of_left, i, step)])
                            * f64::from(right[at(of_right, step, j)])
                    });
                    let exact = f64::from(row[j]) + steps.sum::<f64>();
                    assert_eq!(f64::from(found), exact, "row {i}, column {j}");
                }
            }
        }
    }

    #[test]
    fn a_product_is_as_right_as_f32_is() {
        let Some(amx) = Amx::detect() else { return };
        let [m, k, n] = [70, 700, 90];
        let (left, right) = (numbers(m * k, 1), numbers(k * n, 2));
        let found = multiply(amx, &matrix(&left, [m, k]), &matrix(&right, [k, n]), None).unwrap();
        let (mut worst, mut of_f32): (f64, f64) = (0.0, 0.0);
        for (at, &found) in found.iter().enumerate() {
            let (i, j) = (at / n, at % n);
            let pairs = || (0..k).map(|step| (left[i * k + step], right[step * n + j]));
            let exact: f64 = pairs().map(|(a, b)| f64::from(a) * f64::from(b)).sum();
            let plain = pairs().fold(0.0_f32, |sum, (a, b)| a.mul_add(b, sum));
            worst = worst.max((f64::from(found) - exact).abs());
            of_f32 = of_f32.max((f64::from(plain) - exact).abs());
        }
        assert!(worst <= of_f32, "{worst:.2e}, in f32 {of_f32:.2e}");
    }

    #[test]
    fn an_elements_bits_do_not_depend_on_threads_or_on_what_is_beside_it() {
        let Some(amx) = Amx::detect() else { return };
        let [m, k, n] = [300, 600, 260];
        let (left, right) = (numbers(m * k, 3), numbers(k * n, 4));
        let on = |threads, rows: Range<usize>, columns: Range<usize>| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let of_rows = matrix(&left[rows.start * k..], [rows.len(), k]);
            let of_columns = Matrix {
                start: columns.start,
                shape: [k, columns.len()],
                ..matrix(&right, [k, n])
            };
            let product = || multiply(amx, &of_rows, &of_columns, None);
            pool.install(product).unwrap()
        };
        let whole = on(1, 0..m, 0..n);
        for (threads, rows, columns) in [
            (2, 0..m, 0..n),
            (5, 0..m, 0..n),
            (40, 0..m, 0..n),
            (2, 37..120, 0..n),
            (1, 299..300, 0..n),
            (1, 0..m, 37..120),
            (3, 11..200, 259..260),
        ] {
            let part: Vec<f32> = (rows.clone())
                .flat_map(|i| &whole[i * n..][columns.clone()])
                .copied()
                .collect();
            assert!(part == on(threads, rows, columns));
        }
    }

    #[test]
    fn numbers_that_bfloat16_does_not_hold_are_left_to_f32() {
        let Some(amx) = Amx::detect() else { return };
        let [m, k, n] = [40, 50, 60];
        for strange in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX] {
            let places = [
                (Side::Left, 0),
                (Side::Left, m * k - 1),
                (Side::Right, 0),
                (Side::Right, k * n - 1),
            ];
            for (side, place) in places {
                let (mut left, mut right) = (numbers(m * k, 5), numbers(k * n, 6));
                match side {
                    Side::Left => left[place] = strange,
                    Side::Right => right[place] = strange,
                }
                let product = multiply(amx, &matrix(&left, [m, k]), &matrix(&right, [k, n]), None);
                assert!(product.is_none(), "{strange}");
            }
        }
    }
}
