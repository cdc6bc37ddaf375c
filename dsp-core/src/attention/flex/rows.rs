//! The rows of a tensor `[B, L, H, w]` in memory: read through strides, written by many threads.

#![expect(
    unsafe_code,
    reason = "threads write rows of one tensor that they share out among themselves"
)]

use std::marker::PhantomData;
use std::ops::Range;

use burn::backend::flex::FlexTensor;

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
        let start: usize = row.iter().zip(self.strides).map(|(i, s)| i * s).sum();
        &self.data[start..start + self.width]
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

/// A new contiguous tensor `[B, L, H, w]`, whose rows several threads write.
pub(super) struct RowsOut<'a> {
    data: *mut f32,
    dims: Row,
    width: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: what threads share is a pointer, through which they reach only rows that they asked for by
// `RowsOut::row`; whose callers keep them apart.
unsafe impl Sync for RowsOut<'_> {}

impl<'a> RowsOut<'a> {
    pub(super) fn new(data: &'a mut [f32], dims: Row, width: usize) -> Self {
        assert_eq!(data.len(), dims.iter().product::<usize>() * width);
        Self {
            data: data.as_mut_ptr(),
            dims,
            width,
            lifetime: PhantomData,
        }
    }

    /// # Panics
    /// If there is no such row.
    ///
    /// # Safety
    /// Nobody else holds the same row: the caller's part of the work is the only one that writes it.
    #[expect(
        clippy::mut_from_ref,
        reason = "rows are apart, which the caller vouches for"
    )]
    #[inline(always)]
    pub(super) unsafe fn row(&self, [sample, position, head]: Row) -> &mut [f32] {
        let [samples, positions, heads] = self.dims;
        assert!(sample < samples && position < positions && head < heads);
        let start = ((sample * positions + position) * heads + head) * self.width;
        // SAFETY: the row lies inside by the assertion and the length checked by `new`, and is nobody else's.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), self.width) }
    }
}
