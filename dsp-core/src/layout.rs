//! How an activation is laid out over the ranks, and [`Shard`]: a local tensor that knows its layout.
//!
//! An activation is `[batch, s1, s2, s3, channels]`: up to three sequence axes; those that a model does not
//! have are of length 1. Per sequence axis a layout says whether every rank holds all of it or which
//! [`Partition`] splits it over which axis of the mesh of ranks; and whether the values are complete or the
//! ranks' partial sums.
//!
//! ```text
//! video, split along time over 2 ranks          the same, split along space
//!
//!          space                                        space
//!        ┌─────────┐                                  ┌────┬────┐
//!   time │ rank 0  │                             time │rank│rank│
//!        ├─────────┤          one all-to-all          │ 0  │ 1  │
//!        │ rank 1  │       ─────────────────▶         │    │    │
//!        └─────────┘                                  └────┴────┘
//! ```

use std::convert::Infallible;
use std::fmt;
use std::ops::Range;

use burn::tensor::Tensor;

use crate::blocks::{Blocks, DIMS, DimBlocks};
use crate::fused;
use crate::partition::Partition;
use crate::vjp;

/// A sequence axis of an activation: which of the up to three.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqAxis(u8);

impl SeqAxis {
    /// The first axis after the batch (text: the only one; video: time).
    pub const FIRST: Self = Self(0);
    /// The second (video: space; weather: latitude).
    pub const SECOND: Self = Self(1);
    /// The third (weather: longitude).
    pub const THIRD: Self = Self(2);
    /// All three, in order.
    pub const ALL: [Self; 3] = [Self::FIRST, Self::SECOND, Self::THIRD];

    /// Its position among the sequence axes, from 0.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }

    /// The dim of an activation's tensor that it is.
    pub fn dim(self) -> usize {
        self.index() + 1
    }
}

impl fmt::Display for SeqAxis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sequence axis {}", self.index())
    }
}

/// A set of sequence axes: those that an attention runs over jointly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AxisSet(u8);

impl AxisSet {
    /// The set of the given axes.
    pub const fn of(axes: &[SeqAxis]) -> Self {
        let mut bits = 0;
        let mut index = 0;
        while index < axes.len() {
            bits |= 1 << axes[index].0;
            index += 1;
        }
        Self(bits)
    }

    /// Whether `axis` is in it.
    pub fn contains(self, axis: SeqAxis) -> bool {
        self.0 & (1 << axis.0) != 0
    }

    /// Its axes in order.
    pub fn iter(self) -> impl Iterator<Item = SeqAxis> {
        SeqAxis::ALL
            .into_iter()
            .filter(move |&axis| self.contains(axis))
    }
}

/// An axis of the mesh in which the ranks of a group stand.
///
/// Rank `r` has coordinate `r / stride % size` on it. A group of N ranks has the axis [`MeshAxis::whole`];
/// a mesh of u×r has one of size u and stride 1 (its rows) and one of size r and stride u (across rows).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MeshAxis {
    /// How far apart neighbours on this axis are in rank.
    pub stride: usize,
    /// How many ranks stand on it.
    pub size: usize,
}

impl MeshAxis {
    /// The one axis of a group that is not a mesh.
    pub fn whole(ranks: usize) -> Self {
        Self {
            stride: 1,
            size: ranks,
        }
    }

    /// Where `rank` stands on this axis.
    pub fn coordinate(self, rank: usize) -> usize {
        rank / self.stride % self.size
    }

    /// Whether each coordinate on this axis meets each coordinate on `other`, as in a mesh.
    fn is_independent_of(self, other: Self) -> bool {
        let nests =
            |inner: Self, outer: Self| outer.stride.is_multiple_of(inner.stride * inner.size);
        self.size == 1 || other.size == 1 || nests(self, other) || nests(other, self)
    }

    /// The ranks that stand on this axis together with `rank`, in the order of their coordinates.
    pub fn members(self, rank: usize) -> Vec<usize> {
        let first = rank - self.coordinate(rank) * self.stride;
        (0..self.size)
            .map(|coordinate| first + coordinate * self.stride)
            .collect()
    }
}

/// How one sequence axis is held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AxisLayout {
    /// Every rank holds all of it.
    Whole,
    /// Each rank holds the part that `partition` gives to its coordinate on the mesh axis `over`.
    Split {
        /// Who holds which positions.
        partition: Partition,
        /// The mesh axis over which they are divided.
        over: MeshAxis,
    },
}

