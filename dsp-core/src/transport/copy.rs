//! Lays boxes of the peers' tensors into this rank's block: the one copy of the local transport.
//!
//! On Flex the boxes are read through the peers' strides and written in the block's final order, in one pass.
//! Other backends go through Burn's own slices.

use burn::tensor::{DType, Tensor};

use crate::blocks::{DIMS, Transfer};

/// A peer's tensor and the boxes of it that land here.
pub(super) struct Source {
    pub(super) tensor: Tensor<DIMS>,
    pub(super) transfers: Vec<Transfer>,
}

/// The block of `shape` that the boxes of all sources add up to, in the order of `sources`.
///
/// Elements that no source touches are 0. `sources` must not be empty: the dtype and device are theirs.
pub(super) fn assemble(shape: [usize; DIMS], sources: Vec<Source>) -> Tensor<DIMS> {
    if let Some(tensor) = handed_over(shape, &sources) {
        return tensor;
    }
    #[cfg(feature = "flex")]
    {
        let tensor = &sources[0].tensor;
        if *tensor.device().as_dispatch() == *burn::tensor::Device::flex().as_dispatch() {
            match tensor.dtype() {
                DType::F32 => return flex::assemble::<f32>(shape, sources),
                DType::F64 => return flex::assemble::<f64>(shape, sources),
                _ => {}
            }
        }
    }
    portable(shape, sources)
}

/// The one source's tensor itself, where the whole of it is the whole block: nothing is copied then.
fn handed_over(shape: [usize; DIMS], sources: &[Source]) -> Option<Tensor<DIMS>> {
    let mut busy = sources.iter().filter(|source| !source.transfers.is_empty());
    let (source, None) = (busy.next()?, busy.next()) else {
        return None;
    };
    let [transfer] = source.transfers[..] else {
        return None;
    };
    (transfer.source.extent == shape && source.tensor.dims() == shape)
        .then(|| source.tensor.clone())
}

