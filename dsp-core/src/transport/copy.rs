//! Lays boxes of the peers' tensors into this rank's block: the one copy of the local transport.
//!
//! On Flex the boxes are read through the peers' strides and written in the block's final order, in one pass
//! ([`tiles`](super::tiles)). Other backends go through Burn's own slices; a box on another device is brought over
//! first, by Burn, and only the box.
//!
//! A GPU works behind, each thread in a queue of its own, and Burn writes in place once nobody else holds a tensor, also
//! where another thread's queue has yet to read it (CubeCL 0.11 orders reads after writes between queues, and not writes
//! after reads). So there a tensor is always copied, and held until the device has done it.

use std::sync::{Mutex, PoisonError};

use burn::tensor::{DType, Device, Tensor};

use crate::blocks::{DIMS, Region, Transfer};

/// A peer's tensor and the boxes of it that land here.
pub(super) struct Source {
    pub(super) tensor: Tensor<DIMS>,
    pub(super) transfers: Vec<Transfer>,
}

/// Between two devices a copy has a sender and a receiver, who wait for each other. Two ranks that ask for
/// copies across each other must enter them in one order on both devices, or both could wait for ever.
#[derive(Debug, Default)]
pub(super) struct Crossing(Mutex<()>);

/// The block of `shape` on `device` that the boxes of all sources add up to, in the order of `sources`.
///
/// Elements that no source touches are 0. `sources` must not be empty: the dtype is theirs.
/// Who is not on the processor keeps the sources until the device is done ([`Device::sync`]).
pub(super) fn assemble(
    shape: [usize; DIMS],
    sources: &[Source],
    device: &Device,
    crossing: &Crossing,
) -> Tensor<DIMS> {
    if let Some(tensor) = handed_over(shape, sources, device) {
        return tensor;
    }
    #[cfg(feature = "flex")]
    {
        let flex = Device::flex();
        let all_here = sources.iter().all(|source| source.tensor.device() == flex);
        if *device == flex && all_here {
            let block = match sources[0].tensor.dtype() {
                DType::F32 => flex::assemble::<f32>(shape, sources),
                DType::F64 => flex::assemble::<f64>(shape, sources),
                _ => None,
            };
            if let Some(block) = block {
                return block;
            }
        }
    }
    portable(shape, sources, device, crossing)
}

/// The one source's tensor itself, where the whole of it is the whole block: nothing is copied then.
fn handed_over(shape: [usize; DIMS], sources: &[Source], device: &Device) -> Option<Tensor<DIMS>> {
    let mut busy = sources.iter().filter(|source| !source.transfers.is_empty());
    let (source, None) = (busy.next()?, busy.next()) else {
        return None;
    };
    let [transfer] = source.transfers[..] else {
        return None;
    };
    let whole = transfer.source.extent == shape && source.tensor.dims() == shape;
    let here = source.tensor.device() == *device;
    (whole && here && works_at_once(device)).then(|| source.tensor.clone())
}

/// Whether what an operation returns is computed already.
#[cfg(feature = "flex")]
fn works_at_once(device: &Device) -> bool {
    *device == Device::flex()
}

/// Whether what an operation returns is computed already.
#[cfg(not(feature = "flex"))]
fn works_at_once(_device: &Device) -> bool {
    false
}

fn portable(
    shape: [usize; DIMS],
    sources: &[Source],
    device: &Device,
    crossing: &Crossing,
) -> Tensor<DIMS> {
    let dtype: DType = sources[0].tensor.dtype();
    let mut block = Tensor::<DIMS>::zeros(shape, (device, dtype));
    // What lands on a place that is written already is added. (Where only a part of it is, the rest is 0.)
    let mut written: Vec<Region> = vec![];
    for source in sources {
        for transfer in &source.transfers {
            let arriving = source.tensor.clone().slice(transfer.source.ranges());
            let arriving = bring(arriving, device, crossing);
            let target = transfer.target.ranges();
            let arriving = match written
                .iter()
                .any(|earlier| earlier.overlaps(&transfer.target))
            {
                true => block.clone().slice(target.clone()) + arriving,
                false => arriving,
            };
            block = block.slice_assign(target, arriving);
            written.push(transfer.target);
        }
    }
    block
}

fn bring(tensor: Tensor<DIMS>, device: &Device, crossing: &Crossing) -> Tensor<DIMS> {
    if tensor.device() == *device {
        return tensor;
    }
    let _order = crossing.0.lock().unwrap_or_else(PoisonError::into_inner);
    tensor.to_device(device)
}

#[cfg(feature = "flex")]
mod flex {
    use burn::backend::Flex;
    use burn::backend::flex::FlexTensor;
    use burn::tensor::Tensor;

    use super::super::tiles::{self, Term, Tile};
    use super::Source;
    use crate::blocks::{DIMS, Region, Transfer};
    use crate::fused::real::Real;
    use crate::fused::rows::Owned;

    /// `None` where boxes meet without being equal, or leave a hole: such blocks are laid out the portable way.
    pub(super) fn assemble<E: Real>(
        shape: [usize; DIMS],
        sources: &[Source],
    ) -> Option<Tensor<DIMS>> {
        let tensors = sources.iter().map(|source| {
            let Ok(tensor) = source.tensor.clone().try_into_primitive::<Flex>() else {
                unreachable!("the tensors of a group on Flex are on Flex");
            };
            (tensor, &source.transfers)
        });
        let tensors: Vec<(FlexTensor, &Vec<Transfer>)> = tensors.collect();
        let mut tiles: Vec<Tile<'_, E>> = Vec::new();
        for (tensor, transfers) in &tensors {
            for &Transfer { source, target } in transfers.iter() {
                let term = Term::new(tensor, source.start);
                match tiles.iter_mut().find(|tile| tile.target == target) {
                    Some(tile) => tile.terms.push(term),
                    None => tiles.push(Tile {
                        target,
                        terms: vec![term],
                    }),
                }
            }
        }
        let regions: Vec<Region> = tiles.iter().map(|tile| tile.target).collect();
        tiles::cover(shape, &regions)
            .then(|| Owned::from_vec(tiles::assemble(shape, &tiles), &shape).into_tensor())
    }
}

#[cfg(test)]
#[cfg(feature = "flex")]
mod tests {
    use burn::tensor::TensorData;

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
                let fast = flex::assemble::<f32>(local, &sources()).unwrap();
                portable(local, &sources(), &Device::flex(), &Crossing::default())
                    .into_data()
                    .assert_eq(&fast.into_data(), true);
            }
        }
    }
}