/// Whether the ranks hold the values, or terms whose sum over the ranks is the value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value {
    /// The values themselves.
    Complete,
    /// Terms of a sum over the ranks.
    Partial,
}

/// A tensor that is not laid out as it must be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// The local tensor's extent along an axis is not what the layout gives this rank.
    #[error(
        "rank {rank} holds {got} positions of {axis}, where its layout gives it {expected} of {length}"
    )]
    Extent {
        /// The rank.
        rank: usize,
        /// The axis.
        axis: SeqAxis,
        /// What the tensor has.
        got: usize,
        /// What the layout says.
        expected: usize,
        /// The axis' global length.
        length: usize,
    },
    /// Two layouts of different global lengths.
    #[error("a shard of {from:?} positions cannot be laid out as one of {to:?}")]
    Lengths {
        /// The shard's lengths.
        from: [usize; 3],
        /// The wanted layout's.
        to: [usize; 3],
    },
    /// A partition over another number of ranks than the mesh axis that it is spread over.
    #[error("{axis} is partitioned over {partition} ranks, but its mesh axis has {mesh}")]
    Ranks {
        /// The axis.
        axis: SeqAxis,
        /// The partition's ranks.
        partition: usize,
        /// The mesh axis' size.
        mesh: usize,
    },
    /// Two axes split over mesh axes that are not independent: some blocks would be nobody's.
    #[error(
        "{axis} and {other} cannot be split over the same ranks; give each a mesh axis of its own"
    )]
    SameRanks {
        /// The axis that was to be split.
        axis: SeqAxis,
        /// The axis that is split over these ranks already.
        other: SeqAxis,
    },
    /// An axis that should be split and is whole.
    #[error("{axis} is whole on every rank, where it must be split")]
    NotSplit {
        /// The axis.
        axis: SeqAxis,
    },
    /// A table that has a row neither for each position of an axis nor for each that the rank holds.
    #[error(
        "{rows} rows of a table of {whole} were given for {axis}: the table needs at least {length}, and of them rank \
         {rank} all, or, of {length}, the {held} of its positions"
    )]
    Table {
        /// The rows that were given.
        rows: usize,
        /// The rows of the model's table.
        whole: usize,
        /// The axis.
        axis: SeqAxis,
        /// Its global length.
        length: usize,
        /// How many of its positions the rank holds.
        held: usize,
        /// The rank.
        rank: usize,
    },
    /// An axis that is split over ranks of which a group does not consist.
    #[error(
        "{axis} is split over {} ranks that stand {} apart, and a group of {ranks} rank(s) does not consist of such",
        over.size, over.stride
    )]
    GroupSize {
        /// The axis.
        axis: SeqAxis,
        /// The mesh axis that it is split over.
        over: MeshAxis,
        /// The group's ranks.
        ranks: usize,
    },
    /// A change of layout for which there is no single collective.
    #[error("no collective leads from {from} to {to}")]
    NoPath {
        /// The layout that is there.
        from: Box<Layout>,
        /// The layout that is wanted.
        to: Box<Layout>,
    },
    /// A shard that is not laid out as the plan says.
    #[error("{place} expects {expected}, but was given {got}")]
    Unexpected {
        /// Which call.
        place: &'static str,
        /// What the plan says.
        expected: Box<Layout>,
        /// What it was given.
        got: Box<Layout>,
    },
}

/// How an activation's three sequence axes are held by the ranks of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    lengths: [usize; 3],
    axes: [AxisLayout; 3],
    value: Value,
}

impl Layout {
    /// Every rank holds everything.
    pub fn whole(lengths: [usize; 3]) -> Self {
        Self {
            lengths,
            axes: [AxisLayout::Whole, AxisLayout::Whole, AxisLayout::Whole],
            value: Value::Complete,
        }
    }

    /// One axis in balanced contiguous blocks over a group of `ranks`, the others whole. Over one rank, all
    /// axes are whole.
    pub fn split(lengths: [usize; 3], axis: SeqAxis, ranks: usize) -> Self {
        let partition = Partition::balanced(lengths[axis.index()], ranks);
        let mut layout = Self::whole(lengths);
        if ranks == 1 {
            return layout;
        }
        layout.axes[axis.index()] = AxisLayout::Split {
            partition,
            over: MeshAxis::whole(ranks),
        };
        layout
    }

