//! Differentiable collectives: each forward is one exchange, each backward the same exchange transposed.
//!
//! ```text
//!              before (ranks 0 1 2)        after                       backward
//! all_to_all   rows    [a] [b] [c]         columns of a,b,c            all-to-all back
//! all_gather           [a] [b] [c]         [abc] [abc] [abc]           reduce-scatter
//! reduce_scatter       [xyz] [uvw] [rst]   [x+u+r] [y+v+s] [z+w+t]     all-gather
//! all_reduce           [x] [u] [r]         [x+u+r] on every rank       all-reduce
//! broadcast            [a] [ ] [ ]         [a] [a] [a]                 reduce to the root
//! ring_shift           [a] [b] [c]         [c] [a] [b]                 shift the other way
//! ```
//!
//! What is differentiated is the *sum* over the ranks of what each rank calls its loss. So the gradient of a
//! gathered tensor is the sum of all ranks' gradients of it (a reduce-scatter), whether or not these are
//! equal. A loss that every rank computes whole must therefore count once: see [`crate::Loss`].
//!
//! The forward transfer runs on the untracked tensor and its result joins the graph by a node that holds only
//! the backward ([`crate::vjp`]), marked compute-bound: gradient checkpointing never repeats a collective.
//! A collective that fails in a backward pass unwinds with its [`CommError`]; [`crate::launch()`] returns it.
//!
//! [`crate::reference`] has each of these as a plain function over all ranks' blocks.

use std::sync::Arc;

use burn::tensor::Tensor;

use crate::blocks::{Blocks, DIMS, DimBlocks};
use crate::error::{CommError, Error, Tracking};
use crate::group::{Group, Request, Step};
use crate::layout::{Layout, LayoutError, SeqAxis, Shard, Value};
use crate::ledger::{Collective, Phase};
use crate::partition::Partition;
use crate::shape::reshape;
use crate::vjp;

/// Moves a global tensor from one distribution over the group to another.
///
/// Every collective of this module is a case of it: see [`Blocks`]. `forward` and `backward` name the
/// exchange and its transpose in the ledger and in errors.
///
/// # Shapes
/// - `x`: this rank's block of `before`
/// - returns: its block of `after`
///
/// # Gradient
/// The exchange with `before` and `after` swapped.
///
/// # Errors
/// [`CommError`] if a rank fails, diverges, does not answer in time, or holds a block of another shape.
pub fn exchange(
    x: Tensor<DIMS>,
    before: Arc<Blocks>,
    after: Arc<Blocks>,
    forward: Collective,
    backward: Collective,
    group: &Group,
) -> Result<Tensor<DIMS>, CommError> {
    let view = x.dims();
    let kinds = (forward, backward, ALONE);
    exchange_as(x, view, |arrived| arrived, (before, after), kinds, group)
}

/// Which exchange of its collective one is: forward, and backward.
type Steps = (Step, Step);

/// A collective of one exchange.
const ALONE: Steps = (Step::First, Step::First);

/// [`exchange`] of a tensor of any rank, seen as `view`; `shape` says as what the block that arrives is seen.
///
/// The views are taken outside of the graph and cost it no node.
fn exchange_as<const D: usize>(
    x: Tensor<D>,
    view: [usize; DIMS],
    shape: impl FnOnce([usize; DIMS]) -> [usize; D],
    (before, after): (Arc<Blocks>, Arc<Blocks>),
    (forward, backward, steps): (Collective, Collective, Steps),
    group: &Group,
) -> Result<Tensor<D>, CommError> {
    let dims = x.dims();
    let asked = group.next_sequence();
    let y = group.exchange(Request {
        collective: forward,
        phase: Phase::Forward,
        tracking: Tracking::of([&x]),
        tensor: reshape(x.clone().inner(), view),
        before: before.clone(),
        after: after.clone(),
        step: steps.0,
        answers: None,
    })?;
    let (group, received) = (group.clone(), y.dims());
    let y = reshape(y, shape(received));
    Ok(vjp::attach1(x, y, move |gradient| {
        let gradient = group.exchange(Request {
            collective: backward,
            phase: Phase::Backward,
            tracking: Tracking::Untracked,
            tensor: reshape(gradient, received),
            before: after.clone(),
            after: before.clone(),
            step: steps.1,
            answers: Some(asked),
        })?;
        Ok::<_, CommError>(reshape(gradient, dims))
    }))
}

