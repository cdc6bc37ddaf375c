//! Reshaping that takes empty blocks.
//!
//! In a plain array that is passed to Burn's reshape a 0 stands for the dim that was there, so a shape with an
//! empty dim cannot be named. A rank with an empty block must all the same build the graph that the others do.

use burn::tensor::{ReshapeArgs, Shape, Tensor};

/// `x` in another shape, whose lengths may be 0.
///
/// # Gradient
/// The gradient in the shape of `x`.
///
/// # Panics
/// If the shapes have different numbers of elements.
pub fn reshape<const A: usize, const B: usize>(x: Tensor<A>, shape: [usize; B]) -> Tensor<B> {
    x.reshape(Exactly(shape))
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
    use burn::tensor::Device;

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

    #[test]
    #[should_panic(expected = "keeps the number of elements")]
    fn a_tensor_with_elements_has_no_empty_shape() {
        let _ = reshape(Tensor::<1>::zeros([2], &Device::flex()), [0, 2]);
    }
}