    /// The same layout with `axis` split by `partition` over a mesh axis.
    ///
    /// # Errors
    /// [`LayoutError::Ranks`] if partition and mesh axis differ in ranks, [`LayoutError::Lengths`] if the
    /// partition is of another length than the axis, [`LayoutError::SameRanks`] if another axis is split over
    /// the same ranks: some blocks would be nobody's.
    pub fn with_split(
        mut self,
        axis: SeqAxis,
        partition: Partition,
        over: MeshAxis,
    ) -> Result<Self, LayoutError> {
        if partition.ranks() != over.size {
            return Err(LayoutError::Ranks {
                axis,
                partition: partition.ranks(),
                mesh: over.size,
            });
        }
        if partition.length() != self.lengths[axis.index()] {
            let mut to = self.lengths;
            to[axis.index()] = partition.length();
            return Err(LayoutError::Lengths {
                from: self.lengths,
                to,
            });
        }
        for other in SeqAxis::ALL {
            if let AxisLayout::Split { over: taken, .. } = self.axis(other)
                && other != axis
                && !over.is_independent_of(*taken)
            {
                return Err(LayoutError::SameRanks { axis, other });
            }
        }
        self.axes[axis.index()] = AxisLayout::Split { partition, over };
        Ok(self)
    }

    /// The same layout with `axis` whole on every rank.
    pub fn with_whole(mut self, axis: SeqAxis) -> Self {
        self.axes[axis.index()] = AxisLayout::Whole;
        self
    }

    /// The same layout of complete values or of partial sums.
    pub fn with_value(mut self, value: Value) -> Self {
        self.value = value;
        self
    }

    /// The global length of each sequence axis.
    pub fn lengths(&self) -> [usize; 3] {
        self.lengths
    }

    /// The global length of one axis.
    pub fn length(&self, axis: SeqAxis) -> usize {
        self.lengths[axis.index()]
    }

    /// How one axis is held.
    pub fn axis(&self, axis: SeqAxis) -> &AxisLayout {
        &self.axes[axis.index()]
    }

    /// Complete values or partial sums.
    pub fn value(&self) -> Value {
        self.value
    }

    /// Whether `axis` is split.
    pub fn is_split(&self, axis: SeqAxis) -> bool {
        matches!(self.axis(axis), AxisLayout::Split { .. })
    }

    /// The axis that is split and its partition, the first if there are several.
    pub fn split_axis(&self) -> Option<(SeqAxis, &Partition)> {
        SeqAxis::ALL
            .into_iter()
            .find_map(|axis| match self.axis(axis) {
                AxisLayout::Split { partition, .. } => Some((axis, partition)),
                AxisLayout::Whole => None,
            })
    }

    /// The positions of all axes but `axis` together.
    pub fn positions_beside(&self, axis: SeqAxis) -> usize {
        let others = SeqAxis::ALL.into_iter().filter(|&other| other != axis);
        others.map(|other| self.length(other)).product()
    }

    /// The global ranges of `axis` that `rank` holds, in its local order.
    pub fn ranges(&self, axis: SeqAxis, rank: usize) -> Vec<Range<usize>> {
        match self.axis(axis) {
            AxisLayout::Whole if self.length(axis) == 0 => vec![],
            AxisLayout::Whole => std::iter::once(0..self.length(axis)).collect(),
            AxisLayout::Split { partition, over } => {
                partition.ranges(over.coordinate(rank)).to_vec()
            }
        }
    }

    /// How many positions of each axis `rank` holds.
    pub fn local_lengths(&self, rank: usize) -> [usize; 3] {
        SeqAxis::ALL.map(|axis| match self.axis(axis) {
            AxisLayout::Whole => self.length(axis),
            AxisLayout::Split { partition, over } => partition.count(over.coordinate(rank)),
        })
    }

    /// Who holds what of `[batch, s1, s2, s3, channels]` over a group of `ranks`, channels whole.
    pub fn blocks(&self, batch: usize, channels: usize, ranks: usize) -> Blocks {
        let axis = |axis: SeqAxis| match self.axis(axis) {
            AxisLayout::Whole => DimBlocks::whole(self.length(axis), ranks),
            AxisLayout::Split { .. } => DimBlocks::from_ranges(
                self.length(axis),
                (0..ranks).map(|rank| self.ranges(axis, rank)).collect(),
            ),
        };
        Blocks::new([
            DimBlocks::whole(batch, ranks),
            axis(SeqAxis::FIRST),
            axis(SeqAxis::SECOND),
            axis(SeqAxis::THIRD),
            DimBlocks::whole(channels, ranks),
        ])
    }

