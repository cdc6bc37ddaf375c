//! DeepSpeed-Ulysses: one axis stays split; in its attention, heads are exchanged for sequence.
//!
//! ```text
//!            heads                              heads
//!          h0 h1 h2 h3                       h0 h1 │ h2 h3
//!        ┌─────────────┐   all-to-all of    ┌──────┼──────┐   all-to-all     ┌─────────────┐
//!    seq │   rank 0    │   q, k and v       │ rank │ rank │   of the output  │   rank 0    │
//!        ├─────────────┤  ──────────────▶   │  0   │  1   │  ─────────────▶  ├─────────────┤
//!        │   rank 1    │                    │      │      │                  │   rank 1    │
//!        └─────────────┘                    └──────┴──────┘                  └─────────────┘
//! ```
//!
//! Attentions over the other axes are local. Cost of one over the split axis: rank `r` sends
//! `B·d·[l_r(Hq − q_r) + 2·l_r·Σ_{p≠r} kv_p + q_r(L − l_r)]` elements, that is `4·M(N−1)/N²` of an activation
//! of `M` where all is even.
//!
//! Requires: a query head for every rank. Heads and lengths that the ranks do not divide are split unevenly;
//! where there are fewer key-value heads than ranks, or a rank's query heads cut a group, a key-value head
//! goes to every rank that needs it, and its gradients are summed at its owner, in rank order.
//!
//! Jacobs et al., "DeepSpeed Ulysses", arXiv:2309.14509.

use std::ops::Range;
use std::sync::Arc;

use dsp_core::attention::{Attended, HeadRange, HeldAttention, Heads, Logsumexp, attend_held};
use burn::tensor::Tensor;
use dsp_core::blocks::{Blocks, DIMS, DimBlocks};
use dsp_core::collective::exchange;
use dsp_core::cost::{self, Elements};
use dsp_core::layout::AxisLayout;
use dsp_core::ledger::Collective;
use dsp_core::strategy::{
    AttentionScope, AttentionStage, Plan, StageKind, StagePlan, check_softmax,
};
use dsp_core::{
    Error, Group, Layout, ModelShape, Partition, PlanError, SeqAxis, SequenceParallel, Shard,
};

/// DeepSpeed-Ulysses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ulysses;

impl SequenceParallel for Ulysses {
    fn name(&self) -> &'static str {
        "ulysses"
    }

    fn plan(&self, model: &ModelShape, ranks: usize) -> Result<Plan, PlanError> {
        check_softmax(self.name(), model)?;
        for stage in &model.stages {
            if let StageKind::Attention(attention) = &stage.kind
                && attention.heads.query < ranks
            {
                return Err(PlanError::Heads {
                    strategy: self.name(),
                    stage: stage.name.clone(),
                    heads: attention.heads.query,
                    ranks,
                });
            }
        }
        let lengths = model.lengths()?;
        // The axis whose attentions send least; of equals the longest, which splits most evenly.
        let total = |axis: SeqAxis| -> u64 {
            let stages = model.stages.iter();
            stages
                .flat_map(|stage| stage_sends(&stage.kind, model.batch, lengths, axis, ranks))
                .map(|sent| sent.forward + sent.backward)
                .sum()
        };
        let axis = model
            .axes()
            .min_by_key(|&axis| (total(axis), usize::MAX - lengths[axis.index()]))
            .unwrap_or(SeqAxis::FIRST);
        let layout = Layout::split(lengths, axis, ranks);
        let stages = model.stages.iter().map(|stage| StagePlan {
            residual: layout.clone(),
            inner: layout.clone(),
            sends: stage_sends(&stage.kind, model.batch, lengths, axis, ranks),
            delegate: 0,
        });
        Ok(Plan {
            input: layout.clone(),
            stages: stages.collect(),
            output: layout.clone(),
            output_sends: vec![Elements::default(); ranks],
        })
    }

    fn attend(&self, qkv: [Shard; 3], scope: &AttentionScope<'_>) -> Result<Attended, Error> {
        let attention = scope.attention;
        let layout = qkv[0].layout().clone();
        let attends_split = attention.axes.iter().any(|axis| layout.is_split(axis));
        if !attends_split {
            return dsp_core::attention::attend_local(qkv, attention, scope.logsumexp);
        }
        let group = scope.scope.group;
        let (rank, ranks) = (group.rank(), group.size());
        let shares = HeadShares::new(attention.heads, ranks);
        let [query, key, value] = qkv;
        let query = to_heads(query, attention, &shares.query, group)?;
        let key = to_heads(key, attention, &shares.key_value, group)?;
        let value = to_heads(value, attention, &shares.key_value, group)?;
        let heads = HeadRange {
            query: shares.query[rank].first().cloned().unwrap_or(0..0),
            group: attention.heads.group(),
        };
        let (output, logsumexp) = attend_held(
            [query, key, value],
            HeldAttention {
                axes: attention.axes,
                heads: &heads,
                mask: &attention.mask,
                scale: attention.scale,
            },
        )?;
        let back = |x: Tensor<DIMS>, unit: usize| -> Result<Shard, Error> {
            let batch = x.dims()[0];
            let after = layout.blocks(batch, attention.heads.query * unit, ranks);
            let before = head_blocks(&layout, attention, batch, unit, &shares.query, ranks);
            let kind = Collective::AllToAll;
            let x = exchange(x, Arc::new(before), Arc::new(after), kind, kind, group)?;
            Ok(Shard::new(x, layout.clone(), rank)?)
        };
        Ok(Attended {
            output: back(output, attention.heads.dim)?,
            logsumexp: match scope.logsumexp {
                Logsumexp::Wanted => Some(back(logsumexp, 1)?),
                Logsumexp::Unwanted => None,
            },
        })
    }
}

