//! Linear layers on blocks that may be empty.
//!
//! Burn's own product of a batch and a matrix reads past the end of an empty batch on the CPU (0.22.1), and a
//! rank may hold an empty block. Here all positions are rows of one matrix, and where there are none, none is
//! multiplied: the rank builds the graph that the others build.

use std::convert::Infallible;

use burn::module::Param;
use burn::nn::Linear;
use burn::tensor::Tensor;

use crate::matmul::{matmul, matmul_and_row};
use crate::shape::reshape;
use crate::vjp::attach3;

/// `x·W + b`.
///
/// # Shapes
/// - `x`: `[…, in]`; returns `[…, out]`
pub fn project<const D: usize>(x: Tensor<D>, layer: &Linear) -> Tensor<D> {
    affine(x, layer.weight.val(), layer.bias.as_ref().map(Param::val))
}

/// `x·W + b` for a weight and a bias.
///
/// # Shapes
/// - `x`: `[…, in]`, any of whose dims may be 0; `weight`: `[in, out]`, of which either may be 0 where a rank holds
///   no part of it; `bias`: `[out]`
/// - returns: `[…, out]`
///
/// # Gradient
/// `dx = g·Wᵀ`, `dW = xᵀ·g` and `db` the sum of `g`, over all positions; zeros where there are none.
pub fn affine<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
) -> Tensor<D> {
    let x_dims = x.dims();
    let (device, dtype) = (x.device(), x.dtype());
    let (inner_x, inner_w) = (x.clone().inner(), weight.clone().inner());
    let (x_tracked, weight_tracked) = (x.is_tracked(), weight.is_tracked());

    let inner_bias = bias.as_ref().map(|bias| bias.clone().inner());
    let y = times_and_bias(inner_x.clone(), inner_w.clone(), inner_bias);
    let has_bias = bias.is_some();
    let bias = match bias {
        Some(bias) => leading_ones(bias),
        None => Tensor::zeros([1; D], (&device, dtype)),
    };
    let bias_dims = bias.dims();
    let weight: Tensor<D> = leading_ones(weight);
    let unsqueezed = weight.dims();
    attach3([x, weight, bias], y, move |gradient: Tensor<D>| {
        let options = (&gradient.device(), dtype);
        let dx = match x_tracked {
            true => times(gradient.clone(), inner_w.clone().transpose()),
            false => Tensor::zeros(x_dims, options),
        };
        let db = match has_bias {
            true => leading_ones(sum_of_rows(gradient.clone())),
            false => Tensor::zeros(bias_dims, options),
        };
        let dw = match weight_tracked {
            true => leading_ones(weight_gradient(inner_x.clone(), gradient)),
            false => Tensor::zeros(unsqueezed, options),
        };
        Ok::<_, Infallible>([dx, dw, db])
    })
}

/// `x·M` over the last dim, of untracked tensors.
///
/// # Shapes
/// - `x`: `[…, in]`, any of whose dims may be 0; `matrix`: `[in, out]`
/// - returns: `[…, out]`
///
/// # Panics
/// If the widths differ.
pub fn times<const D: usize>(x: Tensor<D>, matrix: Tensor<2>) -> Tensor<D> {
    times_and_bias(x, matrix, None)
}

/// As [`times`], and plus `bias`, `[out]`, at every position.
///
/// # Panics
/// If the widths differ.
pub(crate) fn times_and_bias<const D: usize>(
    x: Tensor<D>,
    matrix: Tensor<2>,
    bias: Option<Tensor<1>>,
) -> Tensor<D> {
    let mut dims = x.dims();
    let (rows, [inputs, outputs]) = (rows_of(&dims), matrix.dims());
    let given = dims[D - 1];
    assert!(
        given == inputs,
        "a linear layer of {inputs} input features was given {given}"
    );
    dims[D - 1] = outputs;
    if rows * inputs * outputs == 0 {
        let zeros = Tensor::zeros(dims, (&x.device(), x.dtype()));
        return match bias {
            Some(bias) => zeros + leading_ones(bias),
            None => zeros,
        };
    }
    let x = reshape(x, [rows, inputs]);
    let y = match bias {
        Some(bias) => matmul_and_row(x, matrix, bias),
        None => matmul(x, matrix),
    };
    reshape(y, dims)
}

/// `dW = xᵀ·g` of `y = x·W`, over all positions of untracked tensors; zeros where there are none.
///
/// # Shapes
/// - `x`: `[…, in]`; `gradient`: `[…, out]`
/// - returns: `[in, out]`
pub(crate) fn weight_gradient<const D: usize>(x: Tensor<D>, gradient: Tensor<D>) -> Tensor<2> {
    let rows = rows_of(&x.dims());
    let (inputs, outputs) = (x.dims()[D - 1], gradient.dims()[D - 1]);
    if rows * inputs * outputs == 0 {
        return Tensor::zeros([inputs, outputs], (&x.device(), x.dtype()));
    }
    let x: Tensor<2> = reshape(x, [rows, inputs]);
    matmul(x.transpose(), reshape(gradient, [rows, outputs]))
}

