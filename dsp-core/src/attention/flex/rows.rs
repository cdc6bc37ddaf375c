//! The rows of a tensor `[B, L, H, w]` in memory: read through strides, written by many threads.

#![expect(
    unsafe_code,
    reason = "threads write rows of one tensor that they share out among themselves"
)]

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::backend::flex::FlexTensor;

use crate::simd::{Left, Run};

/// Which row of `[B, L, H, w]`: sample, position, head.
pub(super) type Row = [usize; 3];

/// An f32 tensor `[B, L, H, w]`, any view whose rows are contiguous.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows<'a> {
    data: &'a [f32],
    strides: Row,
    width: usize,
}

impl<'a> Rows<'a> {
    /// # Panics
    /// If the tensor is not what [`readable`] returned.
    pub(super) fn of(tensor: &'a FlexTensor) -> Self {
        let layout = tensor.layout();
        let stride =
            |dim: usize| usize::try_from(layout.strides()[dim]).expect("rows run forwards");
        Self {
            data: &tensor.storage::<f32>()[layout.start_offset()..],
            strides: [stride(0), stride(1), stride(2)],
            width: layout.shape()[3],
        }
    }

    pub(super) fn width(&self) -> usize {
        self.width
    }

    #[inline(always)]
    pub(super) fn row(&self, row: Row) -> &'a [f32] {
        &self.data_from(row)[..self.width]
    }

    /// What lies from a row on.
    #[inline(always)]
    fn data_from(&self, row: Row) -> &'a [f32] {
        let start: usize = row.iter().zip(self.strides).map(|(i, s)| i * s).sum();
        &self.data[start..]
    }

    /// The rows of a head at some positions.
    #[inline(always)]
    pub(super) fn positions(
        self,
        sample: usize,
        positions: &Range<usize>,
        head: usize,
    ) -> impl Iterator<Item = &'a [f32]> + Clone + use<'a> {
        (positions.clone()).map(move |position| self.row([sample, position, head]))
    }

    /// The rows of a head from this one on, as the left side of a product.
    #[inline(always)]
    pub(super) fn left(self, row: Row) -> Left<'a> {
        Left::rows(self.data_from(row), self.strides[1])
    }

    /// The rows of heads that lie side by side from this one on, to be asked for ahead: if they lie end to end, as one.
    pub(super) fn runs(
        &self,
        [sample, position, head]: Row,
        heads: usize,
    ) -> impl Iterator<Item = Run> {
        let (runs, width) = match self.strides[2] == self.width {
            true => (1, heads * self.width),
            false => (heads, self.width),
        };
        let rows = *self;
        (head..head + runs).map(move |head| Run {
            width,
            ..rows.run([sample, position, head])
        })
    }

    /// The rows of a head from this one on, to be asked for ahead.
    pub(super) fn run(&self, row: Row) -> Run {
        Run {
            start: self.row(row).as_ptr(),
            stride: self.strides[1],
            width: self.width,
        }
    }
}

/// The tensor itself where its rows are contiguous and run forwards, as those of slices, permuted dims and repeated
/// ones do; else a copy.
pub(super) fn readable(tensor: FlexTensor) -> FlexTensor {
    let layout = tensor.layout();
    let strides = layout.strides();
    let forwards = strides.iter().all(|&stride| stride >= 0);
    match forwards && (strides[3] == 1 || layout.shape()[3] == 1) {
        true => tensor,
        false => tensor.to_contiguous(),
    }
}

/// Where the rows of a contiguous tensor `[B, L, H, w]` lie.
#[derive(Debug, Clone, Copy)]
struct Contiguous {
    dims: Row,
    width: usize,
}

impl Contiguous {
    fn rows(&self) -> usize {
        self.dims.iter().product()
    }

    /// The first element of a row; the others follow it.
    ///
    /// # Panics
    /// If there is no such row.
    #[inline(always)]
    fn start(&self, [sample, position, head]: Row) -> usize {
        let [samples, positions, heads] = self.dims;
        assert!(sample < samples && position < positions && head < heads);
        ((sample * positions + position) * heads + head) * self.width
    }
}