/// Which heads each rank computes: its query heads, and the key-value heads that they touch.
struct HeadShares {
    query: Vec<Vec<Range<usize>>>,
    key_value: Vec<Vec<Range<usize>>>,
}

impl HeadShares {
    fn new(heads: Heads, ranks: usize) -> Self {
        let partition = Partition::balanced(heads.query, ranks);
        let query: Vec<_> = (0..ranks)
            .map(|rank| partition.ranges(rank).to_vec())
            .collect();
        let touched = |range: &Range<usize>| {
            HeadRange {
                query: range.clone(),
                group: heads.group(),
            }
            .kv()
        };
        let key_value = query
            .iter()
            .map(|ranges| ranges.iter().map(touched).collect())
            .collect();
        Self { query, key_value }
    }
}

/// Who holds what when each rank has its heads of the whole attended axes; `unit` channels a head.
fn head_blocks(
    layout: &Layout,
    attention: &AttentionStage,
    batch: usize,
    unit: usize,
    shares: &[Vec<Range<usize>>],
    ranks: usize,
) -> Blocks {
    let heads = shares.iter().flatten().map(|range| range.end).max();
    let channels = shares.iter().map(|ranges| {
        ranges
            .iter()
            .map(|range| range.start * unit..range.end * unit)
            .collect()
    });
    let channels = DimBlocks::from_ranges(heads.unwrap_or(0) * unit, channels.collect());
    whole_along(layout, attention)
        .blocks(batch, channels.length(), ranks)
        .with_dim(4, channels)
}

fn whole_along(layout: &Layout, attention: &AttentionStage) -> Layout {
    attention
        .axes
        .iter()
        .fold(layout.clone(), Layout::with_whole)
}

/// Trades a shard of all heads for all positions of this rank's heads.
fn to_heads(
    x: Shard,
    attention: &AttentionStage,
    shares: &[Vec<Range<usize>>],
    group: &Group,
) -> Result<Shard, Error> {
    let (layout, rank) = (x.layout().clone(), x.rank());
    let [batch, .., channels] = x.tensor().dims();
    let before = layout.blocks(batch, channels, group.size());
    let dim = attention.heads.dim;
    let after = head_blocks(&layout, attention, batch, dim, shares, group.size());
    let kind = Collective::AllToAll;
    let (before, after) = (Arc::new(before), Arc::new(after));
    let x = exchange(x.into_tensor(), before, after, kind, kind, group)?;
    Ok(Shard::new(x, whole_along(&layout, attention), rank)?)
}

/// What each rank sends in a stage while `axis` is split.
fn stage_sends(
    kind: &StageKind,
    batch: usize,
    lengths: [usize; 3],
    axis: SeqAxis,
    ranks: usize,
) -> Vec<Elements> {
    let StageKind::Attention(attention) = kind else {
        return vec![Elements::default(); ranks];
    };
    if !attention.axes.contains(axis) {
        return vec![Elements::default(); ranks];
    }
    let layout = Layout::split(lengths, axis, ranks);
    let AxisLayout::Split { partition, .. } = layout.axis(axis) else {
        return vec![Elements::default(); ranks];
    };
    let others = lengths
        .iter()
        .enumerate()
        .filter(|&(index, _)| index != axis.index())
        .map(|(_, length)| length)
        .product();
    (0..ranks)
        .map(|rank| cost::ulysses(batch, others, attention.heads, partition, partition, rank))
        .collect()
}
