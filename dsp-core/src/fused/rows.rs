//! Tensors on Flex seen as rows of their last dim: read through their strides, changed in place where nobody else has
//! them, and else written once.

use std::marker::PhantomData;
use std::ops::Range;

use burn::backend::Flex;
use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{Bytes, DType, Device, Shape, Tensor};

pub(crate) use super::blocks::WHOLE;
use super::blocks::{cut, each, split};
use super::fresh::{self, Part};
use super::real::Real;

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
        Self::of_primitive(primitive(x), dims)
    }

    /// The same of what Burn has below a tensor of these `dims`.
    fn of_primitive<const D: usize>(mut tensor: FlexTensor, dims: [usize; D]) -> Self {
        let (width, count) = (dims[D - 1], dims[..D - 1].iter().product());
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

/// A tensor with storage of its own, contiguous, to be changed.
pub(crate) struct Owned<E> {
    tensor: FlexTensor,
    element: PhantomData<E>,
}

impl<E: Real> Owned<E> {
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
        let (shape, x) = (x.dims(), primitive(x));
        if Self::is_alone(&x) {
            return Self::alone(x);
        }
        let (values, _) = written_from(x, shape, WHOLE, |_, _| ());
        Self::from_vec(values, &shape)
    }

    /// Whether a tensor is all that its storage has, and nobody else holds that.
    fn is_alone(tensor: &FlexTensor) -> bool {
        let layout = tensor.layout();
        let whole = layout.is_contiguous()
            && layout.start_offset() == 0
            && tensor.storage::<E>().len() == layout.num_elements();
        whole && tensor.is_unique()
    }

    /// A tensor that [is alone](Self::is_alone).
    fn alone(tensor: FlexTensor) -> Self {
        Self {
            tensor,
            element: PhantomData,
        }
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

/// The blocks of a tensor's rows, each with the number of its elements.
fn blocks_of<const D: usize>(shape: [usize; D], group: usize) -> Vec<(usize, Range<usize>)> {
    cut(shape[..D - 1].iter().product(), shape[D - 1], group)
}

/// A new tensor, in blocks of consecutive rows: `write` is told which, and writes them whole. What it returns comes
/// beside, in the order of the blocks, of which none lies in two groups of `group` rows.
pub(crate) fn written<E: Real, R: Send, const D: usize>(
    shape: [usize; D],
    group: usize,
    write: impl Fn(Range<usize>, &mut Part<'_, E>) -> R + Send + Sync,
) -> (Tensor<D>, Vec<R>) {
    let (values, results) = fresh::written(blocks_of(shape, group), write);
    (Owned::from_vec(values, &shape).into_tensor(), results)
}

/// [`written`], while another tensor of that shape is changed, rows by rows.
pub(crate) fn written_beside<E: Real, const D: usize>(
    shape: [usize; D],
    beside: &mut [E],
    write: impl Fn(Range<usize>, &mut Part<'_, E>, &mut [E]) + Send + Sync,
) -> Tensor<D> {
    let blocks = blocks_of(shape, WHOLE);
    let beside = split(beside, blocks.iter().map(|(elements, _)| *elements));
    let blocks = blocks.iter().zip(beside);
    let blocks = blocks.map(|((elements, rows), beside)| (*elements, (rows.clone(), beside)));
    let (values, _) = fresh::written(blocks.collect(), |(rows, beside), part| {
        write(rows, part, beside);
    });
    Owned::from_vec(values, &shape).into_tensor()
}

/// `x`, changed in blocks of consecutive rows, each with the index of its first: in its own storage if nobody else holds
/// that, else in a copy that is made block by block, and changed while it is in the cache. What `change` returns comes
/// beside, in the order of the blocks, of which none lies in two groups of `group` rows.
pub(crate) fn changed<E: Real, R: Send, const D: usize>(
    x: Tensor<D>,
    group: usize,
    change: impl Fn(usize, &mut [E]) -> R + Send + Sync,
) -> (Tensor<D>, Vec<R>) {
    let (shape, x) = (x.dims(), primitive(x));
    if !Owned::<E>::is_alone(&x) {
        let (values, results) = written_from(x, shape, group, change);
        return (Owned::from_vec(values, &shape).into_tensor(), results);
    }
    let mut own = Owned::alone(x);
    let blocks = blocks_of(shape, group);
    let values = split(own.values(), blocks.iter().map(|(elements, _)| *elements));
    let blocks = blocks.iter().map(|(_, rows)| rows.start).zip(values);
    let results = each(blocks.collect(), |(first, block)| change(first, block));
    (own.into_tensor(), results)
}

/// A copy of `x`, which has this shape, of which each block is changed once it is there.
fn written_from<E: Real, R: Send, const D: usize>(
    x: FlexTensor,
    shape: [usize; D],
    group: usize,
    change: impl Fn(usize, &mut [E]) -> R + Send + Sync,
) -> (Vec<E>, Vec<R>) {
    let x = Rows::<E>::of_primitive(x, shape);
    fresh::written(blocks_of(shape, group), |rows, part| {
        let first = rows.start;
        for row in rows {
            part.extend_from_slice(x.row(row));
        }
        change(first, part.values())
    })
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

/// The sums of what [`written`] and [`changed`] return of the blocks, for each of the groups.
pub(crate) fn of_groups<E: Real>(sums: Vec<Vec<E>>, groups: usize, width: usize) -> Vec<Vec<E>> {
    let blocks = sums.len() / groups.max(1);
    let mut sums = sums.into_iter();
    let of_group = |_| add_up(sums.by_ref().take(blocks), width);
    (0..groups).map(of_group).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_else_holds_is_changed_where_it_is_and_else_a_copy() {
        let x = Tensor::<2>::from_data([[1.0f32, 2.0], [3.0, 4.0]], &Device::flex());
        let place = |x: &Tensor<2>| Rows::<f32>::of(x.clone()).row(0).as_ptr();
        let double = |_: usize, block: &mut [f32]| block.iter_mut().for_each(|x| *x *= 2.0);
        let before = place(&x);
        let (x, _) = changed(x, WHOLE, double);
        assert_eq!(place(&x), before);
        let (y, _) = changed(x.clone().transpose(), WHOLE, double);
        assert_eq!(Rows::<f32>::of(y).row(1), [8.0, 16.0]);
        assert_eq!(Rows::<f32>::of(x).row(0), [2.0, 4.0]);
    }

    #[test]
    fn sums_of_blocks_are_added_up_for_each_group() {
        let sums = vec![vec![1.0], vec![2.0], vec![3.0], vec![4.0]];
        assert_eq!(of_groups(sums, 2, 1), [[3.0], [7.0]]);
        assert_eq!(of_groups::<f32>(vec![], 2, 1), [[0.0], [0.0]]);
        assert!(of_groups::<f32>(vec![], 0, 1).is_empty());
    }
}
