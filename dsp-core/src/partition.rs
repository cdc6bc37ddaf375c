//! How a length is divided over ranks: per rank, an ordered list of global ranges.
//!
//! ```text
//! balanced(10, 4)   rank 0: 0..2      rank 1: 2..5      rank 2: 5..7      rank 3: 7..10
//! zigzag(10, 2)     rank 0: 0..3, 8..10                 rank 1: 3..6, 6..8
//! balanced(2, 3)    rank 0: nothing   rank 1: 0..1      rank 2: 1..2
//! ```
//!
//! Nothing is padded: blocks differ in length where the ranks do not divide the length, and are empty where
//! there are more ranks than positions. Whatever depends on a position (rotary embeddings, causal masks,
//! tables) reads these ranges and never computes a global position from a local index.

use std::ops::Range;
use std::sync::Arc;

/// A partition that does not cover its length exactly once.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PartitionError {
    /// No rank at all.
    #[error("a partition of length {length} names no rank: it needs at least one")]
    NoRanks {
        /// The length to be divided.
        length: usize,
    },
    /// A range that ends before it begins or past the length.
    #[error("rank {rank} holds {range:?}, which is not a range within 0..{length}")]
    OutOfBounds {
        /// The rank.
        rank: usize,
        /// Its range.
        range: Range<usize>,
        /// The length to be divided.
        length: usize,
    },
    /// A position that no rank holds, or that two hold.
    #[error(
        "position {position} of {length} is held by {holders} ranks: each position must be held exactly once"
    )]
    NotOnce {
        /// The position.
        position: usize,
        /// The length to be divided.
        length: usize,
        /// How many ranges contain it.
        holders: usize,
    },
}

/// Which global positions of one length each rank holds.
///
/// Every position is held exactly once. Cloning shares the ranges.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    length: usize,
    ranges: Arc<[Vec<Range<usize>>]>,
}

impl Partition {
    /// A partition from each rank's ranges, in the order in which the rank holds them.
    ///
    /// # Errors
    /// [`PartitionError`] unless each position of `0..length` is held exactly once. Empty ranges are dropped.
    pub fn new(length: usize, ranges: Vec<Vec<Range<usize>>>) -> Result<Self, PartitionError> {
        if ranges.is_empty() {
            return Err(PartitionError::NoRanks { length });
        }
        let mut sorted = Vec::new();
        for (rank, list) in ranges.iter().enumerate() {
            for range in list {
                if range.start > range.end || range.end > length {
                    return Err(PartitionError::OutOfBounds {
                        rank,
                        range: range.clone(),
                        length,
                    });
                }
                if !range.is_empty() {
                    sorted.push(range.clone());
                }
            }
        }
        sorted.sort_by_key(|range| range.start);
        let mut covered = 0;
        for range in &sorted {
            if range.start != covered {
                let (position, holders) = if range.start > covered {
                    (covered, 0)
                } else {
                    (range.start, 2)
                };
                return Err(PartitionError::NotOnce {
                    position,
                    length,
                    holders,
                });
            }
            covered = range.end;
        }
        if covered != length {
            return Err(PartitionError::NotOnce {
                position: covered,
                length,
                holders: 0,
            });
        }
        Ok(Self::trusted(length, ranges))
    }

    /// Contiguous blocks that differ by at most one: each rank holds its [`balanced_range`].
    ///
    /// # Panics
    /// If `ranks` is 0.
    pub fn balanced(length: usize, ranks: usize) -> Self {
        assert!(ranks > 0, "a partition needs at least one rank");
        let blocks = (0..ranks).map(|rank| vec![balanced_range(length, rank, ranks)]);
        Self::trusted(length, blocks.collect())
    }

    /// Contiguous blocks of the given lengths, in rank order.
    ///
    /// # Errors
    /// [`PartitionError::NoRanks`] if `counts` is empty.
    pub fn from_counts(counts: &[usize]) -> Result<Self, PartitionError> {
        let length = counts.iter().sum();
        if counts.is_empty() {
            return Err(PartitionError::NoRanks { length });
        }
        let mut start = 0;
        let blocks = counts
            .iter()
            .map(|&count| {
                start += count;
                vec![start - count..start]
            })
            .collect();
        Ok(Self::trusted(length, blocks))
    }

    /// Two chunks a rank, one from each end, so that causal attention costs every rank alike.
    ///
    /// The balanced count `l` of each rank comes first; it holds `⌈l/2⌉` positions counted from the front, in
    /// rank order, and `⌊l/2⌋` mirrored from the back. Works for any length and any number of ranks.
    ///
    /// # Panics
    /// If `ranks` is 0.
    pub fn zigzag(length: usize, ranks: usize) -> Self {
        let counts = Self::balanced(length, ranks).counts();
        Self::trusted(length, mirrored(0..length, &counts))
    }

