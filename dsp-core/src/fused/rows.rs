//! Tensors on Flex seen as rows of their last dim: read through their strides, written in place where nobody else
//! has them, in blocks that the threads of the rank's pool share.

use std::marker::PhantomData;

use burn::backend::Flex;
use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{Bytes, DType, Device, Shape, Tensor};
use rayon::prelude::*;

use super::real::Real;

/// How many elements a block has, about: a block and what is read beside it fit a core's own cache.
///
/// Blocks do not depend on the number of threads, so neither does the order of any sum.
const BLOCK: usize = 1 << 14;

/// The element types for which the fused operations have loops of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Native {
    F32,
    F64,
}

/// Which loops serve a tensor, if it is on Flex and outside of any graph.
pub(crate) fn native<const D: usize>(x: &Tensor<D>) -> Option<Native> {
    if *x.device().as_dispatch() != *Device::flex().as_dispatch() {
        return None;
    }
    match x.dtype() {
        DType::F32 => Some(Native::F32),
        DType::F64 => Some(Native::F64),
        _ => None,
    }
}

/// What Burn has below a tensor that [`native`] has found to be on Flex.
pub(crate) fn primitive<const D: usize>(x: Tensor<D>) -> FlexTensor {
    match x.try_into_primitive::<Flex>() {
        Ok(x) => x,
        Err(problem) => unreachable!("`native` has found the tensor to be on Flex: {problem:?}"),
    }
}

/// A tensor's rows, read where they are.
pub(crate) struct Rows<E> {
    tensor: FlexTensor,
    width: usize,
    count: usize,
    /// Lengths and strides of the dims before the last, those joined that lie end to end.
    outer: Vec<(usize, isize)>,
    element: PhantomData<E>,
}

impl<E: Real> Rows<E> {
    /// The rows of `x`, which is copied only if its last dim is strided itself.
    pub(crate) fn of<const D: usize>(x: Tensor<D>) -> Self {
        let dims = x.dims();
        let (width, count) = (dims[D - 1], dims[..D - 1].iter().product());
        let mut tensor = primitive(x);
        if width > 1 && tensor.layout().strides()[D - 1] != 1 {
            tensor = tensor.to_contiguous();
        }
        let mut outer: Vec<(usize, isize)> = Vec::new();
        for (&length, &stride) in dims[..D - 1].iter().zip(tensor.layout().strides()) {
            match outer.last_mut() {
                _ if length == 1 => {}
                Some((joined, last)) if *last == stride * length as isize => {
                    *joined *= length;
                    *last = stride;
                }
                _ => outer.push((length, stride)),
            }
        }
        Self {
            tensor,
            width,
            count,
            outer,
            element: PhantomData,
        }
    }

    /// The number of rows.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// The length of each.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// A row, in the order of the tensor's dims.
    #[inline]
    pub(crate) fn row(&self, index: usize) -> &[E] {
        let mut offset = self.tensor.layout().start_offset() as isize;
        let mut left = index;
        for &(length, stride) in self.outer.iter().rev() {
            offset += (left % length) as isize * stride;
            left /= length;
        }
        &self.tensor.storage::<E>()[offset as usize..][..self.width]
    }
}

/// A tensor with storage of its own, contiguous, to be overwritten.
pub(crate) struct Owned<E> {
    tensor: FlexTensor,
    element: PhantomData<E>,
}

impl<E: Real> Owned<E> {
    /// Zeros.
    pub(crate) fn zeros(shape: &[usize]) -> Self {
        Self::from_vec(vec![E::ZERO; shape.iter().product()], shape)
    }

    /// These values.
    pub(crate) fn from_vec(values: Vec<E>, shape: &[usize]) -> Self {
        let layout = Layout::contiguous(Shape::from(shape.to_vec()));
        Self {
            tensor: FlexTensor::new(Bytes::from_elems(values), layout, E::dtype()),
            element: PhantomData,
        }
    }

    /// The values of `x`: in its own storage if nobody else holds that, else a copy.
    pub(crate) fn of<const D: usize>(x: Tensor<D>) -> Self {
        let shape = x.dims();
        let count: usize = shape.iter().product();
        let tensor = primitive(x);
        let layout = tensor.layout();
        let whole = layout.is_contiguous()
            && layout.start_offset() == 0
            && tensor.storage::<E>().len() == count;
        if whole && tensor.is_unique() {
            return Self {
                tensor,
                element: PhantomData,
            };
        }
        let rows = Rows::<E>::of(Tensor::<D>::from_primitive::<Flex>(tensor));
        let mut values = Vec::with_capacity(count);
        for index in 0..rows.count() {
            values.extend_from_slice(rows.row(index));
        }
        Self::from_vec(values, &shape)
    }

    /// The values.
    pub(crate) fn values(&mut self) -> &mut [E] {
        self.tensor.storage_mut()
    }

    /// The tensor.
    pub(crate) fn into_tensor<const D: usize>(self) -> Tensor<D> {
        Tensor::from_primitive::<Flex>(self.tensor)
    }
}

/// Calls `work` for blocks of consecutive rows of `values`, each with the index of its first row; what it returns, in
/// the order of the blocks.
pub(crate) fn blocks<E: Real, R: Send>(
    values: &mut [E],
    width: usize,
    work: impl Fn(usize, &mut [E]) -> R + Send + Sync,
) -> Vec<R> {
    if values.is_empty() {
        return Vec::new();
    }
    let rows = (BLOCK / width).max(1);
    let block = |(index, block): (usize, &mut [E])| work(index * rows, block);
    if rayon::current_num_threads() == 1 || values.len() <= rows * width {
        return values
            .chunks_mut(rows * width)
            .enumerate()
            .map(block)
            .collect();
    }
    let blocks = values.par_chunks_mut(rows * width).enumerate();
    blocks.map(block).collect()
}

/// Adds up vectors in order; zeros of `width` if there are none.
pub(crate) fn add_up<E: Real>(terms: impl IntoIterator<Item = Vec<E>>, width: usize) -> Vec<E> {
    let mut terms = terms.into_iter();
    let mut sum = terms.next().unwrap_or_else(|| vec![E::ZERO; width]);
    for term in terms {
        for (sum, term) in sum.iter_mut().zip(term) {
            *sum += term;
        }
    }
    sum
}

/// [`blocks`] of two tensors of one shape.
pub(crate) fn blocks_of_two<E: Real>(
    [a, b]: [&mut [E]; 2],
    width: usize,
    work: impl Fn(usize, [&mut [E]; 2]) + Send + Sync,
) {
    if a.is_empty() {
        return;
    }
    let rows = (BLOCK / width).max(1);
    let block = |(index, (a, b)): (usize, (&mut [E], &mut [E]))| work(index * rows, [a, b]);
    let size = rows * width;
    if rayon::current_num_threads() == 1 || a.len() <= size {
        let pairs = a.chunks_mut(size).zip(b.chunks_mut(size));
        pairs.enumerate().for_each(block);
    } else {
        let pairs = a.par_chunks_mut(size).zip(b.par_chunks_mut(size));
        pairs.enumerate().for_each(block);
    }
}
