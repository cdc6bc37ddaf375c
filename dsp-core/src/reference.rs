//! Each collective as a plain function over all ranks' blocks: what the property tests hold it to.
//!
//! Nothing here knows of boxes, transports or gradients: concatenate, slice, add. Block `r` of each argument
//! and each result is rank `r`'s.

use burn::tensor::Tensor;

use crate::layout::select_ranges;
use crate::partition::Partition;

/// The global tensor of which `blocks` are the parts along `dim`.
pub fn assemble<const D: usize>(
    blocks: &[Tensor<D>],
    dim: usize,
    partition: &Partition,
) -> Tensor<D> {
    let mut pieces = Vec::new();
    for (rank, block) in blocks.iter().enumerate() {
        let mut offset = 0;
        for range in partition.ranges(rank) {
            pieces.push((range.start, block.clone().narrow(dim, offset, range.len())));
            offset += range.len();
        }
    }
    pieces.sort_by_key(|&(start, _)| start);
    match pieces.len() {
        0 => blocks[0].clone(),
        _ => Tensor::cat(pieces.into_iter().map(|(_, piece)| piece).collect(), dim),
    }
}

/// The parts of a global tensor.
pub fn divide<const D: usize>(
    whole: &Tensor<D>,
    dim: usize,
    partition: &Partition,
) -> Vec<Tensor<D>> {
    (0..partition.ranks())
        .map(|rank| select_ranges(whole.clone(), dim, partition.ranges(rank)))
        .collect()
}

/// The sum of all blocks, in rank order.
pub fn sum<const D: usize>(blocks: &[Tensor<D>]) -> Tensor<D> {
    let (first, rest) = blocks.split_first().expect("a group has at least one rank");
    rest.iter()
        .fold(first.clone(), |sum, block| sum + block.clone())
}

/// [`crate::collective::all_gather`].
pub fn all_gather<const D: usize>(
    blocks: &[Tensor<D>],
    dim: usize,
    partition: &Partition,
) -> Vec<Tensor<D>> {
    vec![assemble(blocks, dim, partition); blocks.len()]
}

/// [`crate::collective::reduce_scatter`].
pub fn reduce_scatter<const D: usize>(
    blocks: &[Tensor<D>],
    dim: usize,
    partition: &Partition,
) -> Vec<Tensor<D>> {
    divide(&sum(blocks), dim, partition)
}

/// [`crate::collective::all_reduce`].
pub fn all_reduce<const D: usize>(blocks: &[Tensor<D>]) -> Vec<Tensor<D>> {
    vec![sum(blocks); blocks.len()]
}

/// [`crate::collective::all_to_all`].
pub fn all_to_all<const D: usize>(
    blocks: &[Tensor<D>],
    (from_dim, from): (usize, &Partition),
    (to_dim, to): (usize, &Partition),
) -> Vec<Tensor<D>> {
    divide(&assemble(blocks, from_dim, from), to_dim, to)
}

/// [`crate::collective::broadcast`].
pub fn broadcast<const D: usize>(blocks: &[Tensor<D>], root: usize) -> Vec<Tensor<D>> {
    vec![blocks[root].clone(); blocks.len()]
}

/// [`crate::collective::ring_shift`].
pub fn ring_shift<const D: usize>(blocks: &[Tensor<D>], steps: isize) -> Vec<Tensor<D>> {
    let ranks = blocks.len() as isize;
    (0..ranks)
        .map(|rank| blocks[(rank - steps).rem_euclid(ranks) as usize].clone())
        .collect()
}