/// The sum over all positions of an untracked tensor; zeros where there are none.
///
/// # Shapes
/// - `x`: `[…, C]`; returns `[C]`
pub(crate) fn sum_of_rows<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    let (rows, width) = (rows_of(&x.dims()), x.dims()[D - 1]);
    if rows * width == 0 {
        return Tensor::zeros([width], (&x.device(), x.dtype()));
    }
    let x: Tensor<2> = reshape(x, [rows, width]);
    reshape(x.sum_dim(0), [width])
}

/// The tensor with dims of 1 before its own. (Burn's own takes an empty dim for one that it shall keep.)
pub(crate) fn leading_ones<const FROM: usize, const TO: usize>(x: Tensor<FROM>) -> Tensor<TO> {
    let mut dims = [1; TO];
    dims[TO - FROM..].copy_from_slice(&x.dims());
    reshape(x, dims)
}

fn rows_of(dims: &[usize]) -> usize {
    dims.iter().rev().skip(1).product()
}

#[cfg(test)]
#[cfg(feature = "flex")]
mod tests {
    use burn::tensor::{DType, Device, TensorData};

    use super::*;

    fn drawn<const D: usize>(shape: [usize; D], number: u64, device: &Device) -> Tensor<D> {
        let count: usize = shape.iter().product();
        let values: Vec<f64> = (0..count)
            .map(|i| (1.7 * i as f64 + number as f64).sin())
            .collect();
        Tensor::from_data(TensorData::new(values, shape), (device, DType::F64))
    }

    fn close<const D: usize>(found: &Tensor<D>, expected: &Tensor<D>) {
        assert_eq!(found.dims(), expected.dims());
        let (found, expected) = (found.to_data(), expected.to_data());
        for (found, expected) in found.iter::<f64>().zip(expected.iter::<f64>()) {
            assert!(
                (found - expected).abs() < 1e-12,
                "{found} instead of {expected}"
            );
        }
    }

    #[test]
    fn the_product_and_its_gradients_are_burns() {
        let device = Device::flex().autodiff();
        let x = drawn([2, 3, 4], 0, &device).require_grad();
        let weight = drawn([4, 5], 1, &device).require_grad();
        let bias = drawn([5], 2, &device).require_grad();
        let cotangent = drawn([2, 3, 5], 3, &device);
        for with_bias in [true, false] {
            let given = || with_bias.then(|| bias.clone());
            let ours = affine(x.clone(), weight.clone(), given());
            let burns = burn::tensor::module::linear(x.clone(), weight.clone(), given());
            close(&ours.clone().inner(), &burns.clone().inner());
            let [ours, burns] = [ours, burns].map(|y| (y * cotangent.clone()).sum().backward());
            close(&x.grad(&ours).unwrap(), &x.grad(&burns).unwrap());
            close(&weight.grad(&ours).unwrap(), &weight.grad(&burns).unwrap());
            if with_bias {
                close(&bias.grad(&ours).unwrap(), &bias.grad(&burns).unwrap());
            }
        }
    }

    #[test]
    fn a_block_without_a_position_has_an_output_without_one_and_gradients_of_0() {
        let device = Device::flex().autodiff();
        let x = drawn([2, 0, 3, 1, 4], 0, &device).require_grad();
        let weight = drawn([4, 5], 1, &device).require_grad();
        let bias = drawn([5], 2, &device).require_grad();
        let y = affine(x.clone(), weight.clone(), Some(bias.clone()));
        assert_eq!(y.dims(), [2, 0, 3, 1, 5]);
        let gradients = y.sum().backward();
        assert_eq!(x.grad(&gradients).unwrap().dims(), x.dims());
        close(
            &weight.grad(&gradients).unwrap(),
            &weight.inner().zeros_like(),
        );
        close(&bias.grad(&gradients).unwrap(), &bias.inner().zeros_like());
    }

    #[test]
    fn a_layer_without_features_gives_its_bias_and_gradients_of_0() {
        let device = Device::flex().autodiff();
        for [inputs, outputs] in [[0, 5], [4, 0]] {
            let x = drawn([2, 3, inputs], 0, &device).require_grad();
            let weight = drawn([inputs, outputs], 1, &device).require_grad();
            let bias = drawn([outputs], 2, &device).require_grad();
            let y = affine(x.clone(), weight.clone(), Some(bias.clone()));
            let zeros = Tensor::zeros([2, 3, outputs], (&Device::flex(), DType::F64));
            close(
                &y.clone().inner(),
                &(zeros + reshape(bias.clone().inner(), [1, 1, outputs])),
            );
            let gradients = y.sum().backward();
            assert_eq!(weight.grad(&gradients).unwrap().dims(), [inputs, outputs]);
            close(
                &x.grad(&gradients).unwrap(),
                &x.clone().inner().zeros_like(),
            );
            let six = Tensor::full([outputs], 6.0, (&Device::flex(), DType::F64));
            close(&bias.grad(&gradients).unwrap(), &six);
        }
    }
}