    /// Holds every split to a group of `ranks`: its blocks must all be there, each as often.
    ///
    /// # Errors
    /// [`LayoutError::GroupSize`]
    pub fn check_ranks(&self, ranks: usize) -> Result<(), LayoutError> {
        for axis in SeqAxis::ALL {
            if let &AxisLayout::Split { over, .. } = self.axis(axis)
                && !ranks.is_multiple_of(over.stride * over.size)
            {
                return Err(LayoutError::GroupSize { axis, over, ranks });
            }
        }
        Ok(())
    }

    /// How many ranks of a group of `ranks` hold each element: 1 if the splits use every mesh axis.
    pub fn replicas(&self, ranks: usize) -> usize {
        // No two axes are split over the same ranks.
        let over = |axis: &AxisLayout| match axis {
            AxisLayout::Split { over, .. } => over.size,
            AxisLayout::Whole => 1,
        };
        ranks / self.axes.iter().map(over).product::<usize>()
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.value == Value::Partial {
            write!(f, "partial sums of ")?;
        }
        write!(f, "[")?;
        for axis in SeqAxis::ALL {
            let separator = if axis == SeqAxis::FIRST { "" } else { ", " };
            match self.axis(axis) {
                AxisLayout::Whole => write!(f, "{separator}{}", self.length(axis))?,
                AxisLayout::Split { over, .. } => {
                    write!(f, "{separator}{}/{}", self.length(axis), over.size)?;
                }
            }
        }
        write!(f, "]")
    }
}

/// A rank's part of an activation: the local tensor `[batch, s1, s2, s3, channels]` and the global layout.
#[derive(Debug, Clone)]
pub struct Shard {
    tensor: Tensor<DIMS>,
    layout: Layout,
    rank: usize,
}

impl Shard {
    /// A local tensor with its layout.
    ///
    /// # Errors
    /// [`LayoutError::Extent`] if the tensor is not of the extents that the layout gives `rank`.
    pub fn new(tensor: Tensor<DIMS>, layout: Layout, rank: usize) -> Result<Self, LayoutError> {
        let dims = tensor.dims();
        let expected = layout.local_lengths(rank);
        for axis in SeqAxis::ALL {
            if dims[axis.dim()] != expected[axis.index()] {
                return Err(LayoutError::Extent {
                    rank,
                    axis,
                    got: dims[axis.dim()],
                    expected: expected[axis.index()],
                    length: layout.length(axis),
                });
            }
        }
        Ok(Self {
            tensor,
            layout,
            rank,
        })
    }

    /// This rank's part of a tensor that every rank holds whole. Nothing is sent.
    ///
    /// # Gradient
    /// Zero outside the part: the whole tensor's gradient is the *sum* over the ranks.
    ///
    /// # Errors
    /// [`LayoutError::Lengths`] if the tensor's lengths are not the layout's.
    pub fn split(whole: Tensor<DIMS>, layout: &Layout, rank: usize) -> Result<Self, LayoutError> {
        let mut tensor = whole;
        let dims = tensor.dims();
        if dims[1..4] != layout.lengths() {
            return Err(LayoutError::Lengths {
                from: [dims[1], dims[2], dims[3]],
                to: layout.lengths(),
            });
        }
        for axis in SeqAxis::ALL {
            if layout.is_split(axis) {
                tensor = select_ranges(tensor, axis.dim(), &layout.ranges(axis, rank));
            }
        }
        Self::new(tensor, layout.clone(), rank)
    }

    /// The local tensor.
    pub fn tensor(&self) -> &Tensor<DIMS> {
        &self.tensor
    }

    /// The local tensor, by value.
    pub fn into_tensor(self) -> Tensor<DIMS> {
        self.tensor
    }

    /// The layout.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The rank that holds this part.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The global ranges of `axis` that this rank holds, in local order.
    pub fn positions(&self, axis: SeqAxis) -> Vec<Range<usize>> {
        self.layout.ranges(axis, self.rank)
    }

    /// The rows of a table that belong to this rank's positions of `axis`, in local order.
    ///
    /// # Shapes
    /// - `table`: `[rows, channels]`, a row for each position (more are ignored); or this rank's rows already, as
    ///   a strategy leaves them that shards tables ([`Role::Table`](crate::strategy::Role))
    /// - `whole`: the rows of the model's own table, by which the one is told from the other
    /// - returns: `[positions held, channels]`
    ///
    /// # Errors
    /// [`LayoutError::Table`] if the model's table is too short for the axis, or this one is neither it nor the
    /// rank's rows of it.
    pub fn rows_of<const D: usize>(
        &self,
        table: Tensor<D>,
        whole: usize,
        axis: SeqAxis,
    ) -> Result<Tensor<D>, LayoutError> {
        let (rows, length) = (table.dims()[0], self.layout.length(axis));
        let held = self.layout.local_lengths(self.rank)[axis.index()];
        match rows {
            _ if rows == whole && whole >= length => {
                Ok(select_ranges(table, 0, &self.positions(axis)))
            }
            _ if rows == held && whole == length => Ok(table),
            _ => Err(LayoutError::Table {
                rows,
                whole,
                axis,
                length,
                held,
                rank: self.rank,
            }),
        }
    }

