//! Heads for sequence: the exchange of head-parallel attention, within a group of ranks.
//!
//! ```text
//!            heads                              heads
//!          h0 h1 h2 h3                       h0 h1 │ h2 h3
//!        ┌─────────────┐     to_heads       ┌──────┼──────┐
//!    seq │   rank 0    │  ──────────────▶   │ rank │ rank │
//!        ├─────────────┤                    │  0   │  1   │
//!        │   rank 1    │  ◀──────────────   │      │      │
//!        └─────────────┘    to_sequence     └──────┴──────┘
//! ```
//!
//! The group may be some of the ranks over which the sequence is split: then what each has afterwards are its heads
//! of the group's positions together. Heads that the ranks do not divide are shared out unevenly; a key-value head
//! that several ranks' query heads use goes to each, and its gradients are summed at its owner, in rank order.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::Tensor;

use super::shard::{Fold, Heads, positions_in, samples};
use super::{HeadRange, Mask};
use crate::blocks::{Blocks, DIMS, DimBlocks};
use crate::error::{CommError, Tracking};
use crate::group::{Group, Request, Step};
use crate::layout::{AxisSet, Layout, SeqAxis, Shard};
use crate::ledger::{Collective, Phase};
use crate::partition::balanced_range;
use crate::strategy::AttentionStage;

/// The ranges that some ranks hold of an axis together, in order, neighbours joined.
pub fn union(layout: &Layout, axis: SeqAxis, ranks: &[usize]) -> Vec<Range<usize>> {
    let mut all: Vec<Range<usize>> = ranks
        .iter()
        .flat_map(|&rank| layout.ranges(axis, rank))
        .collect();
    all.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<usize>> = Vec::new();
    for range in all {
        match joined.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => joined.push(range),
        }
    }
    joined
}

/// The query heads of rank `index` of `ranks` that share them out evenly.
pub fn share(heads: Heads, index: usize, ranks: usize) -> HeadRange {
    HeadRange {
        query: balanced_range(heads.query, index, ranks),
        group: heads.group(),
    }
}

/// Queries, or keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Queries, and the output.
    Queries,
    /// Keys and values.
    Keys,
}

/// One attention's exchange of heads for sequence, either way.
#[derive(Debug, Clone)]
pub struct Trade {
    queries: Held,
    keys: Held,
    axes: AxisSet,
    dim: usize,
    /// The global numbers of the folded samples.
    samples: Vec<Range<usize>>,
    group: Group,
    tracking: Tracking,
    /// The number of the group's first exchange in the forward pass.
    asked: u64,
}

impl Trade {
    /// The exchange within `group`, whose ranks are `members` of those over which query and key are split.
    pub fn new(
        attention: &AttentionStage,
        [query, key]: [&Shard; 2],
        (group, members): (&Group, &[usize]),
        tracking: Tracking,
    ) -> Self {
        let (heads, axes) = (attention.heads, attention.axes);
        let shares = |range: fn(&HeadRange) -> Range<usize>| {
            let ranks = members.len();
            (0..ranks).map(move |index| range(&share(heads, index, ranks)))
        };
        let held = |x: &Shard, heads, shares| Held::new(x, axes, members, heads, shares);
        Self {
            queries: held(
                query,
                heads.query,
                shares(|heads| heads.query.clone()).collect(),
            ),
            keys: held(key, heads.key_value, shares(HeadRange::kv).collect()),
            axes,
            dim: heads.dim,
            samples: samples(query.layout(), axes, query.tensor().dims()[0], query.rank()),
            group: group.clone(),
            tracking,
            asked: group.next_sequence(),
        }
    }

    fn side(&self, side: Side) -> &Held {
        match side {
            Side::Queries => &self.queries,
            Side::Keys => &self.keys,
        }
    }

    /// The positions that this rank has of its heads, row by row.
    pub fn positions(&self, side: Side) -> Vec<Range<usize>> {
        let held = self.side(side);
        positions_in(held.lengths, self.axes, |axis| held.after(axis))
    }

    /// The global numbers of the folded samples.
    pub fn samples(&self) -> &[Range<usize>] {
        &self.samples
    }

    /// The mask for each folded sample.
    pub fn mask(&self, mask: &Mask) -> Mask {
        self.queries.fold.mask(mask)
    }