/// Lays a shard out differently, by whichever collective leads there.
///
/// | from | to | collective | backward |
/// |---|---|---|---|
/// | whole | split | none: each rank keeps its part | zeros elsewhere |
/// | split | whole | all-gather | reduce-scatter |
/// | split along one axis | split along another | all-to-all | all-to-all |
/// | partial sums, whole | split | reduce-scatter | all-gather |
/// | partial sums, whole | whole | all-reduce | all-reduce |
///
/// # Cost
/// Nothing if the layouts are equal; else as [`crate::cost`] says.
///
/// # Errors
/// [`LayoutError::Lengths`] if the layouts are of different tensors, [`LayoutError::GroupSize`] if one is not of the
/// group's number of ranks, [`LayoutError::NoPath`] if no single collective leads there, [`CommError`] if a rank fails.
pub fn relayout(x: Shard, to: &Layout, group: &Group) -> Result<Shard, Error> {
    let from = x.layout().clone();
    if from == *to {
        return Ok(x);
    }
    if from.lengths() != to.lengths() {
        return Err(LayoutError::Lengths {
            from: from.lengths(),
            to: to.lengths(),
        }
        .into());
    }
    let [batch, .., channels] = x.tensor().dims();
    let (rank, ranks) = (x.rank(), group.size());
    let blocks = |layout: &Layout| Arc::new(layout.blocks(batch, channels, ranks));
    let kinds = match Path::between(&from, to, ranks)? {
        Path::Cut => return Ok(Shard::split(x.into_tensor(), to, rank)?),
        Path::AllReduce => {
            let y = all_reduce(x.into_tensor(), group)?;
            return Ok(Shard::new(y, to.clone(), rank)?);
        }
        Path::AllGather => (Collective::AllGather, Collective::ReduceScatter),
        Path::AllToAll => (Collective::AllToAll, Collective::AllToAll),
        Path::ReduceScatter => (Collective::ReduceScatter, Collective::AllGather),
    };
    let (before, after) = (blocks(&from), blocks(to));
    let y = exchange(x.into_tensor(), before, after, kinds.0, kinds.1, group)?;
    Ok(Shard::new(y, to.clone(), rank)?)
}

/// What leads from one layout of a tensor to another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Path {
    /// Each rank keeps its part.
    Cut,
    AllGather,
    AllToAll,
    ReduceScatter,
    AllReduce,
}

impl Path {
    /// The one collective that leads there, from a layout that is another one.
    pub(crate) fn between(from: &Layout, to: &Layout, ranks: usize) -> Result<Self, LayoutError> {
        let is_whole = |layout: &Layout| SeqAxis::ALL.iter().all(|&axis| !layout.is_split(axis));
        let no_path = || LayoutError::NoPath {
            from: Box::new(from.clone()),
            to: Box::new(to.clone()),
        };
        from.check_ranks(ranks)?;
        to.check_ranks(ranks)?;
        Ok(match (from.value(), to.value()) {
            (Value::Complete, Value::Complete) if is_whole(from) => Self::Cut,
            (Value::Complete, Value::Complete) if from.replicas(ranks) != 1 => {
                return Err(no_path());
            }
            (Value::Complete, Value::Complete) if is_whole(to) => Self::AllGather,
            (Value::Complete, Value::Complete) => Self::AllToAll,
            (Value::Partial, Value::Complete) if is_whole(from) && is_whole(to) => Self::AllReduce,
            (Value::Partial, Value::Complete) if is_whole(from) => Self::ReduceScatter,
            _ => return Err(no_path()),
        })
    }
}