/// Boxes of a tensor end to end, each row-major, as messages carry them.
#[cfg(feature = "mpi")]
pub(super) fn pack(tensor: &Tensor<DIMS>, boxes: &[Transfer]) -> Tensor<1> {
    match tensor.dtype() {
        DType::F32 => flex::pack::<f32>(tensor, boxes),
        DType::F64 => flex::pack::<f64>(tensor, boxes),
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
#[cfg(feature = "mpi")]
pub(super) fn lay(
    tensor: &Tensor<DIMS>,
    boxes: &[Transfer],
    shape: [usize; DIMS],
    block: &mut [u8],
) {
    match tensor.dtype() {
        DType::F32 => flex::lay::<f32>(tensor, boxes, shape, bytemuck::cast_slice_mut(block)),
        DType::F64 => flex::lay::<f64>(tensor, boxes, shape, bytemuck::cast_slice_mut(block)),
        dtype => unreachable!("a tensor of {dtype:?} is not laid in place"),
    }
}

fn portable(shape: [usize; DIMS], sources: Vec<Source>) -> Tensor<DIMS> {
    let first = &sources[0].tensor;
    let dtype: DType = first.dtype();
    let mut block = Tensor::<DIMS>::zeros(shape, (&first.device(), dtype));
    for source in sources {
        for transfer in source.transfers {
            let arriving = source.tensor.clone().slice(transfer.source.ranges());
            let target = transfer.target.ranges();
            let sum = block.clone().slice(target.clone()) + arriving;
            block = block.slice_assign(target, sum);
        }
    }
    block
}

#[cfg(feature = "flex")]
mod flex {
    use std::ops::Add;

    use burn::backend::Flex;
    use burn::backend::flex::FlexTensor;
    use burn::tensor::{Element, Tensor, TensorData};

    use super::Source;
    use crate::blocks::{DIMS, Transfer};

    pub(super) fn assemble<E>(shape: [usize; DIMS], sources: Vec<Source>) -> Tensor<DIMS>
    where
        E: Element + bytemuck::Pod + Default + Add<Output = E>,
    {
        let device = sources[0].tensor.device();
        let mut block = vec![E::default(); shape.iter().product()];
        let mut written = Written::default();
        for source in sources {
            let Ok(tensor) = source.tensor.try_into_primitive::<Flex>() else {
                unreachable!("the tensors of a group on Flex are on Flex");
            };
            for transfer in &source.transfers {
                if written.overlaps(transfer) {
                    place(&mut block, shape, &tensor, transfer, |old, new| {
                        *old = *old + new
                    });
                } else {
                    place(&mut block, shape, &tensor, transfer, |old, new| *old = new);
                }
                written.add(transfer);
            }
        }
        let dtype = E::dtype();
        Tensor::from_data(TensorData::new(block, shape), (&device, dtype))
    }

    #[cfg(feature = "mpi")]
    pub(super) fn pack<E>(tensor: &Tensor<DIMS>, boxes: &[Transfer]) -> Tensor<1>
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
            place(part, extent, &tensor, &transfer, |old, new| *old = new);
            rest = after;
        }
        Tensor::from_data(TensorData::new(packed, [count]), (&device, E::dtype()))
    }

    #[cfg(feature = "mpi")]
    pub(super) fn lay<E>(
        tensor: &Tensor<DIMS>,
        boxes: &[Transfer],
        shape: [usize; DIMS],
        block: &mut [E],
    ) where
        E: Element + bytemuck::Pod,
    {
        let Ok(tensor) = tensor.clone().try_into_primitive::<Flex>() else {
            unreachable!("only tensors on Flex are laid in place");
        };
        for transfer in boxes {
            place(block, shape, &tensor, transfer, |old, new| *old = new);
        }
    }

    /// The boxes written so far: a box that meets none of them is copied, one that does is added.
    ///
    /// Boxes of one exchange either tile the block or coincide in runs, so a partial overlap, though rare,
    /// may only be answered by adding: the block starts at 0, which makes that right too.
    #[derive(Default)]
    struct Written(Vec<Transfer>);

    impl Written {
        fn overlaps(&self, other: &Transfer) -> bool {
            let target = &other.target;
            self.0.iter().any(|earlier| earlier.target.overlaps(target))
        }

        fn add(&mut self, transfer: &Transfer) {
            self.0.push(*transfer);
        }
    }

    /// Lays one box into the block, in the longest runs that lie end to end in both.
    fn place<E>(
        block: &mut [E],
        shape: [usize; DIMS],
        tensor: &FlexTensor,
        transfer: &Transfer,
        combine: impl Fn(&mut E, E),
    ) where
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
            let is_next = from.extent[dim] == 1
                || (strides[dim] == run as isize && target_strides[dim] == run);
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
            for (slot, &value) in block[target..target + run].iter_mut().zip(values) {
                combine(slot, value);
            }
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
}

#[cfg(test)]
#[cfg(feature = "flex")]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::blocks::{Blocks, DimBlocks};
    use crate::partition::Partition;

    /// The way of other backends, which the tests of the collectives do not take on Flex.
    #[test]
    fn the_portable_way_lays_out_what_the_fast_one_does_also_where_it_must_add() {
        let shape = [2, 5, 1, 4, 3];
        let whole = Blocks::replicated(shape, 3);
        let rows = whole
            .clone()
            .with_dim(1, DimBlocks::split(&Partition::zigzag(5, 3)));
        let columns = whole
            .clone()
            .with_dim(3, DimBlocks::split(&Partition::balanced(4, 3)));
        for (before, after) in [(&rows, &columns), (&rows, &whole), (&whole, &columns)] {
            for rank in 0..3 {
                let sources = || -> Vec<Source> {
                    let source = |peer: usize| {
                        let [b, t, s, u, c] = before.local_shape(peer);
                        let count = b * t * s * u * c;
                        let values: Vec<f32> =
                            (0..count).map(|i| (100 * peer + i) as f32).collect();
                        // Strided, as a tensor that was permuted before it is sent.
                        let data = TensorData::new(values, [c, b, t, s, u]);
                        Source {
                            tensor: Tensor::<DIMS>::from_data(data, &Device::flex())
                                .permute([1, 2, 3, 4, 0]),
                            transfers: before.transfers(after, peer, rank),
                        }
                    };
                    (0..3).map(source).collect()
                };
                let local = after.local_shape(rank);
                let fast = flex::assemble::<f32>(local, sources());
                portable(local, sources())
                    .into_data()
                    .assert_eq(&fast.into_data(), true);
            }
        }
    }
}