    /// Applies a position-wise function: the number of channels may change, the positions may not.
    ///
    /// # Errors
    /// [`LayoutError::Extent`] if the function changed an axis.
    pub fn map(
        self,
        function: impl FnOnce(Tensor<DIMS>) -> Tensor<DIMS>,
    ) -> Result<Self, LayoutError> {
        Self::new(function(self.tensor), self.layout, self.rank)
    }

    /// The sum of two shards that are laid out alike: a residual connection.
    ///
    /// # Errors
    /// [`LayoutError::Unexpected`] if they are laid out differently.
    pub fn plus(self, other: Self) -> Result<Self, LayoutError> {
        if self.layout != other.layout {
            return Err(LayoutError::Unexpected {
                place: "a sum of shards",
                expected: Box::new(self.layout),
                got: Box::new(other.layout),
            });
        }
        self.map(|x| x + other.tensor)
    }

    /// The channels in `N` equal parts: a fused query-key-value projection's three.
    ///
    /// # Gradient
    /// The parts' side by side, put together once.
    ///
    /// # Panics
    /// If `N` does not divide the channels.
    pub fn chunks<const N: usize>(self) -> [Self; N] {
        fused::parts(self.tensor).map(|tensor| Self {
            tensor,
            layout: self.layout.clone(),
            rank: self.rank,
        })
    }

    /// The same part outside of any autodiff graph.
    pub fn detach(mut self) -> Self {
        self.tensor = self.tensor.inner();
        self
    }

    /// The same local tensor, declared to hold complete values or partial sums.
    pub fn with_value(mut self, value: Value) -> Self {
        self.layout.value = value;
        self
    }
}

/// The given ranges of `dim`, end to end.
///
/// # Gradient
/// Zero outside the ranges; also where there are none, so that a rank with an empty block still takes part in
/// every backward collective. (Burn's own slice of nothing leaves the graph.)
pub fn select_ranges<const D: usize>(
    tensor: Tensor<D>,
    dim: usize,
    ranges: &[Range<usize>],
) -> Tensor<D> {
    let held = || ranges.iter().filter(|range| !range.is_empty());
    let mut after = tensor.dims();
    after[dim] = held().map(ExactSizeIterator::len).sum();
    match ranges {
        _ if after.contains(&0) => {
            let dims = tensor.dims();
            let nothing =
                Tensor::zeros(after, (&tensor.device().without_autodiff(), tensor.dtype()));
            vjp::attach1(tensor, nothing, move |gradient: Tensor<D>| {
                let like = (&gradient.device(), gradient.dtype());
                Ok::<_, Infallible>(Tensor::zeros(dims, like))
            })
        }
        [range] if *range == (0..tensor.dims()[dim]) => tensor,
        [range] => tensor.narrow(dim, range.start, range.len()),
        _ => Tensor::cat(
            held()
                .map(|range| tensor.clone().narrow(dim, range.start, range.len()))
                .collect(),
            dim,
        ),
    }
}

#[cfg(test)]
#[cfg(feature = "flex")]
mod tests {
    use burn::tensor::Device;

    use super::*;

    /// A rank that left the graph would miss the backward collectives of the others.
    #[test]
    fn the_chunks_of_an_empty_shard_stay_in_the_graph() {
        let layout = Layout::split([1, 4, 1], SeqAxis::FIRST, 2);
        let device = Device::flex().autodiff();
        let x = Tensor::<DIMS>::zeros([2, 0, 4, 1, 6], &device).require_grad();
        let shard = Shard::new(x.clone(), layout, 0).unwrap();
        let chunks = shard.chunks::<3>();
        for chunk in &chunks {
            assert_eq!(chunk.tensor().dims(), [2, 0, 4, 1, 2]);
            assert!(chunk.tensor().is_tracked());
        }
        let [a, b, c] = chunks.map(|chunk| chunk.into_tensor().sum());
        let gradients = (a + b + c).backward();
        assert_eq!(x.grad(&gradients).unwrap().dims(), x.dims());
    }
}