/// Gathers the blocks of one dim: every rank gets all of them, in the partition's global order.
///
/// # Shapes
/// - `x`: its extent along `dim` is this rank's count in `partition`
/// - returns: extent `partition.length()` along `dim`
///
/// # Cost
/// Each rank sends its block to N−1 others.
///
/// # Gradient
/// [`reduce_scatter`]: the sum of the ranks' gradients.
///
/// # Errors
/// [`CommError`] if a rank fails or diverges.
pub fn all_gather<const D: usize>(
    x: Tensor<D>,
    dim: usize,
    partition: &Partition,
    group: &Group,
) -> Result<Tensor<D>, CommError> {
    let (before, after) = split_and_whole(x.dims(), dim, partition);
    let kinds = (Collective::AllGather, Collective::ReduceScatter);
    along_dim(x, dim, before, after, kinds, group)
}

/// Sums the ranks' tensors and gives each rank its part of one dim.
///
/// # Shapes
/// - `x`: extent `partition.length()` along `dim`, the same on every rank
/// - returns: this rank's count in `partition` along `dim`
///
/// # Cost
/// Each rank sends all but its own part.
///
/// # Gradient
/// [`all_gather`].
///
/// # Errors
/// [`CommError`] if a rank fails or diverges.
pub fn reduce_scatter<const D: usize>(
    x: Tensor<D>,
    dim: usize,
    partition: &Partition,
    group: &Group,
) -> Result<Tensor<D>, CommError> {
    let (split, whole) = split_and_whole(x.dims(), dim, partition);
    let kinds = (Collective::ReduceScatter, Collective::AllGather);
    along_dim(x, dim, whole, split, kinds, group)
}

/// Moves the split from one dim to another (the switch of Dynamic Sequence Parallelism, arXiv:2403.10266, §3).
///
/// # Shapes
/// - `x`: split by `from` along `from_dim`, whole along `to_dim`
/// - returns: whole along `from_dim`, split by `to` along `to_dim`
///
/// # Cost
/// Each rank sends `(N−1)/N` of its block where blocks are even.
///
/// # Gradient
/// The same the other way.
///
/// # Panics
/// If the two dims are the same.
///
/// # Errors
/// [`CommError`] if a rank fails or diverges.
pub fn all_to_all<const D: usize>(
    x: Tensor<D>,
    (from_dim, from): (usize, &Partition),
    (to_dim, to): (usize, &Partition),
    group: &Group,
) -> Result<Tensor<D>, CommError> {
    assert_ne!(
        from_dim, to_dim,
        "an all-to-all moves the split to another dim"
    );
    group.check_ranks(Collective::AllToAll, [from.ranks(), to.ranks()])?;
    // The two dims, with what lies before, between and behind them: five dims, whatever D is.
    let (low, high) = (from_dim.min(to_dim), from_dim.max(to_dim));
    let dims = x.dims();
    let view = [
        dims[..low].iter().product(),
        dims[low],
        dims[low + 1..high].iter().product(),
        dims[high],
        dims[high + 1..].iter().product(),
    ];
    let position = |dim: usize| if dim == low { 1 } else { 3 };
    let ranks = from.ranks();
    let mut global = view;
    global[position(from_dim)] = from.length();
    global[position(to_dim)] = to.length();
    let whole = Blocks::replicated(global, ranks);
    let before = whole
        .clone()
        .with_dim(position(from_dim), DimBlocks::split(from));
    let after = whole.with_dim(position(to_dim), DimBlocks::split(to));
    let result = |arrived: [usize; DIMS]| {
        let mut result = dims;
        (result[low], result[high]) = (arrived[1], arrived[3]);
        result
    };
    let kinds = (Collective::AllToAll, Collective::AllToAll, ALONE);
    let blocks = (Arc::new(before), Arc::new(after));
    exchange_as(x, view, result, blocks, kinds, group)
}

