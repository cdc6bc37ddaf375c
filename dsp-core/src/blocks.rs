//! Who holds what of a global tensor, and what must move to hold it differently.
//!
//! [`Blocks`] says, per rank and per dim, which global ranges the rank holds; its local block is their
//! product. From the blocks before and the blocks after, [`Blocks::transfers`] finds every box that one rank
//! must hand to another. That one function describes each collective:
//!
//! ```text
//! collective        before                 after                  and its transpose
//! all-to-all        split along one dim    split along another    the same, the other way
//! all-gather        split                  everybody holds all    reduce-scatter
//! reduce-scatter    everybody holds all    split (sums)           all-gather
//! broadcast         the root holds all     everybody holds all    reduce to the root
//! ring shift        rank r holds block r   rank r holds r-1       shift the other way
//! ```
//!
//! What arrives is *summed* in rank order: where one rank holds an element, that is a copy; where several
//! hold contributions to it, a reduction. So the transpose of any exchange is the same exchange with before
//! and after swapped, and no collective needs a backward of its own.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::partition::Partition;

/// The number of dims of every tensor that is exchanged: batch, three sequence axes, channels.
pub const DIMS: usize = 5;

/// One dim of a global tensor and the ranges of it that each rank holds.
///
/// Unlike a [`Partition`], ranks may hold the same range (replicas, key-value heads that several ranks need).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DimBlocks {
    length: usize,
    ranges: Arc<[Vec<Range<usize>>]>,
}

impl DimBlocks {
    /// Every rank holds the whole dim.
    pub fn whole(length: usize, ranks: usize) -> Self {
        let all = if length == 0 { vec![] } else { vec![0..length] };
        Self {
            length,
            ranges: vec![all; ranks].into(),
        }
    }

    /// Each rank holds its part of `partition`.
    pub fn split(partition: &Partition) -> Self {
        Self {
            length: partition.length(),
            ranges: (0..partition.ranks())
                .map(|rank| partition.ranges(rank).to_vec())
                .collect(),
        }
    }

    /// Any ranges, one list a rank; empty ranges are dropped.
    ///
    /// # Panics
    /// If a range ends past `length`.
    pub fn from_ranges(length: usize, mut ranges: Vec<Vec<Range<usize>>>) -> Self {
        for list in &mut ranges {
            list.retain(|range| !range.is_empty());
            assert!(
                list.iter().all(|range| range.end <= length),
                "a block of {list:?} lies outside a dim of length {length}"
            );
        }
        Self {
            length,
            ranges: ranges.into(),
        }
    }

    /// The dim's global length.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The ranges that `rank` holds.
    pub fn ranges(&self, rank: usize) -> &[Range<usize>] {
        &self.ranges[rank]
    }

    /// How much of the dim `rank` holds.
    pub fn count(&self, rank: usize) -> usize {
        self.ranges[rank].iter().map(ExactSizeIterator::len).sum()
    }
}

/// A box of a local tensor: where it starts and how far it reaches, per dim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// The first index, per dim.
    pub start: [usize; DIMS],
    /// The length, per dim.
    pub extent: [usize; DIMS],
}

impl Region {
    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.extent.iter().product()
    }

    /// The indices, per dim.
    pub fn ranges(&self) -> [Range<usize>; DIMS] {
        std::array::from_fn(|dim| self.start[dim]..self.start[dim] + self.extent[dim])
    }

    /// Whether both boxes hold an element.
    pub fn overlaps(&self, other: &Self) -> bool {
        (0..DIMS).all(|dim| {
            self.start[dim] < other.start[dim] + other.extent[dim]
                && other.start[dim] < self.start[dim] + self.extent[dim]
        })
    }
}

/// A box in the sender's local block and the box of the same size in the receiver's where it lands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transfer {
    /// In the sender's block.
    pub source: Region,
    /// In the receiver's block.
    pub target: Region,
}

/// Which box of a global rank-5 tensor each rank holds.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Blocks {
    dims: [DimBlocks; DIMS],
    ranks: usize,
}

impl fmt::Debug for Blocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Blocks({:?} over {} ranks)", self.shape(), self.ranks)
    }
}

impl Blocks {
    /// Blocks from each dim's ranges.
    ///
    /// # Panics
    /// If the dims speak of different numbers of ranks.
    pub fn new(dims: [DimBlocks; DIMS]) -> Self {
        let ranks = dims[0].ranges.len();
        assert!(
            dims.iter().all(|dim| dim.ranges.len() == ranks),
            "every dim of a block map speaks of the same ranks"
        );
        Self { dims, ranks }
    }

    /// Everybody holds everything.
    pub fn replicated(shape: [usize; DIMS], ranks: usize) -> Self {
        Self::new(shape.map(|length| DimBlocks::whole(length, ranks)))
    }

    /// The same blocks with one dim held differently.
    pub fn with_dim(mut self, dim: usize, blocks: DimBlocks) -> Self {
        self.dims[dim] = blocks;
        Self::new(self.dims)
    }

    /// One dim.
    pub fn dim(&self, dim: usize) -> &DimBlocks {
        &self.dims[dim]
    }

    /// The number of ranks.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// The global shape.
    pub fn shape(&self) -> [usize; DIMS] {
        std::array::from_fn(|dim| self.dims[dim].length)
    }

    /// The shape of `rank`'s local block.
    pub fn local_shape(&self, rank: usize) -> [usize; DIMS] {
        std::array::from_fn(|dim| self.dims[dim].count(rank))
    }

    /// The boxes of `source`'s block (held by `self`) that belong in `target`'s block of `after`.
    ///
    /// Both sides compute the same list in the same order, so boxes need no labels on the wire.
    pub fn transfers(&self, after: &Blocks, source: usize, target: usize) -> Vec<Transfer> {
        let empty = Region {
            start: [0; DIMS],
            extent: [0; DIMS],
        };
        let mut boxes = vec![Transfer {
            source: empty,
            target: empty,
        }];
        for dim in 0..DIMS {
            let overlaps = overlaps(
                self.dims[dim].ranges(source),
                after.dims[dim].ranges(target),
            );
            boxes = boxes
                .iter()
                .flat_map(|transfer| {
                    overlaps.iter().map(move |overlap| {
                        let mut transfer = *transfer;
                        transfer.source.start[dim] = overlap.source;
                        transfer.target.start[dim] = overlap.target;
                        transfer.source.extent[dim] = overlap.length;
                        transfer.target.extent[dim] = overlap.length;
                        transfer
                    })
                })
                .collect();
        }
        boxes
    }

    /// How many elements `source` hands to `target` to get from `self` to `after`.
    pub fn elements(&self, after: &Blocks, source: usize, target: usize) -> usize {
        (0..DIMS)
            .map(|dim| {
                overlaps(
                    self.dims[dim].ranges(source),
                    after.dims[dim].ranges(target),
                )
                .iter()
                .map(|overlap| overlap.length)
                .sum::<usize>()
            })
            .product()
    }
}

/// A stretch that two lists of ranges share, by its offset in each list.
struct Overlap {
    source: usize,
    target: usize,
    length: usize,
}

fn overlaps(source: &[Range<usize>], target: &[Range<usize>]) -> Vec<Overlap> {
    let mut found = Vec::new();
    let mut source_offset = 0;
    for a in source {
        let mut target_offset = 0;
        for b in target {
            let (start, end) = (a.start.max(b.start), a.end.min(b.end));
            if start < end {
                found.push(Overlap {
                    source: source_offset + start - a.start,
                    target: target_offset + start - b.start,
                    length: end - start,
                });
            }
            target_offset += b.len();
        }
        source_offset += a.len();
    }
    found
}