    /// All heads of this rank's positions to this rank's heads of the group's: `[samples, rows, heads, d]`.
    ///
    /// # Errors
    /// [`CommError`] if a rank fails.
    pub fn to_heads(
        &self,
        x: Tensor<DIMS>,
        side: Side,
        phase: Phase,
    ) -> Result<Tensor<4>, CommError> {
        let held = self.side(side);
        let (before, after) = held.blocks(self.dim);
        let heads = after.dim(4).count(self.group.rank()) / self.dim;
        let x = self.exchange(x, (before, after), phase, self.tracking)?;
        Ok(held.fold.fold(x, heads))
    }

    /// The way back, of a tensor of any width a head. Where several ranks have the same head, the owner of a position
    /// gets their sum.
    ///
    /// # Errors
    /// [`CommError`] if a rank fails.
    pub fn to_sequence(
        &self,
        x: Tensor<4>,
        side: Side,
        (phase, tracking): (Phase, Tracking),
    ) -> Result<Tensor<DIMS>, CommError> {
        let held = self.side(side);
        let (after, before) = held.blocks(x.dims()[3]);
        self.exchange(held.fold.unfold(x), (before, after), phase, tracking)
    }

    fn exchange(
        &self,
        tensor: Tensor<DIMS>,
        (before, after): (Arc<Blocks>, Arc<Blocks>),
        phase: Phase,
        tracking: Tracking,
    ) -> Result<Tensor<DIMS>, CommError> {
        let (tracking, answers) = match phase {
            Phase::Backward => (Tracking::Untracked, Some(self.asked)),
            _ => (tracking, None),
        };
        self.group.exchange(Request {
            collective: Collective::AllToAll,
            phase,
            tracking,
            tensor,
            before,
            after,
            step: Step::First,
            answers,
        })
    }
}

/// How one side is held before and after.
#[derive(Debug, Clone)]
struct Held {
    batch: usize,
    lengths: [usize; 3],
    /// The attended axis that is split, and what each member has of it.
    split: Option<(SeqAxis, Vec<Vec<Range<usize>>>)>,
    /// What they have together.
    together: Vec<Range<usize>>,
    heads: usize,
    /// The heads of each member afterwards.
    shares: Vec<Range<usize>>,
    fold: Fold,
}

impl Held {
    fn new(
        x: &Shard,
        axes: AxisSet,
        members: &[usize],
        heads: usize,
        shares: Vec<Range<usize>>,
    ) -> Self {
        let layout = x.layout();
        let split = axes.iter().find(|&axis| layout.is_split(axis));
        let together = split.map_or_else(Vec::new, |axis| union(layout, axis, members));
        let mut dims = x.tensor().dims();
        if let Some(axis) = split {
            dims[axis.dim()] = together.iter().map(ExactSizeIterator::len).sum();
        }
        Self {
            batch: dims[0],
            lengths: layout.lengths(),
            split: split.map(|axis| {
                let of_member = |&rank: &usize| layout.ranges(axis, rank);
                (axis, members.iter().map(of_member).collect())
            }),
            together,
            heads,
            shares,
            fold: Fold::new(dims, axes),
        }
    }

    /// What every member has of an axis afterwards.
    fn after(&self, axis: SeqAxis) -> Vec<Range<usize>> {
        match &self.split {
            Some((split, _)) if *split == axis => self.together.clone(),
            _ => std::iter::once(0..self.lengths[axis.index()]).collect(),
        }
    }

    /// Who holds what before and after, `unit` channels a head.
    fn blocks(&self, unit: usize) -> (Arc<Blocks>, Arc<Blocks>) {
        let members = self.shares.len();
        let [a, b, c] = self.lengths;
        let all = Blocks::replicated([self.batch, a, b, c, self.heads * unit], members);
        let (mut before, mut after) = (all.clone(), all);
        if let Some((axis, held)) = &self.split {
            let along = |ranges| DimBlocks::from_ranges(self.lengths[axis.index()], ranges);
            before = before.with_dim(axis.dim(), along(held.clone()));
            after = after.with_dim(axis.dim(), along(vec![self.together.clone(); members]));
        }
        let channels = self
            .shares
            .iter()
            .map(|heads| std::iter::once(heads.start * unit..heads.end * unit).collect());
        let channels = DimBlocks::from_ranges(self.heads * unit, channels.collect());
        (Arc::new(before), Arc::new(after.with_dim(4, channels)))
    }
}