/// Sums the ranks' tensors; every rank gets the sum, bit for bit the same.
///
/// # Cost
/// A reduce-scatter and an all-gather over balanced chunks: `(P − p_r) + (N − 1)·p_r` of `P` elements.
///
/// # Gradient
/// The all-reduce of the gradients.
///
/// # Errors
/// [`CommError`] if a rank fails or diverges.
pub fn all_reduce<const D: usize>(x: Tensor<D>, group: &Group) -> Result<Tensor<D>, CommError> {
    let dims = x.dims();
    let count = x.shape().num_elements();
    let partition = Partition::balanced(count, group.size());
    let (split, whole) = split_and_whole([count], 0, &partition);
    // Between the two exchanges each rank has a chunk of the elements, seen as one row.
    let own = partition.count(group.rank());
    let (row, chunk) = ([1, count, 1, 1, 1], [1, own, 1, 1, 1]);
    let in_a_row = |_| {
        let mut shape = [1; D];
        shape[D - 1] = own;
        shape
    };
    let kind = Collective::AllReduce;
    let blocks = (whole.clone(), split.clone());
    // Backward, the second exchange's transpose comes first.
    let first = (kind, kind, (Step::First, Step::Further));
    let second = (kind, kind, (Step::Further, Step::First));
    let sums = exchange_as(x, row, in_a_row, blocks, first, group)?;
    exchange_as(sums, chunk, |_| dims, (split, whole), second, group)
}

/// Sums untracked tensors over the ranks, outside of the forward and the backward pass.
///
/// # Errors
/// [`CommError`] if a rank fails or diverges.
pub fn all_reduce_in<const D: usize>(
    x: Tensor<D>,
    phase: Phase,
    group: &Group,
) -> Result<Tensor<D>, CommError> {
    let (dims, count) = (x.dims(), x.shape().num_elements());
    let first = half_reduce(x.inner(), count, (phase, Step::First), group);
    let chunk = group.exchange(first)?;
    let further = half_reduce(chunk, count, (phase, Step::Further), group);
    Ok(reshape(group.exchange(further)?, dims))
}

/// One of the two exchanges of an all-reduce of `count` elements, untracked: of all of them to the sums of this rank's
/// chunk, or of that to all sums.
pub(crate) fn half_reduce<const D: usize>(
    x: Tensor<D>,
    count: usize,
    (phase, step): (Phase, Step),
    group: &Group,
) -> Request {
    let partition = Partition::balanced(count, group.size());
    let (split, whole) = split_and_whole([count], 0, &partition);
    let (before, after) = match step {
        Step::First => (whole, split),
        Step::Further => (split, whole),
    };
    Request {
        collective: Collective::AllReduce,
        phase,
        tracking: Tracking::Untracked,
        tensor: reshape(x, before.local_shape(group.rank())),
        before,
        after,
        step,
        answers: None,
    }
}

