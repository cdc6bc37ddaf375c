//! Reshaping that takes empty blocks.
//!
//! In Burn's reshape a 0 stands for the dim that was there, so a shape with an empty dim cannot be named. A
//! rank with an empty block must all the same build the graph that the others build.

use std::convert::Infallible;

use burn::tensor::Tensor;

use crate::vjp;

/// `x` in another shape, whose lengths may be 0.
///
/// # Gradient
/// The gradient in the shape of `x`.
///
/// # Panics
/// If the shapes have different numbers of elements.
pub fn reshape<const A: usize, const B: usize>(x: Tensor<A>, shape: [usize; B]) -> Tensor<B> {
    let dims = x.dims();
    if !shape.contains(&0) {
        return x.reshape(shape);
    }
    assert!(
        dims.contains(&0),
        "a tensor of shape {dims:?} cannot be seen as {shape:?}"
    );
    let zeros = |of: [usize; B], x: &Tensor<A>| {
        Tensor::<B>::zeros(of, (&x.device().without_autodiff(), x.dtype()))
    };
    let y = zeros(shape, &x);
    vjp::attach1(x, y, move |gradient: Tensor<B>| {
        let (device, dtype) = (gradient.device(), gradient.dtype());
        Ok::<_, Infallible>(Tensor::zeros(dims, (&device, dtype)))
    })
}

#[cfg(test)]
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
    #[should_panic(expected = "cannot be seen as")]
    fn a_tensor_with_elements_has_no_empty_shape() {
        let _ = reshape(Tensor::<1>::zeros([2], &Device::flex()), [0, 2]);
    }
}