/// A new contiguous tensor `[B, L, H, w]` that is not cleared first, as threads write each of its rows once.
pub(super) struct NewRows {
    /// Of length 0: its capacity is what is written.
    data: Vec<f32>,
    start: *mut f32,
    place: Contiguous,
    /// How many rows have been.
    written: AtomicUsize,
}

// SAFETY: what threads share is an address, where they write rows by `NewRows::write`, whose callers keep them apart,
// and a number that is atomic.
unsafe impl Sync for NewRows {}

impl NewRows {
    pub(super) fn new(dims: Row, width: usize) -> Self {
        let place = Contiguous { dims, width };
        let mut data = Vec::with_capacity(place.rows() * width);
        Self {
            start: data.as_mut_ptr(),
            data,
            place,
            written: AtomicUsize::new(0),
        }
    }

    /// Writes the rows of a head from `row` on; of each of `from` as much as a row has.
    ///
    /// # Panics
    /// If there is no such row, or one of `from` is shorter.
    ///
    /// # Safety
    /// Nobody else writes the same rows, at this time or another.
    #[inline(always)]
    pub(super) unsafe fn write<'r>(
        &self,
        [sample, first, head]: Row,
        from: impl Iterator<Item = &'r [f32]>,
    ) {
        let mut written = 0;
        for from in from {
            let from = &from[..self.place.width];
            let start = self.place.start([sample, first + written, head]);
            // SAFETY: the row lies inside the vector's capacity by the assertion in `start`, and is nobody else's;
            // `from` is as long, and borrows what is not being written.
            unsafe {
                std::ptr::copy_nonoverlapping(from.as_ptr(), self.start.add(start), from.len())
            };
            written += 1;
        }
        self.written.fetch_add(written, Ordering::Relaxed);
    }

    /// All rows, when they have been written.
    ///
    /// # Panics
    /// If they have not.
    pub(super) fn all(self) -> Vec<f32> {
        let Self {
            mut data,
            place,
            written,
            ..
        } = self;
        assert_eq!(written.into_inner(), place.rows(), "every row is written");
        // SAFETY: the capacity is these rows' elements; no row was written twice, and so many were written as there
        // are: so each was.
        unsafe { data.set_len(place.rows() * place.width) };
        data
    }

    /// The rows of heads that lie side by side from this one on, to be asked for ahead.
    ///
    /// # Panics
    /// As [`run`](Self::run).
    pub(super) fn runs(&self, row: Row, heads: usize) -> Run {
        let width = heads * self.place.width;
        Run {
            width,
            ..self.run(row)
        }
    }

    /// The rows of a head from this one on, to be asked for ahead.
    ///
    /// # Panics
    /// If there is no such row.
    pub(super) fn run(&self, row: Row) -> Run {
        Run {
            start: self.start.wrapping_add(self.place.start(row)),
            stride: self.place.dims[2] * self.place.width,
            width: self.place.width,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_are_written_in_any_order_are_the_tensors() {
        let rows = NewRows::new([2, 3, 2], 2);
        for sample in [1, 0] {
            for head in [0, 1] {
                let from: Vec<[f32; 3]> = (0..3)
                    .map(|position| {
                        let first = (sample * 12 + position * 4 + head * 2) as f32;
                        [first, first + 1.0, f32::NAN]
                    })
                    .collect();
                // SAFETY: each row once.
                unsafe { rows.write([sample, 0, head], from.iter().map(|row| &row[..])) };
            }
        }
        let expected: Vec<f32> = (0..24u8).map(f32::from).collect();
        assert_eq!(rows.all(), expected);
    }

    #[test]
    #[should_panic(expected = "every row is written")]
    fn a_row_that_was_not_written_is_noticed() {
        let rows = NewRows::new([1, 2, 1], 1);
        // SAFETY: each row once.
        unsafe { rows.write([0, 1, 0], [&[1.0_f32][..]].into_iter()) };
        rows.all();
    }
}
