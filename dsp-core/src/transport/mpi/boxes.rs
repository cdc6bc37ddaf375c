//! Boxes of a tensor on Flex, laid end to end for a message or where they belong in a block.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, Element, Tensor, TensorData};

use crate::blocks::{DIMS, Region, Transfer};
use crate::fused::real::Real;
use crate::transport::tiles::{self, Term};

/// Boxes of a tensor end to end, each row-major, as messages carry them.
pub(super) fn pack(tensor: &Tensor<DIMS>, boxes: &[Transfer]) -> Tensor<1> {
    match tensor.dtype() {
        DType::F32 => pack_as::<f32>(tensor, boxes),
        DType::F64 => pack_as::<f64>(tensor, boxes),
        _ => {
            let flat = boxes.iter().map(|transfer| {
                let values = tensor.clone().slice(transfer.source.ranges());
                crate::shape::reshape(values, [transfer.source.elements()])
            });
            Tensor::cat(flat.collect(), 0)
        }
    }
}

/// Lays boxes of an f32 or f64 tensor into a block of `shape`, given as bytes, in which nothing is there yet.
pub(super) fn lay(
    tensor: &Tensor<DIMS>,
    boxes: &[Transfer],
    shape: [usize; DIMS],
    block: &mut [u8],
) {
    match tensor.dtype() {
        DType::F32 => lay_as::<f32>(tensor, boxes, shape, bytemuck::cast_slice_mut(block)),
        DType::F64 => lay_as::<f64>(tensor, boxes, shape, bytemuck::cast_slice_mut(block)),
        dtype => unreachable!("a tensor of {dtype:?} is not laid in place"),
    }
}

fn pack_as<E: Real + Element>(tensor: &Tensor<DIMS>, boxes: &[Transfer]) -> Tensor<1> {
    let device = tensor.device();
    let count = boxes.iter().map(|b| b.source.elements()).sum();
    let mut packed = vec![E::ZERO; count];
    let tensor = on_flex(tensor);
    let mut rest = &mut packed[..];
    for Transfer { source, .. } in boxes {
        let (part, after) = rest.split_at_mut(source.elements());
        let whole = Region {
            start: [0; DIMS],
            extent: source.extent,
        };
        tiles::place(Term::new(&tensor, source.start), whole, source.extent, part);
        rest = after;
    }
    Tensor::from_data(TensorData::new(packed, [count]), (&device, E::dtype()))
}

fn lay_as<E: Real>(
    tensor: &Tensor<DIMS>,
    boxes: &[Transfer],
    shape: [usize; DIMS],
    block: &mut [E],
) {
    let tensor = on_flex(tensor);
    for Transfer { source, target } in boxes {
        tiles::place(Term::new(&tensor, source.start), *target, shape, block);
    }
}

fn on_flex(tensor: &Tensor<DIMS>) -> FlexTensor {
    match tensor.clone().try_into_primitive::<Flex>() {
        Ok(tensor) => tensor,
        Err(_) => unreachable!("only tensors on Flex are packed or laid in place"),
    }
}