/// Gives every rank the root's tensor. All ranks pass a tensor of the same shape; only the root's counts.
///
/// # Cost
/// The root sends its tensor to N−1 others.
///
/// # Gradient
/// The sum of the ranks' gradients reaches the root; the other ranks' tensors get zeros.
///
/// # Errors
/// [`CommError`] if a rank fails or diverges.
///
/// # Panics
/// If `root` is not a rank of the group.
pub fn broadcast<const D: usize>(
    x: Tensor<D>,
    root: usize,
    group: &Group,
) -> Result<Tensor<D>, CommError> {
    let (rank, ranks) = (group.rank(), group.size());
    assert!(
        root < ranks,
        "a broadcast's root {root} is one of {ranks} ranks"
    );
    let dims = x.dims();
    let count = x.shape().num_elements();
    let mut counts = vec![0; ranks];
    counts[root] = count;
    let held = counts
        .into_iter()
        .map(|count| if count == 0 { vec![] } else { vec![0..count] })
        .collect();
    let whole = Blocks::replicated([1, count, 1, 1, 1], ranks);
    let after = Arc::new(whole.clone());
    let before = Arc::new(whole.with_dim(1, DimBlocks::from_ranges(count, held)));
    let tracking = Tracking::of([&x]);
    let asked = group.next_sequence();
    let tensor = reshape(x.clone().inner(), [1, count, 1, 1, 1]);
    let tensor = if rank == root {
        tensor
    } else {
        tensor.slice_dim(1, 0..0)
    };
    let y = group.exchange(Request {
        collective: Collective::Broadcast,
        phase: Phase::Forward,
        tracking,
        tensor,
        before: before.clone(),
        after: after.clone(),
        step: Step::First,
        answers: None,
    })?;
    let group = group.clone();
    Ok(vjp::attach1(x, reshape(y, dims), move |gradient| {
        let (device, dtype) = (gradient.device(), gradient.dtype());
        let sum = group.exchange(Request {
            collective: Collective::Reduce,
            phase: Phase::Backward,
            tracking: Tracking::Untracked,
            tensor: reshape(gradient, [1, count, 1, 1, 1]),
            before: after.clone(),
            after: before.clone(),
            step: Step::First,
            answers: Some(asked),
        })?;
        Ok::<_, CommError>(if rank == root {
            reshape(sum, dims)
        } else {
            Tensor::zeros(dims, (&device, dtype))
        })
    }))
}

/// Hands every rank's block to the rank `steps` further along the ring.
///
/// # Shapes
/// - `x`: this rank's count in `partition` along `dim`
/// - returns: the count of rank `r − steps`
///
/// # Cost
/// Each rank sends its block once.
///
/// # Gradient
/// The shift the other way.
///
/// # Errors
/// [`CommError`] if a rank fails or diverges.
pub fn ring_shift<const D: usize>(
    x: Tensor<D>,
    dim: usize,
    partition: &Partition,
    steps: isize,
    group: &Group,
) -> Result<Tensor<D>, CommError> {
    let ranks = partition.ranks();
    let origin = |rank: usize| (rank as isize - steps).rem_euclid(ranks as isize) as usize;
    let (before, whole) = split_and_whole(x.dims(), dim, partition);
    let moved = (0..ranks)
        .map(|rank| partition.ranges(origin(rank)).to_vec())
        .collect();
    let after = Arc::new(
        Blocks::clone(&whole).with_dim(1, DimBlocks::from_ranges(partition.length(), moved)),
    );
    let kinds = (Collective::RingShift, Collective::RingShift);
    along_dim(x, dim, before, after, kinds, group)
}

/// `[outer, dim, inner, 1, 1]`: any tensor, seen as the dim that is exchanged and what lies around it.
fn view<const D: usize>(dims: [usize; D], dim: usize) -> [usize; DIMS] {
    [
        dims[..dim].iter().product(),
        dims[dim],
        dims[dim + 1..].iter().product(),
        1,
        1,
    ]
}

fn split_and_whole<const D: usize>(
    dims: [usize; D],
    dim: usize,
    partition: &Partition,
) -> (Arc<Blocks>, Arc<Blocks>) {
    let mut shape = view(dims, dim);
    shape[1] = partition.length();
    let whole = Blocks::replicated(shape, partition.ranks());
    let split = whole.clone().with_dim(1, DimBlocks::split(partition));
    (Arc::new(split), Arc::new(whole))
}

fn along_dim<const D: usize>(
    x: Tensor<D>,
    dim: usize,
    before: Arc<Blocks>,
    after: Arc<Blocks>,
    kinds: (Collective, Collective),
    group: &Group,
) -> Result<Tensor<D>, CommError> {
    let (dims, kinds) = (x.dims(), (kinds.0, kinds.1, ALONE));
    let result = |arrived: [usize; DIMS]| {
        let mut result = dims;
        result[dim] = arrived[1];
        result
    };
    exchange_as(x, view(dims, dim), result, (before, after), kinds, group)
}
