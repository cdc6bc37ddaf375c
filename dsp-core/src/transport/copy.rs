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

fn portable(shape: [usize; DIMS], sources: Vec<Source>) -> Tensor<DIMS> {
    let first = &sources[0].tensor;
    let dtype: DType = first.dtype();
    let mut block = Tensor::<DIMS>::zeros(shape, (&first.device(), dtype));
    for source in sources {
        for transfer in source.transfers {
            let ranges = |region: crate::blocks::Region| {
                std::array::from_fn::<_, DIMS, _>(|dim| {
                    region.start[dim]..region.start[dim] + region.extent[dim]
                })
            };
            let arriving = source.tensor.clone().slice(ranges(transfer.source));
            let target = ranges(transfer.target);
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
                    place(&mut block, shape, &tensor, transfer, |old, new| old + new);
                } else {
                    place(&mut block, shape, &tensor, transfer, |_, new| new);
                }
                written.add(transfer);
            }
        }
        let dtype = E::dtype();
        Tensor::from_data(TensorData::new(block, shape), (&device, dtype))
    }

    /// The boxes written so far: a box that meets none of them is copied, one that does is added.
    ///
    /// Boxes of one exchange either tile the block or coincide in runs, so a partial overlap, though rare,
    /// may only be answered by adding: the block starts at 0, which makes that right too.
    #[derive(Default)]
    struct Written(Vec<Transfer>);

    impl Written {
        fn overlaps(&self, other: &Transfer) -> bool {
            self.0.iter().any(|earlier| {
                (0..DIMS).all(|dim| {
                    let (a, b) = (&earlier.target, &other.target);
                    a.start[dim] < b.start[dim] + b.extent[dim]
                        && b.start[dim] < a.start[dim] + a.extent[dim]
                })
            })
        }

        fn add(&mut self, transfer: &Transfer) {
            self.0.push(*transfer);
        }
    }

    fn place<E>(
        block: &mut [E],
        shape: [usize; DIMS],
        tensor: &FlexTensor,
        transfer: &Transfer,
        combine: impl Fn(E, E) -> E,
    ) where
        E: Element + bytemuck::Pod + Copy,
    {
        let layout = tensor.layout();
        let strides = layout.strides();
        let storage = tensor.storage::<E>();
        let (from, to) = (&transfer.source, &transfer.target);
        let [n0, n1, n2, n3, n4] = from.extent;
        let offset = |index: [usize; DIMS]| -> usize {
            let steps: isize = (0..DIMS)
                .map(|dim| (from.start[dim] + index[dim]) as isize * strides[dim])
                .sum();
            layout.start_offset().wrapping_add_signed(steps)
        };
        for i0 in 0..n0 {
            for i1 in 0..n1 {
                for i2 in 0..n2 {
                    for i3 in 0..n3 {
                        let row = (0..4)
                            .zip([i0, i1, i2, i3])
                            .fold(0, |row, (dim, i)| row * shape[dim] + to.start[dim] + i);
                        let start = row * shape[4] + to.start[4];
                        let row = &mut block[start..start + n4];
                        let source = offset([i0, i1, i2, i3, 0]);
                        if strides[4] == 1 {
                            for (target, &value) in
                                row.iter_mut().zip(&storage[source..source + n4])
                            {
                                *target = combine(*target, value);
                            }
                        } else {
                            for (i4, target) in row.iter_mut().enumerate() {
                                let value =
                                    storage[source.wrapping_add_signed(i4 as isize * strides[4])];
                                *target = combine(*target, value);
                            }
                        }
                    }
                }
            }
        }
    }
}
