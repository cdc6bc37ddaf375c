//! One strided copy from the peers' memory into the final layout: a block that is written once.
//!
//! ```text
//!   peer 0's tensor  ┌──┬──┐            this rank's block   ┌──────┐  slab 0, written by one thread
//!                    │▓▓│  │ ─────────────────────────────► │▓▓▓▓▓▓│
//!                    └──┴──┘                                ├──────┤  slab 1, by another
//!   peer 1's tensor  ┌──┬──┐ ─────────────────────────────► │▒▒▒▒▒▒│
//!                    │▒▒│  │                                └──────┘
//!                    └──┴──┘   boxes that land on one place are added, a piece at a time, in rank order
//! ```
//!
//! Memory that is about to be written whole need not be cleared before, for which this module holds an `unsafe`.

#![expect(
    unsafe_code,
    reason = "memory that is about to be written whole is not cleared before"
)]

use std::mem::MaybeUninit;
use std::ops::Range;

use burn::backend::flex::FlexTensor;
use rayon::prelude::*;

use crate::blocks::{DIMS, Region};
use crate::fused::real::Real;

/// How many elements are added at a time, so that they stay in a core's first cache.
const PIECE: usize = 1024;

/// A block of fewer elements is not worth a second thread.
const SHARED: usize = 1 << 15;

/// A box of a peer's tensor.
pub(super) struct Term<'a, E> {
    values: &'a [E],
    strides: [isize; DIMS],
    /// Of the box's first element.
    offset: isize,
}

impl<'a, E: Real> Term<'a, E> {
    /// The box of `tensor` that begins at `start`.
    pub(super) fn new(tensor: &'a FlexTensor, start: [usize; DIMS]) -> Self {
        let layout = tensor.layout();
        let strides = std::array::from_fn(|dim| layout.strides()[dim]);
        let steps = |dim: usize| start[dim] as isize * strides[dim];
        Self {
            values: tensor.storage(),
            strides,
            offset: layout.start_offset() as isize + (0..DIMS).map(steps).sum::<isize>(),
        }
    }

    fn run(&self, offset: isize, length: usize) -> &'a [E] {
        &self.values[offset as usize..][..length]
    }
}

/// A box of the block and what lands there: the sum of the terms, in their order.
pub(super) struct Tile<'a, E> {
    pub(super) target: Region,
    pub(super) terms: Vec<Term<'a, E>>,
}

/// Whether every element of a block of `shape` lies in exactly one of the regions.
pub(super) fn cover(shape: [usize; DIMS], regions: &[Region]) -> bool {
    let inside =
        |region: &Region| (0..DIMS).all(|dim| region.start[dim] + region.extent[dim] <= shape[dim]);
    let apart = |a: &Region, b: &Region| {
        (0..DIMS).any(|dim| {
            a.start[dim] + a.extent[dim] <= b.start[dim]
                || b.start[dim] + b.extent[dim] <= a.start[dim]
        })
    };
    let volume: usize = regions.iter().map(Region::elements).sum();
    volume == shape.iter().product::<usize>()
        && regions.iter().all(inside)
        && (regions.iter().enumerate()).all(|(i, a)| regions[..i].iter().all(|b| apart(a, b)))
}

