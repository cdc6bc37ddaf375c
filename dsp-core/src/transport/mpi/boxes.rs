//! Boxes of a tensor on Flex, laid end to end for a message or where they belong in a block.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, Element, Tensor, TensorData};

use crate::blocks::{DIMS, Transfer};

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

fn pack_as<E>(tensor: &Tensor<DIMS>, boxes: &[Transfer]) -> Tensor<1>
where
    E: Element + bytemuck::Pod + Default,
{
    let device = tensor.device();
    let count = boxes.iter().map(|b| b.source.elements()).sum();
    let mut packed = vec![E::default(); count];
    let Ok(tensor) = tensor.clone().try_into_primitive::<Flex>() else {
        unreachable!("only tensors on Flex are packed");
    };
    let mut rest = &mut packed[..];
    for transfer in boxes {
        let mut transfer = *transfer;
        transfer.target.start = [0; DIMS];
        let extent = transfer.target.extent;
        let (part, after) = rest.split_at_mut(transfer.target.elements());
        place(part, extent, &tensor, &transfer);
        rest = after;
    }
    Tensor::from_data(TensorData::new(packed, [count]), (&device, E::dtype()))
}

fn lay_as<E>(tensor: &Tensor<DIMS>, boxes: &[Transfer], shape: [usize; DIMS], block: &mut [E])
where
    E: Element + bytemuck::Pod,
{
    let Ok(tensor) = tensor.clone().try_into_primitive::<Flex>() else {
        unreachable!("only tensors on Flex are laid in place");
    };
    for transfer in boxes {
        place(block, shape, &tensor, transfer);
    }
}

/// Lays one box into the block, in the longest runs that lie end to end in both.
fn place<E>(block: &mut [E], shape: [usize; DIMS], tensor: &FlexTensor, transfer: &Transfer)
where
    E: Element + bytemuck::Pod,
{
    let layout = tensor.layout();
    let strides = layout.strides();
    let storage = tensor.storage::<E>();
    let (from, to) = (&transfer.source, &transfer.target);
    let target_strides = row_major(shape);
    // The dims from `inner` on are one run: contiguous in the source and whole in the target.
    let mut inner = DIMS;
    let mut run = 1;
    while inner > 0 {
        let dim = inner - 1;
        let is_next =
            from.extent[dim] == 1 || (strides[dim] == run as isize && target_strides[dim] == run);
        if !is_next {
            break;
        }
        run *= from.extent[dim];
        inner = dim;
    }
    let outer: usize = from.extent[..inner].iter().product();
    let mut index = [0; DIMS];
    for _ in 0..outer {
        let mut source = layout.start_offset();
        let mut target = 0;
        for dim in 0..DIMS {
            let steps = (from.start[dim] + index[dim]) as isize * strides[dim];
            source = source.wrapping_add_signed(steps);
            target += (to.start[dim] + index[dim]) * target_strides[dim];
        }
        let values = &storage[source..source + run];
        block[target..target + run].copy_from_slice(values);
        // The next index of the outer dims, the last varying fastest.
        for dim in (0..inner).rev() {
            index[dim] += 1;
            if index[dim] < from.extent[dim] {
                break;
            }
            index[dim] = 0;
        }
    }
}

fn row_major(shape: [usize; DIMS]) -> [usize; DIMS] {
    let mut strides = [1; DIMS];
    for dim in (0..DIMS - 1).rev() {
        strides[dim] = strides[dim + 1] * shape[dim + 1];
    }
    strides
}
