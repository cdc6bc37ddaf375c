//! Boxes of a tensor on Flex, laid end to end for a message or where they belong in a block.

use std::ops::Range;

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
            // A single box may be a view as yet.
            let packed = Tensor::<1>::cat(flat.collect(), 0);
            Tensor::from_primitive::<Flex>(on_flex(&packed).to_contiguous())
        }
    }
}

/// Walks through boxes of an f32 or f64 tensor that land in a block of `shape`: tells of each run its bytes, and which
/// they are of the block's.
pub(super) fn each_run(
    tensor: &Tensor<DIMS>,
    boxes: &[Transfer],
    shape: [usize; DIMS],
    tell: impl FnMut(&[u8], Range<usize>),
) {
    match tensor.dtype() {
        DType::F32 => each_run_as::<f32>(tensor, boxes, shape, tell),
        DType::F64 => each_run_as::<f64>(tensor, boxes, shape, tell),
        dtype => unreachable!("a tensor of {dtype:?} is not laid in place"),
    }
}

fn pack_as<E: Real + Element>(tensor: &Tensor<DIMS>, boxes: &[Transfer]) -> Tensor<1> {
    let device = tensor.device();
    let count = boxes.iter().map(|b| b.source.elements()).sum();
    let mut packed = Vec::with_capacity(count);
    let tensor = on_flex(tensor);
    for Transfer { source, .. } in boxes {
        let whole = Region {
            start: [0; DIMS],
            extent: source.extent,
        };
        let term = Term::<E>::new(&tensor, source.start);
        tiles::each_run_of(term, whole, source.extent, |run, _| {
            packed.extend_from_slice(run);
        });
    }
    Tensor::from_data(TensorData::new(packed, [count]), (&device, E::dtype()))
}

fn each_run_as<E: Real + bytemuck::Pod>(
    tensor: &Tensor<DIMS>,
    boxes: &[Transfer],
    shape: [usize; DIMS],
    mut tell: impl FnMut(&[u8], Range<usize>),
) {
    let (tensor, width) = (on_flex(tensor), size_of::<E>());
    for Transfer { source, target } in boxes {
        let term = Term::<E>::new(&tensor, source.start);
        tiles::each_run_of(term, *target, shape, |run, place| {
            let place = place.start * width..place.end * width;
            tell(bytemuck::cast_slice(run), place);
        });
    }
}

fn on_flex<const D: usize>(tensor: &Tensor<D>) -> FlexTensor {
    match tensor.clone().try_into_primitive::<Flex>() {
        Ok(tensor) => tensor,
        Err(_) => unreachable!("only tensors on Flex are packed or laid in place"),
    }
}