    /// The same within each of several documents that are packed into one length, so that causal attention inside
    /// documents costs every rank alike. `ends` are where the documents end, ascending; what is left after the
    /// last is one more.
    ///
    /// The positions that are left over where the ranks do not divide a document go to the ranks in turn, so that the
    /// ranks' counts differ by at most one.
    ///
    /// # Panics
    /// If `ranks` is 0, or the ends do not ascend within the length.
    pub fn zigzag_documents(length: usize, ends: &[usize], ranks: usize) -> Self {
        assert!(ranks > 0, "a partition needs at least one rank");
        let mut blocks = vec![vec![]; ranks];
        let (mut start, mut turn) = (0, 0);
        for &end in ends.iter().chain(std::iter::once(&length)) {
            assert!(
                start <= end && end <= length,
                "documents that end at {ends:?} do not lie in a length of {length}"
            );
            let (each, left) = ((end - start) / ranks, (end - start) % ranks);
            let counts: Vec<usize> = (0..ranks)
                .map(|rank| each + usize::from((rank + ranks - turn % ranks) % ranks < left))
                .collect();
            turn += left;
            for (block, ranges) in blocks.iter_mut().zip(mirrored(start..end, &counts)) {
                block.extend(ranges);
            }
            start = end;
        }
        Self::trusted(length, blocks)
    }

    fn trusted(length: usize, mut ranges: Vec<Vec<Range<usize>>>) -> Self {
        for list in &mut ranges {
            list.retain(|range| !range.is_empty());
        }
        Self {
            length,
            ranges: ranges.into(),
        }
    }

    /// The length that is divided.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The number of ranks.
    pub fn ranks(&self) -> usize {
        self.ranges.len()
    }

    /// The global ranges that `rank` holds, in its local order; none is empty.
    pub fn ranges(&self, rank: usize) -> &[Range<usize>] {
        &self.ranges[rank]
    }

    /// How many positions `rank` holds.
    pub fn count(&self, rank: usize) -> usize {
        self.ranges[rank].iter().map(ExactSizeIterator::len).sum()
    }

    /// How many positions each rank holds.
    pub fn counts(&self) -> Vec<usize> {
        (0..self.ranks()).map(|rank| self.count(rank)).collect()
    }
}

/// What rank `r` of `n` holds of a length in balanced blocks: `⌊rL/n⌋ .. ⌊(r+1)L/n⌋`.
///
/// # Panics
/// If `ranks` is 0.
pub fn balanced_range(length: usize, rank: usize, ranks: usize) -> Range<usize> {
    rank * length / ranks..(rank + 1) * length / ranks
}

/// For each count, its first half from the front of a range and its second half from the back, inwards.
fn mirrored(range: Range<usize>, counts: &[usize]) -> Vec<Vec<Range<usize>>> {
    let (mut front, mut back) = (range.start, range.end);
    counts
        .iter()
        .map(|&count| {
            let (first, mirror) = (count.div_ceil(2), count / 2);
            front += first;
            back -= mirror;
            vec![front - first..front, back..back + mirror]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn balanced_and_zigzag_partitions_hold_every_position_once(length in 0usize..60, ranks in 1usize..9) {
            for partition in [Partition::balanced(length, ranks), Partition::zigzag(length, ranks)] {
                let ranges = (0..ranks).map(|rank| partition.ranges(rank).to_vec()).collect();
                prop_assert_eq!(Partition::new(length, ranges), Ok(partition.clone()));
                let counts = partition.counts();
                prop_assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1);
            }
        }
    }

    proptest! {
        #[test]
        fn packed_documents_are_shared_out_evenly_in_positions_and_in_causal_work(
            lengths in prop::collection::vec(0usize..40, 0..6),
            tail in 0usize..5,
            ranks in 1usize..7,
        ) {
            let mut end = 0;
            let ends: Vec<usize> = lengths.iter().map(|length| { end += length; end }).collect();
            let length = end + tail;
            let partition = Partition::zigzag_documents(length, &ends, ranks);
            let ranges = (0..ranks).map(|rank| partition.ranges(rank).to_vec()).collect();
            prop_assert_eq!(Partition::new(length, ranges), Ok(partition.clone()));
            let counts = partition.counts();
            prop_assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1);
            // Pairs of a query and a key of its document that is not behind it.
            let work = |rank: usize| -> usize {
                let positions = partition.ranges(rank).iter().cloned().flatten();
                positions.map(|position| {
                    let start = ends.iter().copied().take_while(|&end| end <= position).last();
                    position - start.unwrap_or(0) + 1
                }).sum()
            };
            let work: Vec<usize> = (0..ranks).map(work).collect();
            // A position more or less in each document, and halves that are not equal.
            let bound: usize = lengths.iter().chain([&tail]).map(|length| 2 * length).sum();
            prop_assert!(work.iter().max().unwrap() - work.iter().min().unwrap() <= bound);
        }
    }

    #[test]
    fn zigzag_gives_each_rank_a_chunk_of_both_ends() {
        let partition = Partition::zigzag(10, 2);
        assert_eq!(partition.ranges(0), [0..3, 8..10]);
        assert_eq!(partition.ranges(1), [3..6, 6..8]);
    }

    #[test]
    fn a_gap_an_overlap_and_an_overrun_are_refused_with_the_position() {
        let gap = Partition::new(4, vec![vec![0..1], vec![2..4]]);
        assert_eq!(
            gap,
            Err(PartitionError::NotOnce {
                position: 1,
                length: 4,
                holders: 0
            })
        );
        let overlap = Partition::new(4, vec![vec![0..3], vec![2..4]]);
        assert_eq!(
            overlap,
            Err(PartitionError::NotOnce {
                position: 2,
                length: 4,
                holders: 2
            })
        );
        let overrun = Partition::new(4, vec![vec![0..5]]);
        assert_eq!(
            overrun,
            Err(PartitionError::OutOfBounds {
                rank: 0,
                range: 0..5,
                length: 4
            })
        );
    }
}