/// The block of `shape` that the tiles make up.
///
/// # Panics
/// If they do not [`cover`] it, each with at least one term.
pub(super) fn assemble<E: Real>(shape: [usize; DIMS], tiles: &[Tile<'_, E>]) -> Vec<E> {
    let regions: Vec<Region> = tiles.iter().map(|tile| tile.target).collect();
    let with_terms = tiles.iter().all(|tile| !tile.terms.is_empty());
    assert!(
        with_terms && cover(shape, &regions),
        "the tiles of a block of {shape:?} cover it once: {regions:?}"
    );
    let count: usize = shape.iter().product();
    let mut block = Vec::with_capacity(count);
    let unwritten = &mut block.spare_capacity_mut()[..count];
    // Slabs are parts of the first dim that has any: each lies end to end.
    let dim = shape.iter().position(|&length| length > 1).unwrap_or(0);
    let stride: usize = shape[dim + 1..].iter().product();
    let threads = match count < SHARED {
        true => 1,
        false => rayon::current_num_threads(),
    };
    let thickness = shape[dim].div_ceil(threads).max(1);
    let write = |(index, slab): (usize, &mut [MaybeUninit<E>])| {
        let first = index * thickness;
        let held = first..first + slab.len() / stride.max(1);
        tiles
            .iter()
            .map(|tile| lay(tile, shape, (dim, &held), slab))
            .sum::<usize>()
    };
    let size = (thickness * stride).max(1);
    let written: usize = match threads {
        1 => unwritten.chunks_mut(size).enumerate().map(write).sum(),
        _ => unwritten.par_chunks_mut(size).enumerate().map(write).sum(),
    };
    assert_eq!(written, count, "the elements of a block that were written");
    // SAFETY: the capacity is `count`, and all `count` elements were written: the regions lie inside the block, no
    // two meet, so that no element was written twice, and as many were written as there are.
    unsafe { block.set_len(count) };
    block
}

/// Writes the part of a tile that lies in a slab, the range `held` of a dim; returns how many elements that were.
fn lay<E: Real>(
    tile: &Tile<'_, E>,
    shape: [usize; DIMS],
    (dim, held): (usize, &Range<usize>),
    slab: &mut [MaybeUninit<E>],
) -> usize {
    let Region {
        mut start,
        mut extent,
    } = tile.target;
    let first = start[dim].max(held.start);
    let end = (start[dim] + extent[dim]).min(held.end);
    if first >= end {
        return 0;
    }
    let skipped = (first - start[dim]) as isize;
    (start[dim], extent[dim]) = (first - held.start, end - first);
    let mut offsets: Vec<isize> = (tile.terms.iter())
        .map(|term| term.offset + skipped * term.strides[dim])
        .collect();
    each_run(
        Region { start, extent },
        shape,
        &tile.terms,
        &mut offsets,
        |offsets, run| add_up(&tile.terms, offsets, &mut slab[run]),
    );
    extent.iter().product()
}

/// Walks through a box of a tensor that lands in a block of `shape`: tells of each run, in the order of the block,
/// what it is and where it lands.
#[cfg(feature = "mpi")]
pub(super) fn each_run_of<E: Real>(
    term: Term<'_, E>,
    target: Region,
    shape: [usize; DIMS],
    mut tell: impl FnMut(&[E], Range<usize>),
) {
    let (mut offset, term) = ([term.offset], [term]);
    each_run(target, shape, &term, &mut offset, |offset, run| {
        tell(term[0].run(offset[0], run.len()), run);
    });
}

/// Walks through a box of a block of `shape` in the longest runs that lie end to end in it and in every term: tells
/// where the run begins in each term, and which it is in the block. `offsets` are those of the box's first element.
fn each_run<E: Real>(
    target: Region,
    shape: [usize; DIMS],
    terms: &[Term<'_, E>],
    offsets: &mut [isize],
    mut tell: impl FnMut(&[isize], Range<usize>),
) {
    let Region { start, extent } = target;
    let mut strides = [1; DIMS];
    for dim in (0..DIMS - 1).rev() {
        strides[dim] = strides[dim + 1] * shape[dim + 1];
    }
    let mut first: usize = (0..DIMS).map(|dim| start[dim] * strides[dim]).sum();
    // The dims from `inner` on are one run: they lie end to end in every source and in the target.
    let (mut inner, mut run) = (DIMS, 1);
    while inner > 0 {
        let dim = inner - 1;
        let in_source = |term: &Term<'_, E>| term.strides[dim] == run as isize;
        let end_to_end = strides[dim] == run && terms.iter().all(in_source);
        if extent[dim] != 1 && !end_to_end {
            break;
        }
        run *= extent[dim];
        inner = dim;
    }
    let runs: usize = extent[..inner].iter().product();
    let mut index = [0; DIMS];
    for _ in 0..runs {
        tell(offsets, first..first + run);
        // The next run, the last of the outer dims varying fastest.
        for dim in (0..inner).rev() {
            index[dim] += 1;
            let steps = match index[dim] < extent[dim] {
                true => 1,
                false => 1 - extent[dim] as isize,
            };
            first = first.wrapping_add_signed(steps * strides[dim] as isize);
            for (offset, term) in offsets.iter_mut().zip(terms) {
                *offset += steps * term.strides[dim];
            }
            if steps == 1 {
                break;
            }
            index[dim] = 0;
        }
    }
}

/// Writes the sum of a run of each term.
fn add_up<E: Real>(terms: &[Term<'_, E>], offsets: &[isize], run: &mut [MaybeUninit<E>]) {
    let ([first, more @ ..], [offset, offsets @ ..]) = (terms, offsets) else {
        unreachable!("a tile has a term");
    };
    if more.is_empty() {
        run.write_copy_of_slice(first.run(*offset, run.len()));
        return;
    }
    let mut sum = [E::ZERO; PIECE];
    for (index, piece) in run.chunks_mut(PIECE).enumerate() {
        let from = (index * PIECE) as isize;
        let sum = &mut sum[..piece.len()];
        sum.copy_from_slice(first.run(offset + from, piece.len()));
        for (term, offset) in more.iter().zip(offsets) {
            for (sum, &value) in sum.iter_mut().zip(term.run(offset + from, piece.len())) {
                *sum += value;
            }
        }
        piece.write_copy_of_slice(sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(start: [usize; DIMS], extent: [usize; DIMS]) -> Region {
        Region { start, extent }
    }

    #[test]
    fn regions_cover_a_block_if_they_lie_in_it_and_none_meet_and_none_is_missing() {
        let shape = [1, 4, 1, 3, 1];
        let top = region([0; DIMS], [1, 2, 1, 3, 1]);
        let bottom = region([0, 2, 0, 0, 0], [1, 2, 1, 3, 1]);
        assert!(cover(shape, &[bottom, top]));
        assert!(!cover(shape, &[top]));
        assert!(!cover(shape, &[top, top]));
        let outside = region([0, 3, 0, 0, 0], [1, 2, 1, 3, 1]);
        assert!(!cover(shape, &[top, outside]));
        assert!(cover([1, 0, 1, 3, 1], &[]));
    }

    #[test]
    #[should_panic(expected = "cover it once")]
    fn a_block_with_a_hole_is_never_handed_out() {
        assemble::<f32>([1, 1, 1, 1, 2], &[]);
    }
}
