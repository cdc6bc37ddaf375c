//! Reshaping that takes empty blocks, and copies only what it must.
//!
//! In a plain array that is passed to Burn's reshape a 0 stands for the dim that was there, so a shape with an
//! empty dim cannot be named. A rank with an empty block must all the same build the graph that the others do.
//!
//! Burn's Flex copies whatever is not contiguous. But dims of a slice or of permuted dims can often be joined or taken
//! apart where they are: heads of a part of a projection's channels, the batch of one sample and another axis.

use burn::tensor::{ReshapeArgs, Shape, Tensor};

/// `x` in another shape, whose lengths may be 0.
///
/// # Gradient
/// The gradient in the shape of `x`.
///
/// # Panics
/// If the shapes have different numbers of elements.
pub fn reshape<const A: usize, const B: usize>(x: Tensor<A>, shape: [usize; B]) -> Tensor<B> {
    #[cfg(feature = "flex")]
    if let Some(view) = flex::view(&x, shape) {
        return view;
    }
    x.reshape(Exactly(shape))
}

#[cfg(feature = "flex")]
mod flex {
    use burn::backend::Flex;
    use burn::backend::flex::Layout;
    use burn::tensor::{Device, Shape, Tensor};

    /// The same elements in another shape, where they are; `None` if they must be copied, or Burn sees to it.
    pub(super) fn view<const A: usize, const B: usize>(
        x: &Tensor<A>,
        shape: [usize; B],
    ) -> Option<Tensor<B>> {
        // A tensor in a graph is reshaped by an operation of the graph.
        if *x.device().as_dispatch() != *Device::flex().as_dispatch() {
            return None;
        }
        let dims = x.dims();
        let Ok(primitive) = x.clone().try_into_primitive::<Flex>() else {
            return None;
        };
        let layout = primitive.layout();
        if layout.is_contiguous() || x.shape().num_elements() != shape.iter().product::<usize>() {
            return None;
        }
        let strides = strides(&dims, layout.strides(), &shape)?;
        let start = layout.start_offset();
        let layout = Layout::new(Shape::from(shape.to_vec()), strides, start);
        Some(Tensor::from_primitive::<Flex>(
            primitive.with_layout(layout),
        ))
    }

    /// The strides of `shape` over elements that lie as `dims` and `strides` say, if there are any.
    ///
    /// Dims of both shapes fall into groups of equal numbers of elements; the old dims of a group must lie end to end.
    pub(super) fn strides(
        dims: &[usize],
        strides: &[isize],
        shape: &[usize],
    ) -> Option<Vec<isize>> {
        if dims.contains(&0) {
            return None;
        }
        let old: Vec<(usize, isize)> = (dims.iter().copied().zip(strides.iter().copied()))
            .filter(|&(length, _)| length != 1)
            .collect();
        let mut old = old.into_iter().peekable();
        let mut found = vec![1; shape.len()];
        let mut next = 0;
        while let Some((mut elements, mut innermost)) = old.next() {
            let first = next;
            let mut named = 1;
            while named != elements {
                if named < elements {
                    named *= shape.get(next)?;
                    next += 1;
                } else {
                    let (length, stride) = old.next()?;
                    if innermost != stride * length as isize {
                        return None;
                    }
                    elements *= length;
                    innermost = stride;
                }
            }
            let mut stride = innermost;
            for dim in (first..next).rev() {
                found[dim] = stride;
                stride *= shape[dim] as isize;
            }
        }
        Some(found)
    }
}

/// A shape that means what it says.
#[derive(Debug)]
struct Exactly<const D: usize>([usize; D]);

impl<const D: usize> ReshapeArgs<D> for Exactly<D> {
    fn into_shape<const S: usize>(self, source: Shape) -> Shape {
        let shape = Shape::from(self.0);
        assert_eq!(
            shape.num_elements(),
            source.num_elements(),
            "a reshape from {source} to {shape} keeps the number of elements"
        );
        shape
    }
}

#[cfg(test)]
#[cfg(feature = "flex")]
mod tests {
    use burn::backend::Flex;
    use burn::tensor::{Device, Int, Tensor};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_empty_tensor_takes_any_empty_shape_and_keeps_its_graph() {
        let device = Device::flex().autodiff();
        let x = Tensor::<3>::zeros([2, 0, 3], &device).require_grad();
        let y: Tensor<2> = reshape(x.clone(), [5, 0]);
        assert_eq!(y.dims(), [5, 0]);
        assert!(y.is_tracked());
        let gradients = y.sum().backward();
        assert_eq!(x.grad(&gradients).unwrap().dims(), [2, 0, 3]);
    }

    proptest! {
        /// Shapes that have the same elements, of a tensor whose dims are permuted and of which a part is taken.
        #[test]
        fn a_view_has_the_elements_of_a_copy(
            [a, b, c, d] in prop::array::uniform4(1usize..4),
            order in Just([0isize, 1, 2, 3]).prop_shuffle(),
            dim in 0usize..4,
        ) {
            let whole = Tensor::<1, Int>::arange(0..(a * b * c * d) as i64, &Device::flex()).float();
            let x = whole.reshape([a, b, c, d]).permute(order);
            let x = x.clone().narrow(dim, x.dims()[dim] / 2, x.dims()[dim].div_ceil(2));
            let [a, b, c, d] = x.dims();
            let copy = Tensor::<4>::from_data(x.to_data(), &Device::flex());
            for shape in [[a * b, c, 1, d], [a, b * c, d, 1], [1, a, b, c * d], [a * b, c * d, 1, 1], [d, c, b, a]] {
                let (view, expected) = (reshape(x.clone(), shape), copy.clone().reshape(shape));
                view.into_data().assert_eq(&expected.into_data(), true);
            }
        }
    }

    #[test]
    fn heads_of_a_slice_of_channels_and_a_batch_of_one_are_seen_where_they_are() {
        let x = Tensor::<5>::zeros([1, 4, 3, 1, 30], &Device::flex());
        let query = x.narrow(4, 10, 10).permute([0, 2, 1, 3, 4]);
        let held = |x: Tensor<5>| x.try_into_primitive::<Flex>().unwrap().bytes().as_ptr();
        let folded: Tensor<5> = reshape(query.clone(), [3, 4, 1, 2, 5]);
        assert_eq!(held(folded), held(query));
    }

    #[test]
    #[should_panic(expected = "keeps the number of elements")]
    fn a_tensor_with_elements_has_no_empty_shape() {
        let _ = reshape(Tensor::<1>::zeros([2], &Device::flex()), [0, 2]);
    }
}
